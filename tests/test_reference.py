"""What `grpo_core.reference` claims: pi_ref is the policy as it was when GRPO began, and stays so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from grpo_core.metrics import Tally
from grpo_core.objective import k3_kl
from grpo_core.reference import Reference
from grpo_core.step import grpo_step
from sft_core.config import ModelConfig
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy, load_policy, without_dropout
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    adapted,
    caught,
    ends_often,
    grpo_config,
    largest_difference,
    learner,
    random_rows,
    tiny_policy,
    weights,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

KINDS = ("full", "lora", "lora after SFT")
kinds = pytest.mark.parametrize("kind", KINDS)


def start(kind: str, tmp_path: Path) -> Policy:
    """What a run starts from: all weights, or an adapter, in memory or as SFT left it in a folder."""
    policy = ends_often(tiny_policy())
    if kind == "full":
        return policy
    if kind == "lora":
        return adapted(policy)
    policy.save(tmp_path / "base")
    tuned = adapted(policy)
    tuned.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save(tmp_path / "sft")
    loaded = load_policy(ModelConfig(model=str(tmp_path / "sft"), device="cpu", precision="float32"))
    assert torch.equal(scored(loaded, random_rows(loaded)), scored(tuned, random_rows(tuned)))
    return replace(loaded, eos_ids=policy.eos_ids)


@torch.no_grad()
def scored(policy: Policy, rows: Rows, temperature: float = 1.0) -> Tensor:
    return token_logprobs(policy, rows, temperature)[0]


@torch.no_grad()
def disturb(policy: Policy) -> None:
    for _, p in policy.trainable():
        p += 0.05


@kinds
def test_kl_is_zero_at_the_first_step(kind: str, tmp_path: Path) -> None:
    config = grpo_config(beta=0.1, temperature=0.8, micro_batch=4)
    report = grpo_step(learner(start(kind, tmp_path), config), EXAMPLES)
    assert Tally.of(report).means()["kl"] == 0


@kinds
def test_kl_is_positive_once_the_policy_has_moved(kind: str, tmp_path: Path) -> None:
    config = grpo_config(beta=0.1, lr=1e-2)
    parts = learner(start(kind, tmp_path), config)
    grpo_step(parts, EXAMPLES)
    assert Tally.of(grpo_step(parts, EXAMPLES)).means()["kl"] > 1e-4


@kinds
def test_the_reference_does_not_move_when_the_policy_does(kind: str, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    rows = random_rows(policy)
    parts = learner(policy, grpo_config(beta=0.1, lr=1e-2, mu=2))
    assert parts.reference
    at_the_start = parts.reference.logprobs(rows, 1.0, micro_batch=2)
    policy_then = scored(policy, rows)
    grpo_step(parts, EXAMPLES)
    disturb(policy)
    assert (scored(policy, rows) - policy_then).abs().max() > 0.01
    assert torch.equal(parts.reference.logprobs(rows, 1.0, micro_batch=2), at_the_start)


@kinds
def test_the_kl_pulls_the_policy_back_to_the_reference(kind: str, tmp_path: Path) -> None:
    """Rewards are equal, so the KL is all there is to learn; a small step down its gradient lowers it on its tokens."""
    policy = start(kind, tmp_path)
    parts = caught(policy, grpo_config(beta=1.0), lambda prompts, **_: [1.0] * len(prompts), lr=1e-3)
    disturb(policy)
    report = grpo_step(parts, EXAMPLES)
    away, rows = Tally.of(report).means()["kl"], report.rollout.samples.rows
    assert parts.reference and away > 0.01
    k3_NT = k3_kl(scored(policy, rows), parts.reference.logprobs(rows, 1.0, micro_batch=8))
    assert float(k3_NT.sum() / rows.mask_NT.sum()) < away - 1e-4


@kinds
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_reference_scores_as_the_policy_did(kind: str, temperature: float, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    rows = random_rows(policy, (4, 7, 2, 3), (5, 1, 8, 2))
    expected = scored(policy, rows, temperature)
    reference = Reference(policy)
    for micro_batch in (1, 3, 4):
        found = reference.logprobs(rows, temperature, micro_batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # some hundred roundings of float32
        assert (found[~rows.mask_NT] == 0).all()


def test_the_base_model_without_the_sft_adapter_is_not_the_reference(tmp_path: Path) -> None:
    """The tests above can fail: the adapter makes a difference."""
    policy = start("lora after SFT", tmp_path)
    rows = random_rows(policy)
    reference = Reference(policy).logprobs(rows, 1.0, micro_batch=4)
    with policy.model.disable_adapter():
        assert (scored(policy, rows) - reference).abs().max() > 0.1


@kinds
def test_holding_and_asking_a_reference_changes_nothing_about_the_policy(kind: str, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    rows, trainable = random_rows(policy), [name for name, _ in policy.trainable()]
    reference = Reference(policy)
    assert [name for name, _ in policy.trainable()] == trainable
    with torch.no_grad():
        for _, weight in policy.trainable():
            weight.mul_(0.5)  # or the reference would give the policy's numbers
    before, expected = weights(policy), scored(policy, rows)
    reference.logprobs(rows, 1.0, micro_batch=2)
    assert [name for name, _ in policy.trainable()] == trainable
    assert torch.equal(scored(policy, rows), expected)
    after = weights(policy)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@kinds
def test_the_reference_is_frozen(kind: str, tmp_path: Path) -> None:
    policy = start(kind, tmp_path)
    parts = learner(policy, grpo_config(beta=0.1))
    assert parts.reference
    grpo_step(parts, EXAMPLES)
    held = parts.reference.policy.model
    frozen = [p for name, p in held.named_parameters() if kind == "full" or ".reference." in name]
    trained = {id(p) for p in parts.optimizer.parameters}
    assert frozen and not any(p.requires_grad or p.grad is not None or id(p) in trained for p in frozen)


def test_with_full_fine_tuning_the_reference_shares_no_weight_with_the_policy() -> None:
    policy = tiny_policy()
    reference = Reference(policy)
    shared = {p.data_ptr() for p in policy.model.parameters()}
    assert not shared & {p.data_ptr() for p in reference.policy.model.parameters()}


def test_with_lora_the_reference_is_one_more_adapter_on_the_same_base() -> None:
    policy = adapted(tiny_policy())
    before = sum(p.numel() for p in policy.model.parameters())
    adapter = sum(p.numel() for _, p in policy.trainable())
    reference = Reference(policy)
    assert reference.policy.model is policy.model
    assert sum(p.numel() for p in policy.model.parameters()) == before + adapter


def test_a_failure_while_asking_leaves_the_policys_adapter_active(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(tiny_policy())
    reference, trainable = Reference(policy), [name for name, _ in policy.trainable()]
    disturb(policy)
    rows, expected = random_rows(policy), scored(policy, random_rows(policy))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rows, "micro_batches", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        reference.logprobs(rows, 1.0, micro_batch=2)
    assert torch.equal(scored(policy, rows), expected)
    assert [name for name, _ in policy.trainable()] == trainable


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_off_in_the_reference(kind: str, tmp_path: Path) -> None:
    policy = tiny_policy(attention_dropout=0.5)
    policy = policy if kind == "full" else adapted(policy, dropout=0.5)
    without_dropout(policy.model)  # before, as in a run
    reference = Reference(policy)
    policy.model.train()
    rows = random_rows(policy)
    first, second = (reference.logprobs(rows, 1.0, micro_batch=8) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, scored(policy, rows))


def test_a_saved_policy_holds_no_reference(tmp_path: Path) -> None:
    policy = adapted(tiny_policy())
    reference = Reference(policy)
    reference.logprobs(random_rows(policy), 1.0, micro_batch=2)
    policy.save(tmp_path / "saved")
    assert "reference" not in json.dumps(sorted(str(path) for path in (tmp_path / "saved").rglob("*")))
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == len(policy.trainable())
    assert not any("reference" in name for name in names)


def test_the_reference_of_an_untouched_policy_equals_it_weight_for_weight() -> None:
    policy = tiny_policy()
    assert largest_difference(weights(Reference(policy).policy), weights(policy)) == 0
