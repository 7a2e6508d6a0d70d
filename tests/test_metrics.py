"""What `grpo_core.metrics` claims: padding counts nowhere, sums over micro-batches become means over tokens."""

from __future__ import annotations

import pytest
import torch

from grpo_core.metrics import Tally
from tests.helpers import grpo_config

MASK = torch.tensor([[True, True, True], [True, False, False]])


def tally(padding: float) -> dict[str, float]:
    """A micro-batch of four tokens with `padding` in every quantity where the mask is False."""

    def padded(*values: list[float]) -> torch.Tensor:
        return torch.where(MASK, torch.tensor(values), padding)

    counted = Tally(grpo_config(epsilon_low=0.2, epsilon_high=0.3, beta=0.1))
    counted.add(
        torch.tensor(-0.95),
        MASK,
        MASK / 4,
        torch.tensor([[1.0], [-1.0]]) * MASK,
        padded([1.25, 1.5, 2.0], [0.5, 0.0, 0.0]),
        torch.where(MASK, -1.0, 0.0),
        torch.where(MASK, 0.5, 0.0),
        torch.where(MASK, 2.0, 0.0),
    )
    counted.updates = 1
    return counted.means()


@pytest.mark.parametrize("padding", [1.0, 0.01, 99.0])
def test_padding_counts_in_no_metric(padding: float) -> None:
    means = tally(padding)
    assert means == pytest.approx(
        {
            "grpo_loss": -1.0 + 0.1 * 0.5,
            "policy_loss": -1.0,
            "kl_loss": 0.5,
            "kl": 0.5,
            "entropy": 2.0,
            "clip_ratio_low": 1 / 4,  # 0.5, which is below 0.8, where the advantage is negative
            "clip_ratio_high": 2 / 4,  # 1.5 and 2, which are above 1.3, where it is positive
            "clip_ratio_low_min": 0.0,
            "clip_ratio_high_max": 2 / 3,
            "ratio_min": 0.5,
            "ratio_max": 2.0,
        }
    )
