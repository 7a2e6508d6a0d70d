"""A finding, and the thresholds from which on something is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOVED = 3.0  # standard errors; by chance in one flat quantity of 400
STILL = 2.0  # standard errors; a flat quantity stays within them 19 times in 20
FELL = 4.0  # as MOVED, but a peak is the best of many windows: its height is luck in part
CUT_OFF = 0.8  # share of completions; what ends by itself is then the exception
ALIKE = 0.7  # share of groups that teach nothing: three in four samples are wasted
SOLVED = 0.9  # accuracy; a group of 8 is then all right nearly every other time
APART = 0.15  # of greedy and sampled accuracy; people take the two for one number
UNSOLVED = 0.15  # accuracy; more, and eight samples of a prompt are rarely all wrong
NOTICED = 0.05  # share of completions with an answer; less is an accident, not a habit
NO_LR = 1e-7  # AdamW moves a weight by about lr a step: a thousand steps would not show in a weight of 0.02
SATURATED = 0.05  # of a reward's value, its standard deviation: one completion in 400 differs
SKIPPED = 0.02  # share of the updates; a stray one is no illness
RATIO_OFF = 1e-3  # of a ratio that is 1 by definition; float32 rounds at 1e-7
GAP = {"float32": 1e-3, "": 2e-2}  # nats a token, mean; float32 rounds to 1e-6, bf16 (8 bits) to some 1e-2
# Share of the ratios in groups that differ; PPO's users take 0.1 to 0.2 for much, GSPO clips 0.15 by intent.
CLIPPED = {"token": 0.1, "sequence": 0.3}
KL_FAR = 1.0  # nats a token; the samples are then e times as likely as under the reference
ENTROPY_LEFT = 0.25  # of the first fifth's
ENTROPY_LOW = 0.05  # nats a token; below it eight samples of a prompt are mostly one text
EXPLODED = 10.0  # times the first fifth's gradient norm
LOOSENED = 3.0  # times the first fifth's entropy
BUDGET = 0.8  # of the budget, in the mean
LONGER = 1.3  # times the first fifth's length
LOSS_UP = 1.3  # times the best loss of SFT
PENALTIES = {"soft_overlong_reward_func"}  # meant to be 0


@dataclass(frozen=True)
class Finding:
    """What is wrong, the numbers that say so, what to try; `follows` names the finding that probably causes it."""

    name: str
    what: str
    evidence: str
    advice: str
    follows: str = ""


def some(steps: Sequence[int]) -> str:
    """`2, 3, 4, ...`"""
    return ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "") if steps else "(not logged)"


def always(constant: Mapping[str, float | None]) -> str:
    """`judge always 0, format always None`: None is "no opinion"."""
    shown = {name: "None" if value is None or math.isnan(value) else f"{value:.3g}" for name, value in constant.items()}
    return ", ".join(f"{name} always {value}" for name, value in shown.items())
