"""Did GRPO teach the model to calculate, or to choose the way of answering that was right more often already?

Sampled completions of a run's first and last steps are counted by two questions: does it work the answer out (it holds
an equals sign), and is it right? Where the rates of right answers stay and the share of worked ones rises, the run has
sharpened what was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.evaluate import is_worked
from rewards import same_answer
from rewards.jsonl import each_jsonl

STEPS = 10  # at each end
LEAST = 20  # completions of each kind; fewer make no rate


def rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of worked completions, and the share of right ones among the worked and among the bare; nothing where
    one kind is too rare.

    >>> rows = [{"response": text, "extracted": text[-1], "expected": "7"} for text in ("3+4=7", "3+4=6", "7", "8")]
    >>> rates(rows * 10)
    {'worked': 0.5, 'right_if_worked': 0.5, 'right_if_bare': 0.5}
    """
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        is_right = bool(row["expected"]) and same_answer(row["extracted"], row["expected"])
        right[is_worked(row["response"])].append(is_right)
    worked, bare = right[True], right[False]
    if min(len(worked), len(bare)) < LEAST:
        return {}
    share = len(worked) / (len(worked) + len(bare))
    return {"worked": share, "right_if_worked": sum(worked) / len(worked), "right_if_bare": sum(bare) / len(bare)}


def ways(completions: Path, steps: int) -> dict[str, dict[str, float]]:
    """`rates` of the first and the last STEPS steps of a completions.jsonl; nothing where either has none."""
    ends: tuple[list[Any], list[Any]] = [], []
    for row in each_jsonl(completions) if steps >= 2 * STEPS else ():
        if row["step"] <= STEPS or row["step"] > steps - STEPS:
            ends[row["step"] > STEPS].append(row)
    first, last = map(rates, ends)
    return {"first": first, "last": last} if first and last else {}


def ways_line(found: dict[str, dict[str, float]], steps: int) -> str:
    """For the end of a run.

    >>> first, last = ({"worked": w, "right_if_worked": 0.7, "right_if_bare": 0.2} for w in (0.4, 0.8))
    >>> print(ways_line({"first": first, "last": last}, 80))
    sampled answers, steps 1-10 -> 71-80: worked out 40% -> 80%; right where worked out 70% -> 70%, where not 20% -> 20%
    """
    told = {name: f"{found['first'][name]:.0%} -> {found['last'][name]:.0%}" for name in found["first"]}
    return (
        f"sampled answers, steps 1-{STEPS} -> {steps - STEPS + 1}-{steps}: worked out {told['worked']}; right where "
        f"worked out {told['right_if_worked']}, where not {told['right_if_bare']}"
    )
