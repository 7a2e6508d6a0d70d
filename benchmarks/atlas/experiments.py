"""The table of experiments, experiments.yaml, as objects."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.atlas.records import AGAIN, BASELINE, TRL

TABLE = Path(__file__).with_name("experiments.yaml")
REWARDS = "benchmarks.atlas.rewards"  # R in the table
OF_ALL = "--eval_problems 256 --eval_samples 4 --eval_every 0 --show_every 0 --log_every 1 --progress False"
SEEDS = (1, 2, 3, 4, 5)
OTHER_SEEDS = (6, 7, 8, 9, 10)  # `seeds_of` says whose


@dataclass(frozen=True)
class Task:
    """What a model is to learn from which start, and the flags of its baseline."""

    name: str
    about: str
    start: str  # the kind of model (starts.py)
    flags: str
    beside_trl: bool = False


@dataclass(frozen=True)
class Experiment:
    """What is changed, on which task, to answer which question."""

    task: str
    name: str
    question: str
    start: str  # the task's
    base: tuple[str, ...]  # the task's flags of grpo_core.train
    change: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        """All of a run's, but for its model, its seed and its folder."""
        return [flag.replace("R:", f"{REWARDS}:") for flag in (*self.base, *OF_ALL.split(), *self.change)]

    @property
    def label(self) -> str:
        return f"{self.task}/{self.name}"


@dataclass(frozen=True)
class Question:
    """What experiments of one task are to tell: what a paper claims, and what was expected before they ran."""

    name: str
    task: str
    paper: str
    predicted: str


@dataclass(frozen=True)
class Cell:
    """An experiment with a seed: one run."""

    experiment: Experiment
    seed: int

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...]]:
        """Tells one run from another in the records: a changed flag makes another run of it."""
        return self.experiment.task, self.experiment.name, self.seed, tuple(self.experiment.flags)


def experiments(table: Path = TABLE) -> list[Experiment]:
    """All of them, in the table's order, each task's baseline before its changes and its rerun behind them.

    Raises:
        ValueError: two of one task have the same name.
    """
    read = yaml.safe_load(table.read_text())
    found = []
    for task in tasks(table):
        base = (task.start, tuple(shlex.split(task.flags)))
        found.append(Experiment(task.name, BASELINE, BASELINE, *base, ()))
        for each in read["experiments"]:
            if each["task"] == task.name:
                for name, flags in each["runs"].items():
                    found.append(Experiment(task.name, str(name), each["question"], *base, tuple(shlex.split(flags))))
        found.append(Experiment(task.name, AGAIN, BASELINE, *base, ()))
        found += [Experiment(task.name, TRL, TRL, *base, ())] if task.beside_trl else []
    labels = [experiment.label for experiment in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{table.name}: {label} is there twice")
    return found


def tasks(table: Path = TABLE) -> list[Task]:
    """All of them, in the table's order."""
    return [Task(name, **about) for name, about in yaml.safe_load(table.read_text())["tasks"].items()]


def questions(table: Path = TABLE) -> list[Question]:
    """All of them, in the table's order."""
    read = yaml.safe_load(table.read_text())["experiments"]
    return [Question(each["question"], each["task"], each["paper"], each["predicted"]) for each in read]


def cells(chosen: Sequence[Experiment], seeds: int) -> Iterator[Cell]:
    """Their runs: the first seed of all, then the second of all, so that what is cut short is still balanced."""
    for place in range(seeds):
        for experiment in chosen:
            for named in seeds_of(experiment):
                yield Cell(experiment, named[place])


def seeds_of(experiment: Experiment) -> tuple[tuple[int, ...], ...]:
    """SEEDS, for all but two: the rerun has others, and TRL both, for a small difference is to be told from none."""
    return {AGAIN: (OTHER_SEEDS,), TRL: (SEEDS, OTHER_SEEDS)}.get(experiment.name, (SEEDS,))


def named(names: Sequence[str], known: Sequence[Experiment]) -> list[Experiment]:
    """Those of these tasks, and these experiments (`task/name`); all where no name is given.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in {each.task for each in known} | {each.label for each in known}:
            tasks = ", ".join(dict.fromkeys(each.task for each in known))
            raise ValueError(f"{name!r}: neither a task ({tasks}) nor an experiment such as {known[1].label!r}")
    return [each for each in known if not names or each.task in names or each.label in names]
