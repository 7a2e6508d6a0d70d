"""What `sft_core.model.half` claims: matrices cast once, the very same numbers, and nothing left behind."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from eval.samples import Sampling
from eval.sampling import sample
from grpo_core.metrics import Tally
from grpo_core.reference import Reference
from grpo_core.step import grpo_step
from sft_core.model.backbone import backbone_and_head
from sft_core.model.half import half_twin
from sft_core.model.policy import Policy
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    adapted,
    attention_of,
    completions,
    ends_often,
    grpo_config,
    largest_difference,
    learner,
    random_rows,
    tiny_policy,
    weights,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

kinds = pytest.mark.parametrize("kind", ["tied", "untied", "gpt2", "lora"])
precisions = pytest.mark.parametrize("precision", ["bf16", "fp16"])
FOUR = Sampling(4, temperature=0.7)


def policy_of(kind: str, precision: Any = "bf16") -> Policy:
    if kind == "gpt2":
        return ends_often(tiny_policy("gpt2", precision=precision))
    policy = ends_often(tiny_policy(precision=precision, tie_word_embeddings=kind != "untied"))
    return adapted(policy) if kind == "lora" else policy


@torch.no_grad()
def logits(model: Any, policy: Policy) -> Tensor:
    rows = random_rows(policy)
    with policy.precision.autocast():
        return model(input_ids=rows.ids_NL, attention_mask=attention_of(rows)).logits


@kinds
@precisions
def test_a_twins_logits_are_the_policys_under_autocast_bit_by_bit(kind: str, precision: Any) -> None:
    policy = policy_of(kind, precision)
    with half_twin(policy.model, policy.half_dtype) as twin:
        assert twin is not policy.model
        expected = logits(policy.model, policy)
        assert torch.equal(logits(twin, policy), expected)
    assert expected.dtype == policy.precision.autocast_dtype
    in_float32 = logits(policy.model, policy_of(kind, "float32"))
    assert (expected.float() - in_float32).abs().max() > 1e-3  # a precision that shows


@kinds
@precisions
def test_a_twin_has_matrices_of_its_own_and_shares_all_else(kind: str, precision: Any) -> None:
    policy = policy_of(kind, precision)
    own = {id(tensor) for tensor in (*policy.model.parameters(), *policy.model.buffers())}
    with half_twin(policy.model, policy.half_dtype) as twin:
        matrices = 0
        for module in twin.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if isinstance(module, (torch.nn.Linear, Conv1D)):
                    assert tensor.dtype == policy.precision.autocast_dtype and not tensor.requires_grad
                    assert id(tensor) not in own
                    matrices += tensor.ndim == 2
                else:
                    assert id(tensor) in own
    # Four or seven in each of two blocks, two more for each with an adapter, and the head.
    assert matrices == {"tied": 15, "untied": 15, "gpt2": 9, "lora": 43}[kind]


@kinds
def test_making_a_twin_leaves_the_policy_as_it_was(kind: str) -> None:
    policy = policy_of(kind)
    before, parts = weights(policy), {name: id(p) for name, p in policy.model.named_parameters(remove_duplicate=False)}
    trainable = [name for name, _ in policy.trainable()]
    with half_twin(policy.model, policy.half_dtype) as twin:
        logits(twin, policy)
    sample(policy, [[9, 40]] * 2, FOUR)
    assert {name: id(p) for name, p in policy.model.named_parameters(remove_duplicate=False)} == parts
    assert [name for name, _ in policy.trainable()] == trainable
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert largest_difference(weights(policy), before) == 0


@kinds
def test_nothing_is_copied_in_float32_or_where_no_copies_are_wanted(kind: str) -> None:
    for policy in (policy_of(kind, "float32"), replace(policy_of(kind), half_copies=False)):
        with half_twin(policy.model, policy.half_dtype) as model:
            assert model is policy.model


@kinds
@precisions
def test_samples_are_the_same_with_and_without_a_twin(kind: str, precision: Any) -> None:
    drawn = []
    for half_copies in (True, False):
        torch.manual_seed(0)
        policy = replace(policy_of(kind, precision), half_copies=half_copies)
        drawn.append(sample(policy, [[9, 40, 77]] * 3 + [[51]] * 3, FOUR))
    assert completions(drawn[0]) == completions(drawn[1])
    assert torch.equal(drawn[0].logp_NT, drawn[1].logp_NT)
    assert drawn[0].logp_NT.abs().max() > 0.1


def seen_models(policy: Policy) -> list[weakref.ref[Any]]:
    """Every model that generates, by its backbone: a twin's hooks are the policy's."""
    seen: list[weakref.ref[Any]] = []
    backbone, _ = backbone_and_head(policy.model)
    backbone.register_forward_pre_hook(lambda module, _: seen.append(weakref.ref(module)))
    return seen


@kinds
def test_a_twin_is_gone_once_the_samples_are_there(kind: str) -> None:
    policy = policy_of(kind)
    seen = seen_models(policy)
    sample(policy, [[9, 40]] * 2, FOUR)
    assert seen and all(model() is None for model in seen)  # at once: a memory of this size cannot wait for a collector


def test_every_sampling_uses_the_current_weights() -> None:
    policy, greedy = policy_of("tied"), Sampling(8, temperature=0)
    first = sample(policy, [[9, 40, 77], [51]], greedy)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.copy_(p.flip(0))
    second = sample(policy, [[9, 40, 77], [51]], greedy)
    assert completions(second) != completions(first)
    assert completions(second) == completions(sample(replace(policy, half_copies=False), [[9, 40, 77], [51]], greedy))


# --- the reference ---


@kinds
@precisions
def test_a_reference_of_halved_matrices_scores_as_one_of_whole_ones(kind: str, precision: Any) -> None:
    policy = policy_of(kind, precision)
    rows = random_rows(policy)
    whole = Reference(replace(policy_of(kind, precision), half_copies=False))
    halved = Reference(policy)
    assert torch.equal(halved.logprobs(rows, 0.8, 2), whole.logprobs(rows, 0.8, 2))


@pytest.mark.parametrize("half_copies", [True, False])
@kinds
def test_the_kl_is_exactly_zero_at_the_first_step_in_half_precision(kind: str, half_copies: bool) -> None:
    parts = learner(replace(policy_of(kind), half_copies=half_copies), grpo_config(beta=0.1, lr=1e-2))
    assert Tally.of(grpo_step(parts, EXAMPLES)).means()["kl"] == 0
    assert Tally.of(grpo_step(parts, EXAMPLES)).means()["kl"] > 0  # and not because the two are one


def dtypes(model: Any) -> dict[str, set[torch.dtype]]:
    """The precisions of the embedding, and of the layers' matrices."""
    found: dict[str, set[torch.dtype]] = {"embedding": set(), "matrix": set()}
    for name, p in model.named_parameters():
        found["embedding" if "embed" in name or ".wte" in name else "matrix"] |= (
            {p.dtype} if "norm" not in name else set()
        )
    return found


def test_a_frozen_reference_takes_half_the_memory_for_its_matrices_and_its_tied_head_none() -> None:
    policy = policy_of("tied")
    held = Reference(policy).policy.model
    assert dtypes(held) == {"embedding": {torch.float32}, "matrix": {torch.bfloat16}}
    assert held.get_output_embeddings().weight is held.get_input_embeddings().weight
    assert not any(p.requires_grad for p in held.parameters())
    assert dtypes(policy.model) == {"embedding": {torch.float32}, "matrix": {torch.float32}}


def test_a_reference_that_follows_stays_in_float32() -> None:
    """What it moves by is smaller than bf16 can tell."""
    policy = policy_of("tied")
    assert dtypes(Reference(policy, sync_every=2).policy.model)["matrix"] == {torch.float32}
    parts = learner(policy, grpo_config(beta=0.1, lr=1e-6, ref_sync_every=1, ref_sync_mix=0.5))
    assert parts.reference
    before = {name: p.clone() for name, p in parts.reference.policy.model.named_parameters()}
    grpo_step(parts, EXAMPLES)
    moved = [not torch.equal(p, before[name]) for name, p in parts.reference.policy.model.named_parameters()]
    assert sum(moved) > len(moved) / 2
