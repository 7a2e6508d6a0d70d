"""pass@k, maj@k, the paired test and the intervals, against enumeration, scipy and published figures."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy
import pytest

from eval.statistics import (
    Interval,
    Paired,
    agreeing,
    maj_at_k,
    mcnemar,
    mean_interval,
    pass_at_k,
    sizes,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats", reason="pip install '.[test]'")

RIGHT, SILENT = 0, -1  # answers as numbers: the right one, none; others are wrong

# Samples of one problem: ties, missing answers, nothing right, all right, a wrong majority.
PATTERNS = [
    (0,),
    (-1, -1),
    (0, 1),
    (0, 0, 1, 1),
    (0, 1, 1, -1),
    (0, 1, 2, 3, 4),
    (0, 0, 1, 1, 2, 2),
    (0, 0, 0, 1, 1, -1, -1),
    (0, 0, 1, 1, 1, 2, 2),
    (1, 1, 2, -1, -1, -1, 3),
    (0, 0, 0, 0, 0, 0),
    (0, 1, -1, -1, -1, -1, -1, -1),
]


def counted(answers: Sequence[int]) -> tuple[int, int, list[int]]:
    """n, the right ones, and those of each wrong number."""
    wrong = Counter(answer for answer in answers if answer > 0)
    return len(answers), answers.count(RIGHT), list(wrong.values())


def worth(drawn: Sequence[int]) -> float:
    """The right answer's chance among those that most of the drawn samples have."""
    counts = Counter(answer for answer in drawn if answer != SILENT)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (RIGHT in best) / len(best) if best else 0.0


@pytest.mark.parametrize("answers", PATTERNS)
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(answers: tuple[int, ...]) -> None:
    n, right, _ = counted(answers)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(RIGHT in subset for subset in subsets) / len(subsets))


@pytest.mark.parametrize("answers", PATTERNS)
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_shared(answers: tuple[int, ...]) -> None:
    n, right, wrong = counted(answers)
    for k in range(1, n + 1):
        assert maj_at_k(n, right, wrong, k) == pytest.approx(fmean(map(worth, itertools.combinations(answers, k))))


@pytest.mark.parametrize("answers", [answers for answers in PATTERNS if len(answers) <= 6])
def test_sharing_a_tie_is_taking_the_number_that_came_first(answers: tuple[int, ...]) -> None:
    n, right, wrong = counted(answers)
    for k in range(1, n + 1):
        wins = []
        for drawn in itertools.permutations(answers, k):
            spoken = [answer for answer in drawn if answer != SILENT]
            wins.append(bool(spoken) and Counter(spoken).most_common(1)[0][0] == RIGHT)  # of equals the first one met
        assert maj_at_k(n, right, wrong, k) == pytest.approx(fmean(wins))


def test_of_many_samples_pass_at_k_is_chens_product_and_maj_at_1_is_the_share_of_right_ones() -> None:
    for n, right in ((200, 3), (200, 150), (64, 0), (64, 64)):
        for k in sizes(n):
            product = numpy.prod(1.0 - k / numpy.arange(n - right + 1, n + 1)) if n - right >= k else 0.0
            assert pass_at_k(n, right, k) == pytest.approx(1.0 - product, abs=1e-12)  # their code, figure 3
    assert maj_at_k(64, 20, [1] * 30, 1) == pytest.approx(20 / 64)
    assert maj_at_k(64, 20, [1] * 30, 64) == 1.0
    assert maj_at_k(64, 1, [1] * 63, 32) == pytest.approx(1 / 64)  # by symmetry


def test_numbers_that_are_equal_are_one_vote_however_they_are_written() -> None:
    answers = ["8", "1,000", None, "$1000.00", "", "1000", "eight", "8.0", "-8"]
    for order in itertools.islice(itertools.permutations(answers), 0, None, 9973):
        groups = agreeing(order)
        assert list(map(len, groups)) == [3, 2, 1] and all(group == sorted(group) for group in groups)
    assert agreeing(["5", "0", "0.00", "-0", "5"]) == [[1, 2, 3], [0, 4]]  # 0 is a number like any other
    assert agreeing(["5", "4", "4", "5"]) == [[0, 3], [1, 2]]  # of equals the one that came first


# --- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons_as_tabulated(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_intervals_ends_are_where_the_score_test_just_rejects() -> None:
    for n in (1, 7, 500):
        for successes in range(0, n + 1, max(1, n // 7)):
            low, high = wilson_interval(successes, n)
            share = successes / n
            assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and low < high
            for p in (low, high):  # (share - p)^2 = z^2 p (1 - p) / n
                assert (share - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-9)


def test_the_mean_of_right_or_wrong_has_wilsons_interval() -> None:
    for n, right in ((1, 0), (5, 5), (7, 3), (200, 199)):
        values = [1.0] * right + [0.0] * (n - right)
        assert mean_interval(values) == pytest.approx(wilson_interval(right, n))


def test_the_interval_of_pass_at_k_holds_its_true_mean_in_95_of_100_evaluations() -> None:
    generator = numpy.random.default_rng(0)
    for k, a, b in ((1, 0.5, 0.5), (4, 1.0, 3.0), (2, 8.0, 8.0)):
        chance_of_each = generator.beta(a, b, size=200_000)  # a problem's own chance to be answered right
        truth = fmean(1 - (1 - chance_of_each) ** k)
        held = 0
        for _ in range(400):
            right = generator.binomial(8, generator.choice(chance_of_each, size=60))
            low, high = mean_interval([pass_at_k(8, int(c), k) for c in right])
            held += low <= truth <= high
        assert 0.92 <= held / 400 <= 0.985


# --- pairs


def test_mcnemars_p_is_the_exact_binomial_test() -> None:
    for b, c in [*itertools.product(range(9), range(9)), (300, 12), (40, 61), (700, 650)]:
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("table", "interval"),
    [  # the R package contingencytables (Fagerland, Lydersen and Laake 2017), its test of the data of Cavo et al. 2012
        (Paired(both=59, won=6, lost=16, neither=80), (-0.1186, -0.0046)),
    ],
)
def test_the_interval_of_a_paired_difference_is_newcombes_as_published(table: Paired, interval: Interval) -> None:
    assert table.interval == pytest.approx(interval, abs=5e-5)
    swapped = Paired(table.both, table.lost, table.won, table.neither)
    assert swapped.interval == pytest.approx((-interval[1], -interval[0]), abs=5e-5)
    assert swapped.p == table.p


@pytest.mark.parametrize(
    "chances", [(0.25, 0.25, 0.25, 0.25), (0.5, 0.1, 0.2, 0.2), (0.1, 0.6, 0.05, 0.25), (0.75, 0.1, 0.05, 0.1)]
)
def test_the_interval_of_a_paired_difference_holds_it_in_95_of_100_tables(chances: Sequence[float]) -> None:
    n, truth, held = 25, chances[1] - chances[2], 0.0
    for both, won, lost in itertools.product(range(n + 1), repeat=3):
        if both + won + lost <= n:
            counts = (both, won, lost, n - both - won - lost)
            low, high = Paired(*counts).interval
            ways = math.factorial(n) / math.prod(map(math.factorial, counts))
            if low <= truth <= high:
                held += ways * math.prod(p**count for p, count in zip(chances, counts, strict=True))
    assert 0.93 <= held <= 0.995


def test_the_interval_of_a_paired_difference_stays_between_minus_one_and_one() -> None:
    for table in (Paired(0, 5, 0, 0), Paired(0, 0, 5, 0), Paired(5, 0, 0, 0), Paired(0, 0, 0, 5), Paired(0, 3, 3, 0)):
        low, high = table.interval
        assert -1 <= low <= table.difference <= high <= 1 and low < high
