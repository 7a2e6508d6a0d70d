"""The intervals of the atlas cover what they claim to, with few seeds and many problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.atlas.intervals import (
    Estimate,
    benjamini_hochberg,
    crossed,
    crossed_unpaired,
    holm,
    paired,
    unpaired,
)

stats = pytest.importorskip("scipy.stats", reason="pip install '.[test]'")

REPEATS, SEEDS, PROBLEMS = 400, 5, 64
ENOUGH = (
    0.92,
    0.985,
)  # 95% of 400 has a standard error of 1.1%; Satterthwaite's are a little wide where seeds are equal


def sample(draw: np.random.Generator, seed_std: float, problem_std: float, seeds: int = SEEDS) -> Any:
    """Values around 0 with three sources of noise, (S, P)."""
    parts = [(seed_std, (seeds, 1)), (problem_std, (1, PROBLEMS)), (0.3, (seeds, PROBLEMS))]
    return sum(draw.normal(0, std, shape) if std else np.zeros(shape) for std, shape in parts)


def coverage(interval: Callable[[np.random.Generator], tuple[float, float]]) -> float:
    """How often an interval holds the 0 that is true."""
    draw = np.random.default_rng(0)
    found = [interval(draw) for _ in range(REPEATS)]
    return float(np.mean([low <= 0 <= high for low, high in found]))


def ends(found: Estimate) -> tuple[float, float]:
    return found.low, found.high


@pytest.mark.parametrize(("seed_std", "problem_std"), [(0.0, 0.2), (0.02, 0.2), (0.05, 0.2), (0.1, 0.2), (0.05, 0.0)])
def test_the_interval_over_seeds_and_problems_covers(seed_std: float, problem_std: float) -> None:
    share = coverage(lambda draw: ends(crossed(sample(draw, seed_std, problem_std))))
    assert ENOUGH[0] <= share <= ENOUGH[1]


def test_a_normal_interval_over_problems_and_a_bootstrap_of_seeds_do_not() -> None:
    def over_problems(draw: np.random.Generator) -> tuple[float, float]:
        values_P = sample(draw, 0.05, 0.2).mean(axis=0)
        half = 1.96 * values_P.std(ddof=1) / PROBLEMS**0.5
        return values_P.mean() - half, values_P.mean() + half

    def of_seeds(draw: np.random.Generator) -> tuple[float, float]:
        values_S = sample(draw, 0.05, 0.2).mean(axis=1)
        low, high = np.quantile(values_S[draw.integers(0, SEEDS, (200, SEEDS))].mean(axis=1), [0.025, 0.975])
        return low, high

    assert coverage(over_problems) < ENOUGH[0] and coverage(of_seeds) < ENOUGH[0]


def counted(draw: np.random.Generator, log_odds_P: Any, seeds: int) -> Any:
    """Shares of 4 samples of each problem, runs differing in all problems at once and in each."""
    log_odds_SP = log_odds_P + draw.normal(0, 0.3, (seeds, 1)) + draw.normal(0, 0.5, (seeds, PROBLEMS))
    return draw.binomial(4, 1 / (1 + np.exp(-log_odds_SP))) / 4


@pytest.mark.parametrize("with_starts", [True, False], ids=["paired", "unpaired"])
def test_differences_of_counted_answers_are_covered(with_starts: bool) -> None:
    def interval(draw: np.random.Generator) -> tuple[float, float]:
        log_odds_P = draw.normal(0, 1.5, PROBLEMS)
        first_SP, second_SP = (counted(draw, log_odds_P + draw.normal(0, 0.5, PROBLEMS), SEEDS) for _ in range(2))
        return ends(crossed(second_SP - first_SP) if with_starts else crossed_unpaired(first_SP, second_SP))

    assert ENOUGH[0] <= coverage(interval) <= ENOUGH[1]


def test_problems_without_variance_leave_the_paired_t_interval() -> None:
    values_S = np.array([0.1, 0.3, -0.2, 0.25, 0.05])
    truth = stats.ttest_1samp(values_S, 0)
    found = crossed(np.repeat(values_S[:, None], PROBLEMS, axis=1))
    assert ends(found) == pytest.approx(tuple(truth.confidence_interval()), rel=1e-9)
    assert found.p == pytest.approx(truth.pvalue, rel=1e-9)
    assert ends(found) == pytest.approx(ends(paired(values_S)), rel=1e-9)


def test_problems_without_variance_leave_welchs_interval() -> None:
    first_S, second_R = np.array([0.1, 0.3, -0.2, 0.25]), np.array([0.5, 0.9, 0.4, 0.45, 0.6])
    truth = stats.ttest_ind(second_R, first_S, equal_var=False)
    wide = [np.repeat(values[:, None], PROBLEMS, axis=1) for values in (first_S, second_R)]
    for found in (crossed_unpaired(*wide), unpaired(first_S, second_R)):
        assert ends(found) == pytest.approx(tuple(truth.confidence_interval()), rel=1e-9)
        assert found.p == pytest.approx(truth.pvalue, rel=1e-9)


def test_seeds_without_variance_leave_the_interval_over_problems() -> None:
    values_P = np.random.default_rng(1).normal(0.1, 0.3, PROBLEMS)
    truth = stats.ttest_1samp(values_P, 0).confidence_interval()
    assert ends(crossed(np.repeat(values_P[None], SEEDS, axis=0))) == pytest.approx(tuple(truth), rel=1e-9)


def test_a_sample_by_chance_too_even_is_no_surer_than_its_seeds_or_its_problems_alone() -> None:
    signs_SP = np.array([[1, -1, 1, -1], [-1, 1, -1, 1]]) * 0.3  # no seed's and no problem's mean moves
    ends_S, ends_P = np.array([0.1, 0.2]), np.array([0.1, 0.2, 0.3, 0.5])
    assert ends(crossed(ends_S[:, None] + signs_SP)) == pytest.approx(ends(paired(ends_S)))
    assert ends(crossed(ends_P[None] + signs_SP)) == pytest.approx(ends(paired(ends_P)))


def naive(first_SP: Any, second_RP: Any) -> tuple[float, float]:
    """The unpaired interval from its definition: what seeds of either sample, problems and the rest add, one by one."""
    variances, freedoms = [], []
    for y in (first_SP, second_RP):
        seeds, problems = y.shape
        of_seeds = sum((y[s].mean() - y.mean()) ** 2 for s in range(seeds)) / (seeds - 1)
        rest = sum(
            (y[s, p] - y[s].mean() - y[:, p].mean() + y.mean()) ** 2 for s in range(seeds) for p in range(problems)
        )
        variances += [of_seeds / seeds, -rest / ((seeds - 1) * (problems - 1)) / (seeds * problems)]
        freedoms += [seeds - 1, (seeds - 1) * (problems - 1)]
    gaps = [second_RP[:, p].mean() - first_SP[:, p].mean() for p in range(first_SP.shape[1])]
    variances.append(float(np.var(gaps, ddof=1)) / len(gaps))
    freedoms.append(len(gaps) - 1)
    total = sum(variances)
    freedom = total**2 / sum(v * v / d for v, d in zip(variances, freedoms, strict=True))
    half = stats.t.ppf(0.975, freedom) * total**0.5
    return float(np.mean(gaps) - half), float(np.mean(gaps) + half)


def test_the_unpaired_interval_is_its_definition() -> None:
    draw = np.random.default_rng(5)
    first_SP, second_RP = sample(draw, 0.1, 0.3), sample(draw, 0.2, 0.3, seeds=4)
    assert ends(crossed_unpaired(first_SP, second_RP)) == pytest.approx(naive(first_SP, second_RP), rel=1e-9)


def test_pairing_by_problem_is_used_when_seeds_are_not_paired() -> None:
    draw = np.random.default_rng(2)
    hard_P = draw.normal(0, 5, PROBLEMS)
    found = crossed_unpaired(hard_P + sample(draw, 0.05, 0), hard_P + sample(draw, 0.05, 0))
    assert found.high - found.low < 0.5  # 64 problems of such spread alone would make it 3


def test_equal_runs_have_an_interval_without_width() -> None:
    assert crossed(np.zeros((5, 8))) == Estimate(0.0, 0.0, 0.0, 1.0)
    assert paired(np.full(5, 0.5)) == Estimate(0.5, 0.5, 0.5, 0.0)


def test_q_values_are_scipys() -> None:
    p = np.random.default_rng(3).uniform(0, 1, 40) ** 3
    assert benjamini_hochberg(list(p)) == pytest.approx(list(stats.false_discovery_control(p)), rel=1e-12)


def test_holms_rule_is_its_definition() -> None:
    p = sorted(np.random.default_rng(4).uniform(0, 0.02, 12))
    at_level = [all(p[j] <= 0.05 / (12 - j) for j in range(i + 1)) for i in range(12)]
    assert [value <= 0.05 for value in holm(p)] == at_level and True in at_level and False in at_level
    assert benjamini_hochberg([]) == holm([]) == []
