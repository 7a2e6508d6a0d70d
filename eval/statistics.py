"""What n right answers of N are worth: intervals, pass@k, maj@k, and the paired comparison of two evaluations.

Everything here is exact arithmetic on counts, except the 95% intervals, which are approximate; each names its source.
The unit is the problem: the intervals are about a sample of problems, never of answers or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards import parse_number, same_number

Z = 1.959963984540054  # the normal distribution's 97.5% point
Interval = tuple[float, float]


def wilson_interval(successes: float, n: float) -> Interval:
    """95% interval of a share (Wilson 1927): unlike the normal one it stays within 0..1 and is not empty at 0 or n.

    >>> [round(bound, 4) for bound in wilson_interval(0, 10)]
    [0.0, 0.2775]
    >>> [round(bound, 4) for bound in wilson_interval(50, 100)]
    [0.4038, 0.5962]
    """
    share = successes / n
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of values in 0..1, one for each problem: Wilson's at the effective sample size, that of
    right-or-wrong answers whose mean would vary as much (Franco, Little, Louis and Slud 2019, Journal of Survey
    Statistics and Methodology 7). Where the values do not vary at all it is their number.

    >>> mean_interval([1, 0, 0, 1]) == wilson_interval(2, 4)
    True
    >>> [round(bound, 3) for bound in mean_interval([0.4, 0.6] * 50)]
    [0.48, 0.52]
    """
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / n
    size = n * mean * (1 - mean) / variance if variance > 1e-12 else n
    return wilson_interval(mean * size, size)


# --- several samples of each problem


def sizes(n: int) -> list[int]:
    """The values of k for which pass@k and maj@k are reported with n samples.

    >>> sizes(1), sizes(8), sizes(10)
    ([1], [1, 2, 4, 8], [1, 2, 4, 8, 10])
    """
    return sorted({*(2**i for i in range(n.bit_length())), n}) if n else []


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, contain one of the `right` ones: the unbiased
    estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    assert 0 <= right <= n and 1 <= k <= n
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def agreeing(answers: Sequence[str | None]) -> list[list[int]]:
    """The positions of the answers that agree on a number, group by group: the largest group first, ties by first
    occurrence. An answer that is not a number does not vote.

    >>> agreeing(["$7", "1,000", None, "seven", "1000", "", "1000.00"])
    [[1, 4, 6], [0]]
    """
    groups: list[list[int]] = []
    for at, answer in enumerate(answers):
        if answer is None or parse_number(answer) is None:
            continue
        group = next((group for group in groups if same_number(answers[group[0]] or "", answer)), None)
        if group:
            group.append(at)
        else:
            groups.append([at])
    return sorted(groups, key=len, reverse=True)


def maj_at_k(n: int, right: int, wrong: Sequence[int], k: int) -> float:
    """Probability that the number on which most of k samples agree is right (self-consistency, Wang et al. 2022,
    arXiv 2203.11171): exact, over all ways to draw k of the n samples without replacement.

    `right` samples have the right answer, and `wrong` counts those of each wrong number; the others have none and do
    not vote. Among t numbers that tie the right one wins with probability 1 / t, as it does if the first of the tied
    numbers is taken. Without any vote the answer is wrong.

    >>> maj_at_k(3, 1, [1, 1], 3), maj_at_k(3, 2, [1], 3)  # a tie of three; two against one
    (0.3333333333333333, 1.0)
    >>> maj_at_k(4, 2, [], 1), maj_at_k(4, 2, [], 3)  # two samples without an answer
    (0.5, 1.0)
    """
    assert 1 <= k <= n and right + sum(wrong) <= n
    return _majority(n, right, tuple(sorted(wrong)))[k - 1]


@lru_cache(maxsize=4096)  # problems are many, patterns of votes few
def _majority(n: int, right: int, wrong: tuple[int, ...]) -> list[float]:
    """maj@k for k = 1..n.

    For each count r of right votes: in how many ways do the others fill the rest of k with no number above r, and t
    numbers at r? It is a product of polynomials, one for each wrong number, in the size drawn and in t.
    """
    silent = n - right - sum(wrong)
    wins = [Fraction(0)] * (n + 1)  # by k: ways to draw k in which the right number wins, ties in parts
    for r in range(1, right + 1):
        ways = {(drawn, 0): math.comb(silent, drawn) for drawn in range(silent + 1)}
        for count in wrong:
            longer: dict[tuple[int, int], int] = {}
            for (drawn, ties), number in ways.items():
                for x in range(min(count, r) + 1):
                    at = (drawn + x, ties + (x == r))
                    longer[at] = longer.get(at, 0) + number * math.comb(count, x)
            ways = longer
        for (drawn, ties), number in ways.items():
            wins[drawn + r] += Fraction(number * math.comb(right, r), ties + 1)
    return [float(wins[k] / math.comb(n, k)) for k in range(1, n + 1)]


# --- two evaluations of the same problems


def mcnemar(b: int, c: int) -> float:
    """Two-sided p-value of McNemar's exact test: if neither were better, the b + c problems on which two differ would
    fall to either like a fair coin (McNemar 1947; the binomial test at one half).

    >>> mcnemar(0, 0), mcnemar(5, 0), mcnemar(8, 2) == mcnemar(2, 8)
    (1.0, 0.0625, True)
    """
    n, fewer = b + c, min(b, c)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def mean_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The mean of second minus first, one number of each for each problem, and its 95% interval: normal, from the
    differences' standard error. For shares and means of many problems.

    >>> [round(bound, 3) for bound in mean_difference([0.0, 0.5] * 50, [0.5, 0.5] * 50)]
    [0.25, 0.201, 0.299]
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((each - mean) ** 2 for each in differences) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Paired:
    """The second of two evaluations against the first: problems right in both, in the second alone (`won`), in the
    first alone (`lost`), in neither."""

    both: int
    won: int
    lost: int
    neither: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """
        >>> Paired.of([True, False, False, True], [True, True, True, False])
        Paired(both=1, won=2, lost=1, neither=0)
        """
        pairs = list(zip(first, second, strict=True))
        return Paired(*(pairs.count(kind) for kind in ((True, True), (False, True), (True, False), (False, False))))

    @property
    def problems(self) -> int:
        return self.both + self.won + self.lost + self.neither

    @property
    def difference(self) -> float:
        """The second's accuracy minus the first's."""
        return (self.won - self.lost) / self.problems

    @property
    def p(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar(self.won, self.lost)

    @property
    def interval(self) -> Interval:
        """95% interval of the difference: Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10. Wilson's
        intervals of both accuracies, squared and added, minus a term for their correlation.

        >>> [round(bound, 3) for bound in Paired(both=59, won=6, lost=16, neither=80).interval]
        [-0.119, -0.005]
        """
        n = self.problems
        old, new = self.both + self.lost, self.both + self.won
        (old_low, old_high), (new_low, new_high) = wilson_interval(old, n), wilson_interval(new, n)
        below = (new / n - new_low, old_high - old / n)
        above = (new_high - new / n, old / n - old_low)
        down, up = (math.sqrt(max(0.0, x * x - 2 * self._correlation * x * y + y * y)) for x, y in (below, above))
        return self.difference - down, self.difference + up

    @property
    def _correlation(self) -> float:
        """Phi of the fourfold table, corrected for continuity where it is positive."""
        old, new, n = self.both + self.lost, self.both + self.won, self.problems
        margins = old * (n - old) * new * (n - new)
        excess: float = self.both * self.neither - self.won * self.lost
        if excess > 0:
            excess = max(0.0, excess - n / 2)
        return excess / math.sqrt(margins) if margins else 0.0

    def summary(self) -> dict[str, float]:
        """As a record."""
        low, high = self.interval
        return {
            "problems": self.problems,
            "won": self.won,
            "lost": self.lost,
            "difference": self.difference,
            "difference_low": low,
            "difference_high": high,
            "mcnemar_p": self.p,
        }
