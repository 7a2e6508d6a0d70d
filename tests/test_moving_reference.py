"""A reference that follows the policy (TR-DPO)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_core.metrics import Tally
from grpo_core.reference import Reference
from grpo_core.step import grpo_step
from sft_core.model.policy import Policy
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    ends_often,
    grpo_config,
    largest_difference,
    learner,
    tiny_policy,
    weights,
)
from tests.test_reference import disturb, kinds, start

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# --- a reference that follows (TR-DPO) ---


def held_weights(reference: Reference) -> dict[str, Tensor]:
    """A copy of the reference's own weights, by the names of the policy's that they stand for."""
    held = weights(reference.policy)
    own = {name.replace(".reference.", ".default."): w for name, w in held.items() if ".reference." in name}
    return own or held


def policys_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable()}


@kinds
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_reference_moves_at_every_kth_update_and_at_no_other(kind: str, every: int, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    reference = Reference(policy, every, 1.0)
    for update in range(1, 8):
        before = held_weights(reference)
        disturb(policy)
        reference.follow()
        moved = largest_difference(held_weights(reference), before) > 0
        assert moved == (update % every == 0)


@kinds
def test_the_reference_stays_where_it_began_unless_told_otherwise(kind: str, tmp_path: Path) -> None:
    assert grpo_config().ref_sync_every == 0
    policy = start(kind, tmp_path)
    reference = Reference(policy)
    before = held_weights(reference)
    for _ in range(5):
        disturb(policy)
        reference.follow()
    assert largest_difference(held_weights(reference), before) == 0


@pytest.mark.parametrize("mix", [0.6, 0.25])
def test_the_reference_becomes_a_mixture_of_itself_and_the_policy(mix: float, tmp_path: Path) -> None:
    policy = start("full", tmp_path)
    reference = Reference(policy, 1, mix)
    held = held_weights(reference)
    for _ in range(2):
        disturb(policy)
        now = policys_weights(policy)
        reference.follow()
        held = {name: (1 - mix) * held[name] + mix * now[name] for name in held}
        found = held_weights(reference)
        assert all(torch.allclose(found[name], held[name], rtol=1e-6, atol=1e-7) for name in held)
        assert largest_difference(policys_weights(policy), now) == 0


@kinds
def test_a_mix_of_one_is_a_copy_after_which_the_kl_is_zero_again(kind: str, tmp_path: Path) -> None:
    config = grpo_config(beta=0.1, lr=1e-2, ref_sync_every=2, ref_sync_mix=1.0)
    policy = start(kind, tmp_path)
    parts = learner(policy, config)
    assert parts.reference
    kls = [Tally.of(grpo_step(parts, EXAMPLES)).means()["kl"] for _ in range(5)]
    assert kls[0] == kls[2] == kls[4] == 0 and kls[1] > 1e-4 and kls[3] > 1e-4
    parts.reference.updates = 1
    parts.reference.follow()
    assert largest_difference(held_weights(parts.reference), policys_weights(policy)) == 0
    # A copy, not the same memory: the policy moves on alone.
    disturb(policy)
    assert largest_difference(held_weights(parts.reference), policys_weights(policy)) > 0.01


def test_updates_are_counted_and_not_steps() -> None:
    config = grpo_config(beta=0.1, lr=1e-2, mu=2, ref_sync_every=3, ref_sync_mix=1.0)
    parts = learner(ends_often(tiny_policy()), config)
    assert parts.reference
    before = held_weights(parts.reference)
    moved = []
    for _ in range(3):
        grpo_step(parts, EXAMPLES)
        after = held_weights(parts.reference)
        moved.append(largest_difference(after, before) > 0)
        before = after
    assert moved == [False, True, True]  # at updates 3 and 6


@kinds
def test_following_gives_the_reference_no_gradient_and_leaves_the_policy_trainable(kind: str, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    trainable = [name for name, _ in policy.trainable()]
    parts = learner(policy, grpo_config(beta=0.1, lr=1e-2, ref_sync_every=1, ref_sync_mix=1.0))
    assert parts.reference
    grpo_step(parts, EXAMPLES)
    held = parts.reference.policy.model
    own = [p for name, p in held.named_parameters() if kind == "full" or ".reference." in name]
    assert own and not any(p.requires_grad or p.grad is not None for p in own)
    assert [name for name, _ in policy.trainable()] == trainable


def test_with_lora_only_a_mix_of_one_is_accepted() -> None:
    lora = {"lora": True, "max_steps": 1, "beta": 0.1, "ref_sync_every": 5}
    with pytest.raises(ValueError, match="--ref_sync_mix 0.6: expected 1 with LoRA"):
        grpo_config(**lora).check()
    mixed = grpo_config(**(lora | {"lora": False, "adapter_path": "runs/sft", "model": "some/model"}), ref_sync_mix=0.9)
    with pytest.raises(ValueError, match="--ref_sync_mix 0.9: expected 1 with LoRA"):
        mixed.check()
    grpo_config(**lora, ref_sync_mix=1.0).check()
    grpo_config(lora=True, max_steps=1, beta=0.1).check()  # not followed: the mix has no meaning
