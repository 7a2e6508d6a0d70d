"""95% intervals for a few seeds and many problems, and what many comparisons at once cost.

Seeds and problems are both samples: of the seeds that could have been drawn, and of the problems that a task can make.
An interval over the problems alone is too narrow by what a seed moves, one over five seeds alone treats these problems
as all there are. Here both are random and crossed, for every seed answers every problem:

    y[s, p] = mean + seed[s] + problem[p] + rest[s, p]

The variance of the mean of all y is put together from mean squares (Cornfield and Tukey 1956, Annals of Mathematical
Statistics 27, 907-949), its degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2, 110-114).

Shapes: S seeds of the first sample, R seeds of the second, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Part = tuple[float, int]  # an independent estimate that adds to the variance of the mean, and its degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, with its 95% interval. `p`: two-sided, that it is 0."""

    value: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def crossed(values_SP: Any) -> Estimate:
    """The mean over seeds and problems: of accuracies, or of paired differences.

    var(mean) = (MS_seeds + MS_problems - MS_rest) / (S P). As it is a difference it can come out too small by chance,
    so it is never below what seeds alone or problems alone make it: without any variance between problems this is the
    t-interval of the S means.
    """
    seeds, problems = values_SP.shape
    n = seeds * problems
    between_seeds = (problems * _variance(values_SP.mean(axis=1)) / n, seeds - 1)
    between_problems = (seeds * _variance(values_SP.mean(axis=0)) / n, problems - 1)
    return _interval(
        float(values_SP.mean()),
        [between_seeds, between_problems, (-_rest(values_SP) / n, (seeds - 1) * (problems - 1))],
        [between_seeds],
        [between_problems],
    )


def crossed_unpaired(first_SP: Any, second_RP: Any) -> Estimate:
    """The mean of `second` minus that of `first`, which answer the same problems with other seeds.

    The differences of the problems' means hold what the problems add, and the rest of both samples, which the seeds'
    means hold as well: so it is taken off once. Without any variance between problems this is Welch's interval.
    """
    parts: list[Part] = []
    rests: list[Part] = []
    for values_XP in (first_SP, second_RP):
        seeds, problems = values_XP.shape
        parts.append((_variance(values_XP.mean(axis=1)) / seeds, seeds - 1))
        rests.append((-_rest(values_XP) / values_XP.size, (seeds - 1) * (problems - 1)))
    difference_P = second_RP.mean(axis=0) - first_SP.mean(axis=0)
    between_problems = (_variance(difference_P) / len(difference_P), len(difference_P) - 1)
    return _interval(float(difference_P.mean()), [*parts, between_problems, *rests], parts, [between_problems])


def paired(difference_S: Any) -> Estimate:
    """The mean of one number for each seed, by Student's t.

    >>> import numpy as np
    >>> found = paired(np.array([1.0, 2.0, 3.0]))
    >>> found.value, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    return _interval(float(difference_S.mean()), [(_variance(difference_S) / len(difference_S), len(difference_S) - 1)])


def unpaired(first_S: Any, second_R: Any) -> Estimate:
    """The mean of `second` minus that of `first`, of other seeds: Welch's (1947, Biometrika 34, 28-35)."""
    parts = [(_variance(values) / len(values), len(values) - 1) for values in (first_S, second_R)]
    return _interval(float(second_R.mean() - first_S.mean()), parts)


def _variance(values: Any) -> float:
    return float(values.var(ddof=1))


def _rest(values_SP: Any) -> float:
    """The mean square of what neither seed nor problem explains, samples' noise included."""
    rest_SP = values_SP - values_SP.mean(axis=1, keepdims=True) - values_SP.mean(axis=0) + values_SP.mean()
    seeds, problems = values_SP.shape
    return float((rest_SP**2).sum() / ((seeds - 1) * (problems - 1)))


def satterthwaite(parts: Sequence[Part]) -> tuple[float, float]:
    """The sum of the parts, and the degrees of freedom of a chi-square whose spread, relative to its mean, is the same.

    >>> satterthwaite([(2.0, 4)]), satterthwaite([(1.0, 4), (1.0, 4)])
    ((2.0, 4.0), (2.0, 8.0))
    """
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    return total, total**2 / spread if spread else math.inf


def _interval(value: float, parts: Sequence[Part], *floors: Sequence[Part]) -> Estimate:
    """Student's t with the variance that is the largest of the parts' and the floors'. Where nothing varies it is of no
    width: all runs were equal."""
    from scipy.special import stdtr, stdtrit  # Student's t: its distribution function, and the inverse

    variance, freedom = max(satterthwaite(each) for each in (parts, *floors))
    if variance < 1e-24:  # rounding of equal numbers of size 1
        return Estimate(value, value, value, float(abs(value) < 1e-12))
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, 0.975)) * error
    return Estimate(value, value - half, value + half, 2 * float(stdtr(freedom, -abs(value) / error)))


# --- many comparisons


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q-values: to call all differences with q <= 0.05 real is to be wrong about 5% of them on average (Benjamini and
    Hochberg 1995, Journal of the Royal Statistical Society B 57, 289-300).

    >>> benjamini_hochberg([0.04, 0.01, 0.03, 0.5])
    [0.05333333333333334, 0.04, 0.05333333333333334, 0.5]
    """
    found, lowest = [0.0] * len(p), 1.0
    for rank, at in reversed(list(enumerate(sorted(range(len(p)), key=p.__getitem__), start=1))):
        lowest = min(lowest, p[at] * len(p) / rank)
        found[at] = lowest
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: to call all differences with one <= 0.05 real is to be wrong about any of them with a
    probability of 5% at most (Holm 1979, Scandinavian Journal of Statistics 6, 65-70).

    >>> holm([0.04, 0.01, 0.03, 0.5])
    [0.09, 0.04, 0.09, 0.5]
    """
    found, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, p[at] * (len(p) - rank)))
        found[at] = highest
    return found
