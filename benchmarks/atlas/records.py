"""What is read back of `runs.jsonl`: a run with its answers as arrays, and the runs of an experiment as one.

Shapes: S seeds, P problems, C points of a curve. A number that was null is NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Start = tuple[int, str]  # seed and processor: runs of a task with the same one begin with the same weights
BASELINE, AGAIN, SHUFFLED, TRL = "baseline", "baseline again", "shuffled rewards", "TRL"
CHECKS = (BASELINE, AGAIN, SHUFFLED, TRL)  # not changes that are compared with the baseline to find out what they do


@dataclass(frozen=True)
class HeldOut:
    """An evaluation on the held-out problems. Lengths are means over samples, in tokens."""

    greedy_P: Any  # 0 or 1
    sampled_P: Any  # share of the samples that are right
    right_length: float
    wrong_length: float
    truncated: float  # share of the samples

    @staticmethod
    def of(record: Mapping[str, Any]) -> HeldOut:
        greedy_P, sampled_P = (
            np.array([int(c, 36) for c in record[key]], dtype=float) for key in ("greedy", "sampled")
        )
        numbers = [_number(record[key]) for key in ("right_length", "wrong_length", "truncated")]
        return HeldOut(greedy_P, sampled_P / record["samples"], *numbers)


@dataclass(frozen=True)
class Run:
    """One line of the records. `curve`: of training samples, each (C,); a reward's is under `rewards/NAME`."""

    task: str
    experiment: str
    seed: int
    question: str
    change: tuple[str, ...]  # the flags that make it another run than the baseline
    seconds: float  # CPU seconds
    commit: str
    versions: str
    processor: str
    before: HeldOut
    after: HeldOut
    curve: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.task}/{self.experiment}"

    @property
    def start(self) -> Start:
        return self.seed, self.processor

    @staticmethod
    def of(record: Mapping[str, Any]) -> Run:
        curve = dict(record["curve"])
        curve |= {f"rewards/{name}": values for name, values in curve.pop("rewards", {}).items()}
        return Run(
            task=record["task"],
            experiment=record["experiment"],
            seed=record["seed"],
            question=record["question"],
            change=tuple(record["change"]),
            seconds=record["seconds"],
            commit=record["commit"],
            versions=record["versions"],
            processor=record["processor"],
            before=HeldOut.of(record["before"]),
            after=HeldOut.of(record["after"]),
            curve={name: np.array([_number(value) for value in values]) for name, values in curve.items()},
        )


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


@dataclass(frozen=True)
class Experiment:
    """All runs of one experiment, by start."""

    runs: tuple[Run, ...]

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def name(self) -> str:
        return self.runs[0].experiment

    @property
    def question(self) -> str:
        return self.runs[0].question

    @property
    def change(self) -> tuple[str, ...]:
        return self.runs[0].change

    @cached_property
    def starts(self) -> list[Start]:
        return [run.start for run in self.runs]

    @cached_property
    def after_SP(self) -> Any:
        """Accuracy of the samples after training."""
        return np.stack([run.after.sampled_P for run in self.runs])

    @cached_property
    def before_SP(self) -> Any:
        return np.stack([run.before.sampled_P for run in self.runs])

    def of(self, starts: Sequence[Start]) -> Experiment:
        return Experiment(tuple(run for run in self.runs if run.start in starts))


def parsed(lines: Sequence[str]) -> list[Run]:
    """The runs of a `runs.jsonl`."""
    return [Run.of(json.loads(line)) for line in lines if line.strip()]


def read(path: Path) -> list[Run]:
    """The runs of this file."""
    return parsed(path.read_text(encoding="utf-8").splitlines())


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """The runs by experiment, in the order in which each task, and within it each experiment, is first named.

    Raises:
        ValueError: a run is recorded twice, or the runs of a task have not answered the same problems.
    """
    by_task: dict[str, dict[str, dict[Start, Run]]] = {}
    for run in runs:
        starts = by_task.setdefault(run.task, {}).setdefault(run.experiment, {})
        if run.start in starts:
            raise ValueError(f"{run.task}, {run.experiment}, seed {run.seed} on {run.processor}: recorded twice")
        starts[run.start] = run
    for task, named in by_task.items():
        sizes = {
            held.sampled_P.size
            for starts in named.values()
            for run in starts.values()
            for held in (run.before, run.after)
        }
        if len(sizes) > 1:
            raise ValueError(f"{task}: runs with {' and '.join(map(str, sorted(sizes)))} held-out problems")
    return [
        Experiment(tuple(run for _, run in sorted(starts.items())))
        for named in by_task.values()
        for starts in named.values()
    ]


@dataclass(frozen=True)
class Band:
    """A training curve over seeds, each (C,): their mean, the lowest, the highest. NaN where no seed has a number."""

    steps: Any
    mean: Any
    low: Any
    high: Any

    def holds(self, other: Band) -> float:
        """The share of the points of `other`'s mean, at the steps of both, that lie within this band."""
        _, here, there = np.intersect1d(self.steps, other.steps, return_indices=True)
        mean = other.mean[there]
        known = ~np.isnan(self.low[here] + mean)
        inside = (self.low[here] <= mean) & (mean <= self.high[here])
        return float(inside[known].mean()) if known.any() else np.nan


def band(experiment: Experiment, quantity: str) -> Band | None:
    """None: no run has a number of this. Steps that not all runs have are left out."""
    runs = [run for run in experiment.runs if quantity in run.curve]
    if not runs or all(np.isnan(run.curve[quantity]).all() for run in runs):
        return None
    steps = sorted(set.intersection(*(set(run.curve["step"].tolist()) for run in runs)))
    values_SC = np.stack([run.curve[quantity][np.isin(run.curve["step"], steps)] for run in runs])
    masked = np.ma.masked_invalid(values_SC)
    ends = (masked.mean(axis=0), masked.min(axis=0), masked.max(axis=0))
    return Band(np.array(steps), *(np.ma.filled(each, np.nan) for each in ends))
