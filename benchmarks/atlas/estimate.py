"""What the records of the atlas say: each experiment against the baseline of its task, with intervals and verdicts.

Accuracy is that of the samples on held-out problems after training; `crossed` gives its intervals. Everything else is
one number for each run (`SCALARS`), compared by start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.atlas.intervals import (
    Estimate,
    benjamini_hochberg,
    crossed,
    crossed_unpaired,
    holm,
    paired,
    unpaired,
)
from benchmarks.atlas.records import AGAIN, BASELINE, CHECKS, TRL, Experiment, Run, Start, band, experiments

FOUND = 0.05  # a difference with a q-value up to this one is called real
LAST = 1 / 5  # the share of a curve that stands for its end


@dataclass(frozen=True)
class Scalar:
    """A number of a run. `of` takes the run and its task's level of accuracy; NaN where the run has none."""

    of: Callable[[Run, float], float]
    unit: str  # "share": shown as a percentage, its differences in points; else what is counted


def _mean(name: str) -> Callable[[Run, float], float]:
    """Over the whole training curve."""
    return lambda run, level: _known_mean(run.curve.get(name))


def _end(name: str) -> Callable[[Run, float], float]:
    """Over the last fifth of the training curve's points."""

    def of(run: Run, level: float) -> float:
        values_C = run.curve.get(name)
        return math.nan if values_C is None else _known_mean(values_C[-math.ceil(LAST * len(values_C)) :])

    return of


def _change(name: str) -> Callable[[Run, float], float]:
    """The end of the training curve less its first point."""
    return lambda run, level: _end(name)(run, level) - _known_mean(run.curve.get(name, np.array([]))[:1])


def _known_mean(values_C: Any) -> float:
    known = values_C[~np.isnan(values_C)] if values_C is not None else np.array([])
    return float(known.mean()) if len(known) else math.nan


def _steps_to(run: Run, level: float) -> float:
    """The step that ends the first point of the training curve at the level or above it."""
    reached = np.flatnonzero(run.curve["accuracy"] >= level)
    return float(run.curve["step"][reached[0]]) if len(reached) else math.nan


# The training curve is of training samples, a point the mean of five steps.
SCALARS = {
    "greedy": Scalar(lambda run, level: float(run.after.greedy_P.mean()), "share"),  # held out, after training
    "AUC": Scalar(_mean("accuracy"), "share"),  # area under the training curve, divided by its length
    "steps": Scalar(_steps_to, "steps"),
    "entropy": Scalar(_end("entropy"), "nats"),
    "entropy change": Scalar(_change("entropy"), "nats"),
    "length": Scalar(_end("length"), "tokens"),
    "length change": Scalar(_change("length"), "tokens"),
    "right length": Scalar(_end("right_length"), "tokens"),
    "wrong length": Scalar(_end("wrong_length"), "tokens"),
    "wrong length change": Scalar(_change("wrong_length"), "tokens"),
    "held-out right length": Scalar(lambda run, level: run.after.right_length, "tokens"),
    "held-out wrong length": Scalar(lambda run, level: run.after.wrong_length, "tokens"),
    "truncated": Scalar(_end("truncated"), "share"),
    "held-out truncated": Scalar(lambda run, level: run.after.truncated, "share"),
    "flat": Scalar(_mean("flat"), "share"),  # groups that teach nothing
    "clipped": Scalar(_mean("clipped"), "share"),
    "kl": Scalar(_end("kl"), "nats"),
    "gradient": Scalar(_mean("gradient"), "norm"),
    "seconds": Scalar(lambda run, level: run.seconds, "seconds"),
}


def scalar(name: str) -> Scalar:
    """One of SCALARS; `rewards/NAME` and any other curve is its end."""
    return SCALARS.get(name) or Scalar(_end(name), "")


@dataclass(frozen=True)
class Result:
    """An experiment's estimates. `difference`: to the baseline; `q`, `holm`: where it is one of the comparisons."""

    experiment: Experiment
    accuracy: Estimate
    gain: Estimate  # after training minus before
    difference: Estimate | None = None
    q: float | None = None
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `unclear` (its own interval excludes 0, but it is one of many) or `none` found."""
        if self.difference is None or not self.difference.clear:
            return "none"
        if self.q is not None and self.q > FOUND:
            return "unclear"
        return "better" if self.difference.value > 0 else "worse"


@dataclass(frozen=True)
class Study:
    """All results, by task and experiment, and the level of accuracy that `steps` counts to, by task."""

    results: dict[tuple[str, str], Result]
    levels: dict[str, float]

    @property
    def runs(self) -> list[Run]:
        return [run for result in self.results.values() for run in result.experiment.runs]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.results))

    def of(self, task: str, question: str | None = None) -> list[Result]:
        """The results of a task; of one question of it with the baseline before them."""
        found = [result for (of, _), result in self.results.items() if of == task]
        if question is None:
            return found
        return [each for each in found if each.experiment.name == BASELINE or each.experiment.question == question]

    def of_all_seeds(self, task: str) -> Experiment:
        """Its baseline with the runs of the rerun: what TRL is compared with."""
        return of_all_seeds((each.experiment for each in self.results.values()), task)

    def values(self, experiment: Experiment, name: str) -> Any:
        """A scalar of each run, (S,)."""
        level = self.levels.get(experiment.task, math.nan)
        return np.array([scalar(name).of(run, level) for run in experiment.runs])

    def between(self, first: Experiment, second: Experiment, name: str) -> Estimate | None:
        """`second` minus `first` in a scalar. None: too few runs to tell, or for steps, a run that never got there."""
        values = [self.values(each, name) for each in (first, second)]
        if name == "steps" and any(np.isnan(each).any() for each in values):
            return None  # the runs that got there are not a fair sample of all
        known = [
            each.of([start for start, value in zip(each.starts, at, strict=True) if not math.isnan(value)])
            for each, at in zip((first, second), values, strict=True)
        ]
        if len(shared := _shared(*known)) > 1:
            return paired(self.values(second.of(shared), name) - self.values(first.of(shared), name))
        if min(len(each.runs) for each in known) < 2:
            return None
        return unpaired(*(self.values(each, name) for each in known))


def _shared(first: Experiment, second: Experiment) -> list[Start]:
    return sorted(set(first.starts) & set(second.starts))


def difference(first: Experiment, second: Experiment) -> Estimate:
    """`second` minus `first` in held-out accuracy: by start and problem where both began from the same ones."""
    if len(shared := _shared(first, second)) > 1:
        return crossed(second.of(shared).after_SP - first.of(shared).after_SP)
    return crossed_unpaired(first.after_SP, second.after_SP)


def study(runs: Sequence[Run]) -> Study:
    """The results of all experiments of which two runs are there. What is compared with what is fixed here, not by what
    came out: every experiment but the checks is one of the comparisons that q-values count. A control is no comparison:
    that it differs is known before, and would only make the q-values of the others smaller."""
    named = [each for each in experiments(runs) if len(each.runs) > 1]
    baselines = {each.task: each for each in named if each.name == BASELINE}
    results = {}
    for each in named:
        result = Result(each, crossed(each.after_SP), crossed(each.after_SP - each.before_SP))
        if each.task in baselines and each.name != BASELINE:
            against = of_all_seeds(named, each.task) if each.name == TRL else baselines[each.task]
            result = replace(result, difference=difference(against, each))
        results[each.task, each.name] = result
    compared = {key: found.difference.p for key, found in results.items() if found.difference and key[1] not in CHECKS}
    p = list(compared.values())
    for key, q, strict in zip(compared, benjamini_hochberg(p), holm(p), strict=True):
        results[key] = replace(results[key], q=q, holm=strict)
    return Study(results, {task: _level(each) for task, each in baselines.items()})


def of_all_seeds(named: Iterable[Experiment], task: str) -> Experiment:
    """A task's baseline with the runs of its rerun: twice the seeds, beside which TRL ran."""
    both = [each for each in named if each.task == task and each.name in (BASELINE, AGAIN)]
    return Experiment(tuple(sorted((run for each in both for run in each.runs), key=lambda run: run.start)))


def _level(baseline: Experiment) -> float:
    """Half-way between the baseline's first point and its last ones, to the nearest 5%."""
    first = float(np.mean([run.curve["accuracy"][0] for run in baseline.runs]))
    last = float(np.mean([_end("accuracy")(run, math.nan) for run in baseline.runs]))
    return round((first + last) / 2 * 20) / 20


@dataclass(frozen=True)
class Agreement:
    """Two experiments' training curves: the share of the points of one's mean that lies within the other's band, which
    runs from the lowest to the highest seed."""

    first_in_second: float
    second_in_first: float


def agreement(first: Experiment, second: Experiment, quantity: str = "accuracy") -> Agreement | None:
    """None: one of them has not logged this."""
    bands = band(first, quantity), band(second, quantity)
    if bands[0] is None or bands[1] is None:
        return None
    return Agreement(bands[1].holds(bands[0]), bands[0].holds(bands[1]))
