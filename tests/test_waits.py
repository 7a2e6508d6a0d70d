"""How often the host waits for the device: once for each token, and a constant few times a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from eval.draw import Draw
from eval.samples import Sampling
from eval.sampling import sample
from grpo_core.metrics import step_record
from grpo_core.step import grpo_step
from sft_core.learn.rows import Rows
from tests.helpers import EXAMPLES, ends_often, grpo_config, learner, step, tiny_policy
from tests.simulated import NEEDS_THE_HOOKS, moved, on_the_device
from tests.simulated_device import DEVICE

pytestmark = NEEDS_THE_HOOKS


def waits(run: Callable[[], Any]) -> int:
    with DEVICE.watched() as found:
        run()
    print(Counter(found))
    return len(found)


def waits_a_token(temperature: float = 1.0) -> float:
    """Of 10 further tokens, in rows of which some are padded and none ends."""
    policy = replace(moved(tiny_policy()), eos_ids=(10**6,))  # which is never drawn
    few, many = (
        waits(lambda budget=budget: sample(policy, [[5, 6, 7]] * 2 + [[8]] * 2, Sampling(budget, temperature)))
        for budget in (4, 14)
    )
    return (many - few) / 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@on_the_device
def test_the_host_waits_once_for_each_token(temperature: float) -> None:
    assert waits_a_token(temperature) == 1  # `generate` asks whether all rows have ended


@on_the_device
def test_an_item_in_the_token_loop_is_found() -> None:
    pick = Draw.pick

    def asking(self: Draw, weight_NV: Tensor, uniform_N1: Tensor) -> Tensor:
        weight_NV.sum().item()
        return pick(self, weight_NV, uniform_N1)

    with patch.object(Draw, "pick", asking):
        assert waits_a_token() == 2


@on_the_device
def test_this_project_waits_once_for_each_segment() -> None:
    """For the tokens that were drawn; all other waits are those of `generate`."""
    policy = ends_often(moved(tiny_policy()))
    generate, segments = type(policy.model).generate, []

    def counted(self: Any, **given: Any) -> Tensor:
        before = len(DEVICE.waits)
        drawn: Tensor = generate(self, **given)
        segments.append(len(DEVICE.waits) - before)
        return drawn

    with patch.object(type(policy.model), "generate", counted):
        total = waits(lambda: sample(policy, [[5, 6, 7]] * 8 + [[8]] * 8, Sampling(12), at_once=8))
    assert len(segments) > 3
    prefills = 2 * len([wait for wait in DEVICE.waits if wait.function == "_mask"])  # transformers looks for padding
    assert total - sum(segments) <= len(segments) + prefills


@pytest.mark.parametrize("loss", ["dapo", "gspo", "vespo"])
@on_the_device
def test_no_micro_batch_waits_and_a_step_waits_a_few_times(loss: str) -> None:
    """What a step learns from given samples, and the line that it logs."""
    config = grpo_config(loss=loss, beta=0.1, mu=2, micro_batch=6)
    parts = learner(ends_often(moved(tiny_policy())), config)
    samples = step(parts).rollout.samples

    def learned(size: int) -> int:
        parts.optimizer.micro_batch = size
        mine = replace(parts, sampler=lambda *_: samples)
        return waits(lambda: step_record(grpo_step(mine, EXAMPLES)))

    whole, small = learned(6), learned(2)
    assert whole == small
    # The advantages go there; the reference's numbers are finite; of each update the norm and the loss; the log's four.
    assert whole <= 1 + 1 + 2 * 2 + 4


@on_the_device
def test_rows_are_read_from_the_device_once_also_for_their_parts() -> None:
    policy = ends_often(moved(tiny_policy()))
    rows = step(learner(policy, grpo_config())).rows
    left = rows.without_completions(rows.completion_len_N > 3)

    def read(rows: Rows) -> None:
        for _ in range(2):
            for _, micro in rows.micro_batches(2):
                micro.completion_ids()

    assert waits(lambda: read(rows)) == 0
    assert waits(lambda: read(left)) == 1
