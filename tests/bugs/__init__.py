"""The bugs of `python -m tests.zoo`, by theme."""

from tests.bugs import numerics, options, rows, sampling, speed, text
from tests.bugs.mutation import NOT_BUILT, PITFALLS, Mutation

MUTATIONS: list[Mutation] = sorted(
    [*text.BUGS, *rows.BUGS, *sampling.BUGS, *numerics.BUGS, *options.BUGS, *speed.BUGS], key=lambda bug: bug.pitfall
)

__all__ = ["MUTATIONS", "NOT_BUILT", "PITFALLS", "Mutation"]
