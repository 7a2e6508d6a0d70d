"""The bugs of `python -m tests.zoo`, by theme."""

from tests.bugs import (
    distribution,
    generation,
    measured,
    memory,
    numerics,
    options,
    resume,
    rows,
    sampling,
    teaching,
    text,
)
from tests.bugs.mutation import PITFALLS, Mutation

THEMES = (text, rows, sampling, numerics, options, teaching, generation, memory, resume, measured, distribution)
MUTATIONS: list[Mutation] = sorted((bug for theme in THEMES for bug in theme.BUGS), key=lambda bug: bug.pitfall)

__all__ = ["MUTATIONS", "PITFALLS", "Mutation"]
