"""What `grpo_core.step` claims: what is sampled is what is scored and learned, each row with its own reward.

That the loss and its gradient are right is in test_float64.py; that they do not depend on how a batch is cut, padded or
recomputed is in test_invariances.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.samples import Samples
from grpo_core.metrics import Tally
from grpo_core.step import sample_groups
from sft_core.learn.logprobs import token_logprobs
from sft_core.model.policy import without_dropout
from tests.helpers import (
    EXAMPLES,
    FAMILIES,
    PEFT_IS_BEHIND,
    Family,
    adapted,
    caught,
    completions,
    ends_often,
    forward_calls,
    grpo_config,
    largest_difference,
    learner,
    step,
    tiny_policy,
    weights,
    with_samples,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

families = pytest.mark.parametrize("family", FAMILIES)
aggregations = pytest.mark.parametrize(
    "aggregation", ["token_mean", "sequence_mean", "constant_length", "sequence_sum"]
)


# --- sampling ---


@families
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_first_update_has_ratio_exactly_one_and_the_samplers_logprobs(family: Family, temperature: float) -> None:
    policy = ends_often(tiny_policy(family, initializer_range=0.2))
    report = step(caught(policy, grpo_config(temperature=temperature, micro_batch=4)))
    means = Tally.of(report).means()
    assert means["ratio_min"] == means["ratio_max"] == 1
    assert means["sampler_gap_max"] < 1e-5


def test_the_sampler_gap_is_measured_on_the_completions_own_tokens() -> None:
    config, policy = grpo_config(micro_batch=4), ends_often(tiny_policy())
    samples = sample_groups(policy, EXAMPLES, config)
    assert not samples.rows.mask_NT.all()
    off_NT = torch.where(samples.rows.mask_NT, 0.5, 0.0)
    off_NT[0, 0] += 0.25
    spoilt = replace(samples, logp_NT=samples.logp_NT + off_NT)
    gap = Tally.of(step(with_samples(caught(policy, config), spoilt))).gap
    assert gap["sampler_gap_mean"] == pytest.approx(0.5 + 0.25 / int(samples.rows.mask_NT.sum()), abs=1e-5)
    assert gap["sampler_gap_max"] == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("mu", [1, 4])
def test_a_step_samples_once_however_many_updates_it_takes(mu: int) -> None:
    policy = ends_often(tiny_policy())
    parts = caught(policy, grpo_config(mu=mu, micro_batch=4), lr=0.1)
    sampled = []

    def counted(*args: Any) -> Samples:
        sampled.append(args)
        return sample_groups(*args)

    parts = replace(parts, sampler=counted)
    with forward_calls(policy.model) as calls:
        report = step(parts)
    assert len(sampled) == 1
    assert len([call for call in calls if call["use_cache"] is False]) == 2 * mu  # a forward for each micro-batch
    assert Tally.of(report).updates == mu == len(parts.optimizer.gradients)  # type: ignore[attr-defined]
    means = Tally.of(report).means()
    assert (means["ratio_min"] == 1) == (mu == 1)


def test_sampled_ids_are_trained_as_sampled_even_where_their_text_encodes_otherwise() -> None:
    policy = ends_often(tiny_policy())
    with forward_calls(policy.model) as calls:
        report = step(caught(policy, grpo_config(prompts_per_step=2, group_size=4)))
    (learned,) = [call for call in calls if call["use_cache"] is False]
    for group, ids in enumerate(learned["input_ids"].tolist()):
        of_group = completions(report.rollout.samples)[4 * group : 4 * group + 4]
        sampled = [*of_group[0][0], *(token for _, completion in of_group for token in completion)]
        assert ids[: len(sampled)] == sampled
    reread = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in report.rollout.samples.texts]
    assert any(again != ids for again, (_, ids) in zip(reread, completions(report.rollout.samples), strict=True))


@families
def test_a_model_with_dropout_samples_and_learns_one_distribution(family: Family) -> None:
    dropout = {"attention_dropout": 0.1} if family == "qwen2" else dict.fromkeys(("resid_pdrop", "embd_pdrop"), 0.1)
    policy = ends_often(tiny_policy(family, initializer_range=0.2, **dropout))
    # Left on, dropout would be seen:
    assert Tally.of(step(caught(policy, grpo_config()))).gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert Tally.of(step(caught(policy, grpo_config()))).gap["sampler_gap_max"] < 1e-5


@pytest.mark.parametrize("place", ["resid_pdrop", "attn_pdrop", "embd_pdrop"])
def test_every_dropout_of_gpt2_is_turned_off(place: str) -> None:
    policy = ends_often(tiny_policy("gpt2", **{place: 0.1}))
    assert Tally.of(step(caught(policy, grpo_config()))).gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert Tally.of(step(caught(policy, grpo_config()))).gap["sampler_gap_max"] < 1e-5


def test_lora_dropout_is_turned_off() -> None:
    policy = adapted(ends_often(tiny_policy()), dropout=0.1)
    assert Tally.of(step(caught(policy, grpo_config()))).gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert Tally.of(step(caught(policy, grpo_config(beta=0.1)))).gap["sampler_gap_max"] < 1e-5


@aggregations
def test_completions_that_end_at_once_are_learned_and_not_divided_by_zero(aggregation: Any) -> None:
    policy = tiny_policy()
    policy = replace(policy, eos_ids=tuple(range(len(policy.tokenizer))))
    parts = caught(policy, grpo_config(aggregation=aggregation, beta=0.1), lambda prompts, **_: range(len(prompts)))
    report = step(parts)
    assert report.rollout.samples.rows.completion_len_N.tolist() == [1] * 6
    (gradient,) = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert all(g.isfinite().all() for g in gradient.values()) and any(g.abs().max() > 0 for g in gradient.values())
    assert all(math.isfinite(value) for value in Tally.of(report).means().values())


def test_a_micro_batch_in_which_nothing_is_left_to_learn_does_no_harm() -> None:
    config = grpo_config(mask_truncated=True, micro_batch=1, beta=0.1, mu=2)
    parts = caught(ends_often(tiny_policy()), config, lr=0.1)
    report = step(parts)
    cut_off = report.rollout.samples.truncated_N
    assert cut_off.any() and not cut_off.all()  # rows of their own in micro-batches of one
    for gradient in parts.optimizer.gradients:  # type: ignore[attr-defined]
        assert all(g.isfinite().all() for g in gradient.values()) and any(g.abs().max() > 0 for g in gradient.values())
    assert all(math.isfinite(value) for value in Tally.of(report).means().values())


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens_however_it_is_cut(micro_batch: int) -> None:
    parts = caught(ends_often(tiny_policy()), grpo_config(scale_rewards="none", micro_batch=micro_batch))
    report = step(parts)
    length_N = report.rollout.samples.rows.completion_len_N
    # In the first update each token contributes -A.
    expected = -(report.advantage_BG.flatten() * length_N).sum() / length_N.sum()
    assert parts.optimizer.losses == pytest.approx([float(expected)], abs=1e-6)  # type: ignore[attr-defined]


def test_completions_that_were_cut_off_count_in_no_mean_over_tokens() -> None:
    parts = caught(ends_often(tiny_policy()), grpo_config(mask_truncated=True, scale_rewards="none", micro_batch=4))
    report = step(parts)
    ended_N, length_N = ~report.rollout.samples.truncated_N, report.rollout.samples.rows.completion_len_N
    assert ended_N.any() and not ended_N.all()
    # In the first update each token contributes -A.
    expected = -(report.advantage_BG.flatten() * length_N)[ended_N].sum() / length_N[ended_N].sum()
    assert parts.optimizer.losses == pytest.approx([float(expected)], abs=1e-6)  # type: ignore[attr-defined]


def test_the_entropy_bonus_raises_the_entropy() -> None:
    """Rewards are equal, so the bonus is all there is to learn."""
    policy = ends_often(tiny_policy())
    parts = caught(policy, grpo_config(entropy_coef=1.0), lambda prompts, **_: [1.0] * len(prompts), lr=0.01)
    report = step(parts)
    rows = report.rollout.samples.rows
    entropy_NT = token_logprobs(policy, rows)[1]
    assert float(entropy_NT.sum() / rows.mask_NT.sum()) > Tally.of(report).means()["entropy"] + 1e-3


# --- steps that must not be taken ---


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_reported() -> None:
    policy = ends_often(tiny_policy())
    parts = learner(policy, grpo_config(mu=2))
    before, lr = weights(policy), parts.optimizer.lr
    spoil = policy.trainable()[0][1].register_hook(lambda gradient: gradient * math.nan)
    report = step(parts)
    assert not math.isfinite(report.grad_norm)
    assert largest_difference(weights(policy), before) == 0 and parts.optimizer.lr == lr
    assert Tally.of(report).updates == 2  # no endless repetition in float32
    spoil.remove()
    assert math.isfinite(step(parts).grad_norm)
    assert largest_difference(weights(policy), before) > 0 and parts.optimizer.lr < lr


def test_an_overflow_in_fp16_repeats_the_batch_with_half_the_factor() -> None:
    policy = ends_often(tiny_policy(precision="fp16"))
    parts = learner(policy, grpo_config(micro_batch=4), steps=10)
    parts.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    lr, passes = parts.optimizer.lr, []

    def overflow_twice(gradient: Tensor) -> Tensor:
        passes.append(parts.optimizer.scaler.get_scale())
        return gradient * math.inf if len(passes) in (2, 3) else gradient

    policy.trainable()[-1][1].register_hook(overflow_twice)
    moves = []
    parts.optimizer.adamw.register_step_pre_hook(lambda *_: moves.append(1))
    with forward_calls(policy.model) as calls:
        report = step(parts)
    # Two micro-batches to a pass: the second overflows, then the third, then neither.
    assert passes == [1024, 1024, 512, 512, 256, 256]
    learned = [call["input_ids"] for call in calls if call["use_cache"] is False]
    assert len(learned) == 6 and all(torch.equal(learned[i], learned[i % 2]) for i in range(6))
    assert len(moves) == 1
    assert parts.optimizer.lr == pytest.approx(lr * 0.9)  # one step of ten
    assert math.isfinite(report.grad_norm)
    means = Tally.of(report).means()
    assert means["ratio_min"] == means["ratio_max"] == 1
