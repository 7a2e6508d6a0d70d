"""Better than its group is positive, and a group that agrees teaches nothing."""

from __future__ import annotations

import random
from statistics import fmean, stdev
from typing import Literal

import pytest
import torch
from torch import Tensor

from grpo_core.objective import EPSILON, all_equal, group_advantages, nan_std
from tests.helpers import grpo_config

NAN = float("nan")
Scale = Literal["group", "batch", "none"]
scales = pytest.mark.parametrize("scale", ["group", "batch", "none"])


def table(*groups: list[float]) -> Tensor:
    return torch.tensor(groups, dtype=torch.float32)


@scales
@pytest.mark.parametrize("value", [0.01, 0.1, 1 / 3, 1e-8, 7.0, 1e6, 0.0])
def test_equal_rewards_have_advantage_exactly_zero(scale: Scale, value: float) -> None:
    assert (group_advantages(table([value] * 12), scale) == 0).all()
    beside_another = group_advantages(table([value] * 12, [1.0, 0.0] * 6), scale)
    assert (beside_another[0] == 0).all() and (beside_another[1] != 0).all()


def test_twelve_equal_rewards_of_a_hundredth_have_a_rounded_mean_that_is_not_a_hundredth() -> None:
    """Why equality decides, and not the standard deviation: the test above can fail."""
    rewards = table([0.01] * 12)
    assert (rewards - rewards.mean()).abs().max() > 0


def test_the_standard_deviation_is_over_n_minus_one() -> None:
    assert nan_std(table([0.0, 1.0, 2.0])).item() == 1.0  # over n it would be 0.816
    assert nan_std(table([1.0, 0.0, 0.0, 0.0])).item() == 0.5  # over n 0.433
    torch.testing.assert_close(group_advantages(table([0.0, 1.0, 2.0])), table([-1.0, 0.0, 1.0]) / (1 + EPSILON))


def test_fewer_than_two_values_have_no_standard_deviation() -> None:
    assert nan_std(table([3.0, NAN], [NAN, NAN])).isnan().all()
    assert nan_std(table([3.0])).isnan().all()


def test_group_scaling_agrees_with_the_statistics_of_each_group() -> None:
    rng = random.Random(0)
    groups = [[rng.gauss(1, 2) for _ in range(5)] for _ in range(4)]
    expected = [[(r - fmean(group)) / (stdev(group) + EPSILON) for r in group] for group in groups]
    torch.testing.assert_close(group_advantages(table(*groups), "group"), table(*expected), rtol=1e-5, atol=1e-6)


def test_batch_scaling_divides_by_the_standard_deviation_of_all_rewards() -> None:
    rng = random.Random(1)
    groups = [[rng.gauss(1, 2) for _ in range(5)] for _ in range(4)]
    std = stdev([r for group in groups for r in group]) + EPSILON
    expected = [[(r - fmean(group)) / std for r in group] for group in groups]
    torch.testing.assert_close(group_advantages(table(*groups), "batch"), table(*expected), rtol=1e-5, atol=1e-6)


def test_without_scaling_the_advantage_is_the_distance_to_the_group_mean() -> None:
    assert group_advantages(table([1.0, 0.0], [5.0, 2.0]), "none").tolist() == [[0.5, -0.5], [1.5, -1.5]]


@scales
def test_the_advantages_of_a_group_sum_to_zero(scale: Scale) -> None:
    advantage_BG = group_advantages(torch.rand(6, 5, generator=torch.Generator().manual_seed(0)), scale)
    torch.testing.assert_close(advantage_BG.sum(dim=1), torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_is_judged_by_itself(scale: Scale) -> None:
    group = [0.0, 2.0, 2.5]
    alone = group_advantages(table(group), scale)[0]
    assert torch.equal(group_advantages(table([50.0, -3.0, 0.0], group), scale)[1], alone)


def test_a_shuffled_group_has_shuffled_advantages() -> None:
    first, second = group_advantages(table([0.0, 2.0, 5.0], [5.0, 0.0, 2.0]))
    torch.testing.assert_close(first[[2, 0, 1]], second)


@scales
def test_a_row_without_a_reward_gets_zero_and_is_left_out_of_mean_and_std(scale: Scale) -> None:
    # A second group, so that `batch` has something to look at; its mean and the first one's are both 1.
    advantage_BG = group_advantages(table([0.0, NAN, 2.0], [1.0, 0.0, 2.0]), scale)
    assert advantage_BG[0, 1] == 0
    std = {"group": stdev([0, 2]) + EPSILON, "batch": stdev([0, 2, 1, 0, 2]) + EPSILON, "none": 1.0}[scale]
    torch.testing.assert_close(advantage_BG[0, [0, 2]], torch.tensor([-1.0, 1.0]) / std)


@scales
def test_a_group_with_fewer_than_two_rewards_teaches_nothing(scale: Scale) -> None:
    advantage_BG = group_advantages(table([NAN, 3.0, NAN], [NAN, NAN, NAN], [0.0, 1.0, 2.0]), scale)
    assert (advantage_BG[:2] == 0).all()
    assert advantage_BG[2].isfinite().all() and advantage_BG[2, 0] < 0 < advantage_BG[2, 2]
    assert (group_advantages(table([NAN, NAN], [NAN, NAN]), scale) == 0).all()


def test_groups_that_teach_nothing_are_those_without_two_different_rewards() -> None:
    rewards = table([0.01] * 3, [0.0, 0.0, 1.0], [NAN, 1.0, 1.0], [NAN, 1.0, 2.0], [NAN, NAN, 1.0], [NAN] * 3)
    assert all_equal(rewards).tolist() == [True, False, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_known_as_equal_however_their_mean_is_rounded(dtype: torch.dtype) -> None:
    groups = torch.tensor([[0.01] * 12, [0.1] * 12, [1 / 3] * 12, [1e6 / 7] * 12], dtype=dtype)
    assert (nan_std(groups) > 0).any()  # what a standard deviation would decide by
    assert all_equal(groups).all()


def test_a_group_of_one_is_refused_because_it_is_its_own_baseline() -> None:
    for scale in ("group", "batch", "none"):
        with pytest.raises(ValueError, match="--group_size 1: expected 2 or more"):
            grpo_config(group_size=1, scale_rewards=scale, max_steps=1).check()
    assert group_advantages(table([3.0], [4.0]), "none").tolist() == [[0.0], [0.0]]


@scales
def test_normalising_leaves_the_rewards_unchanged(scale: Scale) -> None:
    rewards = table([0.0, NAN, 2.0], [1.0, 1.0, 1.0])
    before = rewards.clone()
    group_advantages(rewards, scale).zero_()
    torch.testing.assert_close(rewards, before, rtol=0, atol=0, equal_nan=True)
