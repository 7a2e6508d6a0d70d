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
    """The share of worked completions, and the share of right ones among the worked and among the bare, each where
    there are enough of them.

    >>> rows = [{"response": text, "extracted": text[-1], "expected": "7"} for text in ("3+4=7", "3+4=6", "7", "8")]
    >>> rates(rows * 10)
    {'worked': 0.5, 'right_if_worked': 0.5, 'right_if_bare': 0.5}
    """
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        is_right = bool(row["expected"]) and same_answer(row["extracted"], row["expected"])
        right[is_worked(row["response"])].append(is_right)
    both = len(right[True]) + len(right[False])
    found = {"worked": len(right[True]) / both} if both else {}
    for name, kind in (("right_if_worked", right[True]), ("right_if_bare", right[False])):
        if len(kind) >= LEAST:
            found[name] = sum(kind) / len(kind)
    return found


def ways(completions: Path, steps: int) -> dict[str, dict[str, float]]:
    """`rates` of the first and the last STEPS steps of a completions.jsonl; nothing where either has none."""
    ends: tuple[list[Any], list[Any]] = [], []
    for row in each_jsonl(completions) if steps >= 2 * STEPS else ():
        if row["step"] <= STEPS or row["step"] > steps - STEPS:
            ends[row["step"] > STEPS].append(row)
    first, last = map(rates, ends)
    names = [name for name in first if name in last]  # what is too rare at one end is told of neither
    return {end: {name: found[name] for name in names} for end, found in (("first", first), ("last", last)) if names}


def ways_line(found: dict[str, dict[str, float]], steps: int) -> str:
    """For the end of a run.

    >>> first, last = ({"worked": w, "right_if_worked": 0.7, "right_if_bare": 0.2} for w in (0.4, 0.8))
    >>> print(ways_line({"first": first, "last": last}, 80))
    sampled answers, steps 1-10 -> 71-80: worked out 40% -> 80%; right if so 70% -> 70%; right if not 20% -> 20%
    """
    words = {"worked": "worked out", "right_if_worked": "right if so", "right_if_bare": "right if not"}
    first, last = found["first"], found["last"]
    told = (f"{words[name]} {first[name]:.0%} -> {last[name]:.0%}" for name in first)
    return f"sampled answers, steps 1-{STEPS} -> {steps - STEPS + 1}-{steps}: {'; '.join(told)}"
