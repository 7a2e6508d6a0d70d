"""From runs to lines: which runs share a line, and what of a log is drawn along it.

A number that was NaN or infinite is null in a log, and a gap in its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_core.doctor.readlog import Run, read_run
from sft_core.config import FREE_ON_RESUME

# A quantity of a log line; None where the line has no such field.
Value = Callable[[dict[str, Any]], float | None]


def logged(*names: str) -> Value:
    """The sum of these fields.

    >>> logged("a", "b")({"a": 1, "b": 2}), logged("a")({"a": None}), logged("a")({})
    (3, nan, None)
    """

    def value(line: dict[str, Any]) -> float | None:
        if not all(name in line for name in names):
            return None
        numbers = [line[name] for name in names]
        return math.nan if None in numbers else sum(numbers)

    return value


@dataclass(frozen=True)
class Panel:
    """One quantity. `band`: lowest and highest of an interval around it."""

    title: str
    unit: str
    value: Value
    kind: str = "train"  # which log lines it is in; else: eval
    band: tuple[Value, Value] | None = None
    share: bool = False  # of 1; shown as a percentage
    setting: bool = False  # not noisy, so not averaged
    reference: bool = False  # means nothing without --beta

    @property
    def exact(self) -> bool:
        """Drawn as it is. Evaluations are few, and each is a mean of many answers."""
        return self.setting or self.kind == "eval"

    def points(self, run: Run) -> dict[int, tuple[float, float, float]]:
        """By step: the quantity and its band, which is the quantity itself where there is none."""
        if self.reference and not run.setting("beta"):
            return {}
        found = {}
        for line in run.train if self.kind == "train" else run.eval:
            value = self.value(line)
            low, high = (end(line) for end in self.band) if self.band else (None, None)
            if value is not None:
                found[line["step"]] = (value, value if low is None else low, value if high is None else high)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Line:
    """One run, or runs that differ in their seed alone."""

    label: str
    runs: Sequence[Run]


@dataclass(frozen=True)
class Curve:
    """What is drawn along a line. `each` are the numbers of which `middle` is a running mean."""

    steps: Any
    middle: Any
    low: Any
    high: Any
    each: Any


def curve(line: Line, panel: Panel, window: int) -> Curve | None:
    """One run: its numbers, averaged over `window` log lines, and their own band. Several: at the steps that all of
    them have, the mean over the runs, and the lowest and the highest of them. None: nothing was logged.
    """
    window = 1 if panel.exact else window
    found = [panel.points(run) for run in line.runs]
    steps = [step for step in found[0] if all(step in points for points in found)]
    if not steps:
        return None
    numbers_R3S = np.array([[points[step] for step in steps] for points in found], dtype=float).transpose(0, 2, 1)
    if len(found) == 1:
        middle, low, high = (running_mean(numbers_S, window) for numbers_S in numbers_R3S[0])
        return Curve(steps, middle, low, high, numbers_R3S[0][0])
    means_RS = np.array([running_mean(numbers_3S[0], window) for numbers_3S in numbers_R3S])
    return Curve(steps, means_RS.mean(axis=0), means_RS.min(axis=0), means_RS.max(axis=0), None)


def running_mean(numbers_S: Any, window: int) -> Any:
    """Over `window` numbers around each, and as many of them as there are at both ends.

    >>> running_mean(np.array([0.0, 3.0, 6.0, math.nan, 4.0]), 3).tolist()
    [1.5, 3.0, 4.5, nan, 4.0]
    """
    means_S, reach = np.array(numbers_S), window // 2
    for at in np.flatnonzero(~np.isnan(numbers_S)):
        means_S[at] = np.nanmean(numbers_S[max(0, at - reach) : at + reach + 1])
    return means_S


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, each named as shortly as tells it from the others.

    Raises:
        ValueError: as `read_run`; no training step is logged.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = [read_run(folder, completions=False) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run.train:
            raise ValueError(f"{folder / 'log.jsonl'}: holds no training step yet")
    count = 1
    while len(set(names := ["/".join(folder.resolve().parts[-count:]) for folder in folders])) < len(folders):
        count += 1
    return [Run(name, run.config, run.train, run.eval) for name, run in zip(names, runs, strict=True)]


def one_by_one(runs: Sequence[Run]) -> list[Line]:
    """A line for each run."""
    return [Line(run.name, [run]) for run in runs]


def by_settings(runs: Sequence[Run]) -> list[Line]:
    """A line for all runs that differ only in their seed and in what moves no number."""
    names = sorted({name for run in runs for name in run.config} - {"seed", *FREE_ON_RESUME})
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: run.setting(name) for name in names}
        for name in ("model", "adapter_path"):  # a start that has the seed in its name, as runs/sft-42/final
            settings[name] = re.sub(rf"(?<!\d){run.setting('seed')}(?!\d)", "SEED", str(settings.get(name)))
        groups.setdefault(repr(settings), []).append(run)
    return [Line(_label(group), group) for group in groups.values()]


def _label(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    stems = {re.sub(rf"[-_.]*(seed)?[-_.]*{run.setting('seed')}$", "", run.name) for run in runs}
    stem = stems.pop() if len(stems) == 1 else runs[0].name
    return f"{stem}, seeds {', '.join(str(run.setting('seed')) for run in runs)}".removeprefix(", ")
