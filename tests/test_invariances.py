"""However a step's batch is cut, ordered, padded or recomputed, its losses, gradients and metrics are the same: for
every named loss and every option."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.samples import Samples
from grpo_core.config import LOSSES, GRPOConfig
from grpo_core.metrics import Tally, step_record
from grpo_core.variants import kept_tokens
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from tests.drawn import of_many_lengths, samples_where
from tests.helpers import (
    FAMILIES,
    PEFT_IS_BEHIND,
    Family,
    adapted,
    caught,
    checkpoint_activations,
    ends_often,
    forward_calls,
    gradients,
    grpo_config,
    relative_difference,
    step,
    tiny_policy,
    widened,
    with_samples,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss": name} for name in LOSSES},
    "top_entropy": {"top_entropy": 0.5},
    "entropy_coef": {"entropy_coef": 0.3, "top_entropy": 0.7},
    "mask_truncated": {"mask_truncated": True},
    "off_policy_threshold": {"off_policy_threshold": 0.01},
    "kl_correction": {"kl_correction": True, "loss": "gspo"},
}
families = pytest.mark.parametrize("family", FAMILIES)
cases = pytest.mark.parametrize("case", CASES)


def config_of(case: str, **fields: Any) -> GRPOConfig:
    sizes = {"group_size": 4, "mu": 2, "beta": 0.1, "temperature": 0.8, "epsilon_low": 0.05, "epsilon_high": 0.05}
    return grpo_config(**(sizes | CASES[case] | fields))


def policy_of(family: Family, dtype: torch.dtype = torch.float64) -> Policy:
    return ends_often(tiny_policy(family, dtype))


@lru_cache
def samples_of(family: Family) -> Samples:
    """Eight completions, sampled once for all tests; of several lengths, some cut off, behind two lengths of prompt."""
    samples = samples_where(of_many_lengths, policy_of(family), config_of("dapo"), seed=1)
    assert samples.rows.prompt_len_N.unique().numel() == 2
    return samples


Outcome = tuple[list[dict[str, Tensor]], dict[str, Any]]


def outcome(policy: Policy, config: GRPOConfig, samples: Samples) -> Outcome:
    """The gradients of both updates and the log line without its times. The step in between is large enough to leave
    the ratio's bounds."""
    parts = with_samples(caught(policy, config, lr=0.01), samples)
    record = step_record(step(parts))
    return parts.optimizer.gradients, {k: v for k, v in record.items() if not k.endswith("_s")}  # type: ignore


@lru_cache
def in_one_batch(family: Family, case: str) -> Outcome:
    """What all others are compared with."""
    config = config_of(case)
    expected = outcome(policy_of(family), config, samples_of(family))
    assert len(expected[0]) == 2 and expected[1]["kl"] > 0
    if config.objective[:2] == ("token", "clip"):
        assert expected[1]["clip_ratio_low"] > 0 and expected[1]["clip_ratio_high"] > 0
    return expected


def assert_equal(found: Outcome, expected: Outcome) -> None:
    for new, old in zip(found[0], expected[0], strict=True):
        assert relative_difference(old, new) < 1e-11
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        # sampler_gap is itself rounding: the sampler's log-probabilities are float32
        assert value == pytest.approx(expected[1][name], rel=1e-9, abs=1e-6 if "gap" in name else 1e-12), name


# --- cutting ---


@families
@cases
def test_microbatching_leaves_gradients_and_metrics_unchanged(family: Family, case: str) -> None:
    for micro_batch in (1, 3):
        cut = outcome(policy_of(family), config_of(case, micro_batch=micro_batch), samples_of(family))
        assert_equal(cut, in_one_batch(family, case))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length", "sequence_sum"])
def test_microbatching_leaves_the_float32_gradient_unchanged_up_to_rounding(aggregation: Any) -> None:
    config = config_of("grpo", aggregation=aggregation)
    whole, cut = (
        gradients(policy_of("qwen2", torch.float32), replace(config, micro_batch=size), samples=samples_of("qwen2"))[0]
        for size in (8, 3)
    )
    assert relative_difference(whole, cut) < 1e-5


@families
def test_microbatching_leaves_the_choice_of_high_entropy_tokens_unchanged_in_float32(family: Family) -> None:
    """The first tokens of a group tie but for rounding, and rounding depends on the micro-batch."""
    policy, config = policy_of(family, torch.float32), config_of("top_entropy")
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        one_by_one, by_threes, whole = (
            kept_tokens(policy, samples_of(family).rows, replace(config, top_entropy=share), micro_batch)
            for micro_batch in (1, 3, 8)
        )
        assert torch.equal(one_by_one, whole) and torch.equal(by_threes, whole)


@cases
def test_the_number_of_logits_at_once_changes_nothing(case: str) -> None:
    expected = in_one_batch("qwen2", case)
    for logit_chunk in (0, 1, 3 * 375):  # all, one token at once, three
        policy = replace(policy_of("qwen2"), logit_chunk=logit_chunk)
        assert_equal(outcome(policy, config_of(case), samples_of("qwen2")), expected)


@cases
@families
def test_encoding_each_prompt_once_changes_nothing(case: str, family: Family) -> None:
    alone = replace(policy_of(family), layout="rows")
    expected = outcome(alone, config_of(case), samples_of(family))
    assert_equal(outcome(policy_of(family), config_of(case), samples_of(family)), expected)


# --- order ---


def in_order(samples: Samples, order: list[int]) -> Samples:
    rows = samples.rows
    moved = Rows(rows.ids_NL[order], rows.prompt_len_N[order], rows.completion_len_N[order], rows.prompt_width)
    texts = [samples.texts[row] for row in order]
    return Samples(moved, texts, samples.truncated_N[order], samples.logp_NT[order])


@cases
def test_the_order_of_groups_and_of_rows_within_them_changes_nothing(case: str) -> None:
    other = in_order(samples_of("qwen2"), [6, 4, 7, 5, 1, 0, 3, 2])  # the second group first
    reordered = outcome(policy_of("qwen2"), config_of(case, micro_batch=3), other)
    assert_equal(reordered, in_one_batch("qwen2", case))


# --- padding ---


def padded(samples: Samples, left: int, right: int, filler: int) -> Samples:
    logp_NT = torch.nn.functional.pad(samples.logp_NT, (0, right))
    return replace(samples, rows=widened(samples.rows, left, right, filler), logp_NT=logp_NT)


@families
@cases
def test_padding_on_both_sides_and_its_id_change_no_gradient_and_no_metric(family: Family, case: str) -> None:
    wide = padded(samples_of(family), 3, 5, filler=77)
    assert_equal(outcome(policy_of(family), config_of(case), wide), in_one_batch(family, case))


@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 7)])
def test_padding_on_one_side_changes_nothing(left: int, right: int) -> None:
    wide = padded(samples_of("gpt2"), left, right, filler=77)
    assert_equal(outcome(policy_of("gpt2"), config_of("grpo"), wide), in_one_batch("gpt2", "grpo"))


# --- recomputing ---


@cases
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    policy = policy_of("gpt2")
    checkpoint_activations(policy)
    assert_equal(outcome(policy, config_of(case), samples_of("gpt2")), in_one_batch("gpt2", case))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "lora"])
def test_gradient_checkpointing_recomputes_while_learning_and_leaves_the_cache_on_while_sampling(kind: str) -> None:
    def lora(policy: Policy) -> Policy:
        return adapted(policy) if kind == "lora" else policy

    family: Family = "gpt2" if kind == "gpt2" else "qwen2"
    config = grpo_config(micro_batch=4)
    plain = gradients(lora(policy_of(family)), config)[0]

    checkpointed = policy_of(family)
    checkpoint_activations(checkpointed)  # before the adapter, as in `load_policy`
    base = checkpointed.model
    checkpointed = lora(checkpointed)
    layer_calls: list[bool] = []
    layer = (base.transformer.h if kind == "gpt2" else base.model.layers)[0]
    (layer.attn if kind == "gpt2" else layer.self_attn).register_forward_pre_hook(
        lambda module, _: layer_calls.append(module.training)
    )
    with forward_calls(base) as calls:
        recomputed = gradients(checkpointed, config)[0]
    assert relative_difference(plain, recomputed) < 1e-12
    sampled = [call["input_ids"].shape[1] for call in calls if call["use_cache"] is not False]
    assert len(sampled) > 2 and set(sampled[1:]) == {1}
    assert layer_calls.count(True) == 2 * 2  # two micro-batches, each computed twice: checkpointing was on


# --- an adapter that adds nothing ---


def with_empty_adapter(policy: Policy) -> Policy:
    policy = adapted(policy)
    for name, weight in policy.trainable():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    return policy


@cases
def test_an_adapter_that_adds_nothing_learns_what_the_chain_rule_makes_of_the_full_gradient(case: str) -> None:
    """W' = W + s * B @ A with B = 0, so dL/dB = s * dL/dW @ A^T and dL/dA = 0."""
    samples, config = samples_of("qwen2"), config_of(case, mu=1, micro_batch=3)
    full, lora = policy_of("qwen2"), with_empty_adapter(policy_of("qwen2"))
    with torch.no_grad():
        assert torch.equal(token_logprobs(full, samples.rows)[0], token_logprobs(lora, samples.rows)[0])
    of_full, of_lora = (with_samples(caught(policy, config), samples) for policy in (full, lora))
    reports = [step(parts) for parts in (of_full, of_lora)]
    assert torch.equal(reports[0].advantage_BG, reports[1].advantage_BG)
    assert Tally.of(reports[0]).means() == Tally.of(reports[1]).means()
    assert Tally.of(reports[1]).means()["kl"] == 0

    (of_weights,), (of_adapter,) = of_full.optimizer.gradients, of_lora.optimizer.gradients  # type: ignore[attr-defined]
    scale, adapters = 8 / 4, dict(lora.trainable())  # `adapted`: alpha 8, rank 4
    seen = 0
    for name, found in of_adapter.items():
        if "lora_A" in name:
            assert (found == 0).all()
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
        A = adapters[name.replace("lora_B", "lora_A")].detach()
        expected = scale * of_weights[f"{layer}.weight"] @ A.T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        seen += int(found.abs().max() > 1e-4)
    assert seen == 2 * 7  # all linear layers of two blocks
