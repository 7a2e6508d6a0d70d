"""Numbers that go wrong: a step whose loss or gradient is not finite moves nothing, its rows are named, and the log
hides nothing of it. The models here are really poisoned: one token's embedding is no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sft_core.train
from eval.samples import Samples, Sampling
from eval.sampling import sample
from grpo_core.step import Learner
from sft_core.config import OptimConfig
from sft_core.job import SFTConfig
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from sft_core.train import sft_step
from tests.helpers import (
    PEFT_IS_BEHIND,
    Family,
    adapted,
    ends_often,
    grpo_config,
    largest_difference,
    learner,
    random_rows,
    step,
    tiny_policy,
    weights,
    with_samples,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

NAN, INF = float("nan"), float("inf")
TOKEN = 77  # the poisoned one


def poisoned(family: Family = "qwen2", value: float = NAN, **options: Any) -> Policy:
    """A policy that cannot read TOKEN, but knows its place in the output: only rows that hold it are lost."""
    policy = tiny_policy(family, tie_word_embeddings=False, **options)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[TOKEN] = value
    return policy


def groups(policy: Policy, holding: tuple[int, ...]) -> Rows:
    """Two groups of three completions; those of these rows hold TOKEN in their middle, and no other does."""
    rows = random_rows(policy, (4, 4, 4, 6, 6, 6), (5, 3, 8, 6, 5, 4))
    ids_NL, P = torch.where(rows.ids_NL == TOKEN, TOKEN + 1, rows.ids_NL), rows.prompt_width
    ids_NL[:3, :P], ids_NL[3:, :P] = ids_NL[0, :P].clone(), ids_NL[3, :P].clone()
    for row in holding:
        ids_NL[row, P + 1] = TOKEN
    return replace(rows, ids_NL=ids_NL)


def samples_of(rows: Rows) -> Samples:
    truncated_N = torch.zeros(len(rows), dtype=torch.bool)
    return Samples(rows, [f"{'x' * row}" for row in range(len(rows))], truncated_N, torch.zeros(rows.mask_NT.shape))


def moments(optimizer: Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.adamw.state.values() for value in state.values()]


class Standing:
    """All that a skipped step must leave alone."""

    def __init__(self, policy: Policy, optimizer: Optimizer) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.weights, self.moments = weights(policy), moments(optimizer)
        self.schedule, self.scale = optimizer.schedule.state_dict(), optimizer.scaler.get_scale()

    def assert_unmoved(self) -> None:
        now = weights(self.policy)
        assert all(torch.equal(now[name].nan_to_num(7), old.nan_to_num(7)) for name, old in self.weights.items())
        assert all(map(torch.equal, moments(self.optimizer), self.moments))
        assert len(moments(self.optimizer)) == len(self.moments) > 0
        assert self.optimizer.schedule.state_dict() == self.schedule
        assert self.optimizer.scaler.get_scale() == self.scale
        assert all(p.grad is None for p in self.policy.model.parameters())


def one_good_step(parts: Learner) -> Learner:
    """Moments and a schedule that have moved, so that one that moves again would show."""
    step(with_samples(parts, samples_of(groups(parts.policy, ()))))
    assert parts.optimizer.skipped == 0 and moments(parts.optimizer)
    return parts


# --- which rows


CASES: dict[str, tuple[Callable[[], Policy], dict[str, Any]]] = {
    "as it comes": (lambda: poisoned(), {}),
    "infinity": (lambda: poisoned(value=INF), {}),
    "absolute positions": (lambda: poisoned("gpt2"), {}),
    "prompts not shared": (lambda: replace(poisoned(), layout="rows"), {}),
    "micro-batches": (lambda: poisoned(), {"micro_batch": 2}),
    "a reference, two updates": (lambda: replace(poisoned(), layout="groups"), {"beta": 0.1, "mu": 2}),
    "LoRA": (lambda: adapted(poisoned()), {}),
    "fp16 with its scaler": (lambda: poisoned(precision="fp16"), {}),
    "bf16": (lambda: poisoned(precision="bf16"), {}),
    "whole completions": (lambda: poisoned(), {"loss": "gspo"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_that_hold_the_poison_are_named_and_no_other_and_nothing_moves(case: str) -> None:
    make, options = CASES[case]
    parts = one_good_step(learner(make(), grpo_config(**options)))
    standing = Standing(parts.policy, parts.optimizer)
    step(with_samples(parts, samples_of(groups(parts.policy, holding=(1, 5)))))
    assert parts.optimizer.skipped_rows == [1, 5]
    assert parts.optimizer.skipped == options.get("mu", 1)
    standing.assert_unmoved()


def test_a_neighbour_that_is_lost_in_the_same_pass_only_is_not_named() -> None:
    """Why rows are learned one by one: of completions packed behind one prompt, one that is NaN makes all NaN."""
    policy = replace(poisoned(), layout="groups")
    rows = groups(policy, holding=(1,)).cut(0, 3)
    assert rows.completion_ids()[0] != rows.completion_ids()[1]
    optimizer = Optimizer(policy, OptimConfig(), 10)
    losses: list[Tensor] = []

    def learn(at: slice, micro: Rows) -> None:
        logp_NT, _ = sft_core.train.token_logprobs(policy, micro)
        losses.append(logp_NT.detach().sum(dim=1))
        optimizer.backward(logp_NT.sum())

    optimizer.accumulate(rows, learn)
    assert losses[0].isnan().all()
    optimizer.clip_and_step()
    assert optimizer.skipped_rows == [1]


def test_sft_names_the_demonstrations_that_hold_the_poison() -> None:
    for policy in (poisoned(), adapted(poisoned(), dropout=0.2), poisoned(precision="fp16")):
        optimizer = Optimizer(policy, SFTConfig(micro_batch=4, lr=1e-3), 10)
        sft_step(policy, optimizer, groups(policy, holding=()))
        standing = Standing(policy, optimizer)
        record = sft_step(policy, optimizer, groups(policy, holding=(0, 4)))
        assert optimizer.skipped_rows == [0, 4] and record["loss"] != record["loss"]
        standing.assert_unmoved()
        policy.model.eval()


def test_an_overflow_that_halving_the_factor_cures_names_no_rows() -> None:
    parts = learner(tiny_policy(precision="fp16"), grpo_config())
    parts.optimizer.scaler._init_scale = 2.0**40
    rows = groups(parts.policy, ())
    backward, calls = parts.optimizer.backward, []
    parts.optimizer.backward = lambda loss: (calls.append(loss), backward(loss))[1]  # type: ignore
    step(with_samples(parts, samples_of(rows)))
    assert parts.optimizer.passes > 5 and len(calls) == parts.optimizer.passes  # no row was learned by itself
    assert parts.optimizer.skipped == 0 and parts.optimizer.skipped_rows == []


def test_rows_that_are_too_much_only_together_are_not_named_and_the_message_says_so() -> None:
    policy = tiny_policy()
    optimizer = Optimizer(policy, OptimConfig(max_skipped=1), 10)
    weight = policy.trainable()[0][1]

    def learn(at: slice, micro: Rows) -> None:
        optimizer.backward(1.5e19 * len(micro) * weight.flatten()[0])

    optimizer.accumulate(groups(policy, ()), learn)
    grad_norm, again = optimizer.clip_and_step()
    assert grad_norm == INF and not again and optimizer.skipped_rows == []
    with pytest.raises(FloatingPointError, match="1 step in a row .* step 3, no row by itself"):
        optimizer.stop_if_lost(3, "")


def test_a_loss_that_is_not_finite_is_skipped_even_where_its_gradient_is() -> None:
    policy = tiny_policy()
    optimizer = Optimizer(policy, OptimConfig(), 10)
    weight = policy.trainable()[0][1]

    def learn(at: slice, micro: Rows) -> None:
        optimizer.backward(weight.sum() + (NAN if at.start == 2 else 0.0))

    before = weights(policy)
    optimizer.micro_batch = 1
    optimizer.accumulate(groups(policy, ()), learn)
    optimizer.clip_and_step()
    assert optimizer.skipped == 1 and optimizer.skipped_rows == [2]
    assert largest_difference(weights(policy), before) == 0
    optimizer.accumulate(groups(policy, ()).cut(0, 2), learn)  # what was lost is forgotten
    optimizer.clip_and_step()
    assert optimizer.skipped == 1 and optimizer.skipped_in_a_row == 0


def test_a_message_of_very_many_rows_stays_short() -> None:
    optimizer = Optimizer(tiny_policy(), OptimConfig(max_skipped=2), 10)
    optimizer.skipped_in_a_row, optimizer.skipped_rows = 1, list(range(512))
    optimizer.stop_if_lost(9, "")
    optimizer.skipped_in_a_row = 2
    with pytest.raises(FloatingPointError, match="18, 19 and 492 more") as caught:
        optimizer.stop_if_lost(9, "")
    assert len(str(caught.value)) < 300


# --- the sampler


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_row_that_nothing_can_be_drawn_for_ends_there_and_the_others_are_what_they_were(family: Family) -> None:
    ordinary, lost = [[5, 6, 7], [8, 9]], [10, TOKEN, 12]
    results = []
    for prompts in (ordinary, [*ordinary, lost, lost]):
        torch.manual_seed(0)
        results.append(sample(ends_often(poisoned(family)), prompts, Sampling(max_completion_tokens=12, top_k=1)))
    alone, together = results
    assert together.rows.completion_ids()[:2] == alone.rows.completion_ids()
    assert together.rows.completion_ids()[2:] == [[poisoned().eos_ids[0]]] * 2
    assert not together.truncated_N[2:].any()
    assert together.logp_NT[2:, 0].isnan().all() and together.logp_NT[:2].isfinite().all()
