"""What a GRPO step does on average, exactly: `python -m benchmarks.exact_gradient` prints the report.

Each table compares the expected direction of a step, over every group that can be drawn, with the true gradient of what
it is meant to raise. `tests/test_exact_gradient.py` proves the same as claims, and that the recorded report is current.
"""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from benchmarks.exact.kl import kl_losses, kl_values, off_policy, variants
from benchmarks.exact.rewards import difficulty, length_bias, normalisers, scaled, truncation, unscaled
from benchmarks.exact.table import block
from rewards.terminal import Arguments, user_errors

BLOCKS = (
    unscaled,
    scaled,
    difficulty,
    normalisers,
    length_bias,
    kl_losses,
    kl_values,
    off_policy,
    variants,
    truncation,
)

HEAD = """# What a step does on average, exactly

A language of 4 or 5 tokens with completions of at most 3 is small enough to list every completion and every group of
them. Each group's loss is computed by this project's own functions, in float64, and multiplied by its probability: the
gradient of the sum is the expected gradient, with no sampling noise. It is compared with the true gradient of what the
loss stands for, differentiated as a plain sum over completions.

- *size*: the expected direction's length over the true gradient's; *predicted size*: what theory says, where it says so
- *cosine*: of the angle between the two; 1 is the right direction
- *rest*: the share of the expected direction that lies across the true gradient: what no learning rate repairs
- 0 is below 1e-12: rounding
"""


def report() -> str:
    return "\n".join([HEAD, *(block(table()) for table in BLOCKS)])


def provenance() -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"`python -m benchmarks.exact_gradient` with Python {platform.python_version()}, {versions}; fixed seeds."


if __name__ == "__main__":
    with user_errors():
        Arguments("python -m benchmarks.exact_gradient", description=__doc__).parse_args()
    torch.set_num_threads(1)
    print(report())
    print(provenance())
