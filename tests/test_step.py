"""What `grpo_core.step` claims: one step is Algorithm 1, however its batch is cut, padded or recomputed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_core.train
from eval.sampling import Samples
from grpo_core.config import GRPOConfig
from grpo_core.metrics import step_record
from grpo_core.rollout import sample_groups
from grpo_core.step import Learner, StepReport, grpo_step
from rewards import Reward
from sft_core.logprobs import token_logprobs
from sft_core.policy import Policy, without_dropout
from sft_core.prompts import encode_prompt, prompt_messages
from tests.helpers import (
    EXAMPLES,
    FAMILIES,
    PEFT_IS_BEHIND,
    Family,
    adapted,
    caught,
    checkpoint_activations,
    ends_often,
    forward_calls,
    grpo_config,
    largest_difference,
    learner,
    length_reward,
    tiny_policy,
    weights,
    widened,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

families = pytest.mark.parametrize("family", FAMILIES)
aggregations = pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])


def step(parts: Learner, seed: int = 0) -> StepReport:
    torch.manual_seed(seed)
    return grpo_step(parts, EXAMPLES)


def gradients(
    policy: Policy, config: GRPOConfig, lr: float = 0.0, reward: Any = length_reward
) -> list[dict[str, Tensor]]:
    """The gradient of every weight in each of the step's updates."""
    parts = caught(policy, config, reward, lr)
    step(parts)
    return parts.optimizer.gradients  # type: ignore[attr-defined]


def relative_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    scale = max(float(gradient.abs().max()) for gradient in first.values())
    assert scale > 0
    return largest_difference(first, second) / scale


# --- the whole chain, against a second implementation ---


@pytest.fixture
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@aggregations
@pytest.mark.parametrize("family, tolerance", [("gpt2", 1e-10), ("qwen2", 1e-6)])  # Qwen2's norms are float32 always
def test_a_step_is_algorithm_1_by_the_definition(aggregation: Any, family: Family, tolerance: float) -> None:
    """Rows one at a time without padding, tokens one at a time, statistics by the standard library."""
    sizes = {"group_size": 4, "micro_batch": 3, "mu": 2, "beta": 0.1, "epsilon_low": 0.03, "epsilon_high": 0.06}
    config = grpo_config(**sizes, aggregation=aggregation, temperature=0.8)
    policy = ends_often(tiny_policy(family, torch.float64))
    model = copy.deepcopy(policy.model)
    parts = caught(policy, config, lr=0.02)
    report = step(parts)
    catcher: Any = parts.optimizer

    rewards = length_reward([], report.rollout.samples.texts)
    for group in range(2):
        of_group = rewards[4 * group : 4 * group + 4]
        expected = [(r - fmean(of_group)) / (stdev(of_group) + 1e-4) for r in of_group]
        assert report.advantage_BG[group].tolist() == pytest.approx(expected, rel=1e-5)

    naive = NaiveStep(model, config, completions(report.rollout.samples), report.advantage_BG.flatten().tolist())
    for update in range(2):
        loss, gradient = naive.loss_and_gradient()
        assert catcher.losses[update] == pytest.approx(loss, abs=tolerance)
        assert largest_difference(catcher.gradients[update], gradient) < tolerance
        naive.move(gradient, lr=0.02)

    # The second update really was off-policy, on both sides of the bounds, and away from the reference.
    assert naive.clipped_low and naive.clipped_high and naive.kl > 1e-3
    means, tokens = report.tally.means(), 2 * naive.tokens
    assert means["clip_ratio_low"] == pytest.approx(naive.clipped_low / tokens)
    assert means["clip_ratio_high"] == pytest.approx(naive.clipped_high / tokens)
    assert means["kl"] == pytest.approx(naive.kl / tokens, rel=1e-5)
    assert means["entropy"] == pytest.approx(naive.entropy / tokens, rel=1e-5)
    assert means["grpo_loss"] == pytest.approx(fmean(catcher.losses), rel=1e-5, abs=1e-6)


def completions(samples: Samples) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt and completion ids."""
    rows, P = samples.rows, samples.rows.prompt_width
    lengths = zip(rows.ids_NL.tolist(), rows.prompt_len_N.tolist(), rows.completion_len_N.tolist(), strict=True)
    return [(ids[P - before : P], ids[P : P + after]) for ids, before, after in lengths]


class NaiveStep:
    """DeepSeekMath's equation 3 in loops, with nothing of this project in it."""

    def __init__(
        self, model: Any, config: GRPOConfig, rows: list[tuple[list[int], list[int]]], advantages: list[float]
    ) -> None:
        self.model, self.config, self.rows, self.advantages = model, config, rows, advantages
        self.tokens = sum(len(completion) for _, completion in rows)
        self.old = self.reference = self.logps()
        self.clipped_low = self.clipped_high = 0  # and the sums of all calls:
        self.kl = self.entropy = 0.0

    def distributions(self, prompt: list[int], completion: list[int]) -> list[Tensor]:
        """log pi(. | everything before it) for each token of one completion."""
        logits = self.model(torch.tensor([prompt + completion])).logits[0] / self.config.temperature
        return [logits[len(prompt) + t - 1].log_softmax(dim=0) for t in range(len(completion))]

    @torch.no_grad()
    def logps(self) -> list[list[Tensor]]:
        """Each row's tokens as the model scores them now."""
        return [
            [logp_V[token] for logp_V, token in zip(self.distributions(prompt, completion), completion, strict=True)]
            for prompt, completion in self.rows
        ]

    def loss_and_gradient(self) -> tuple[float, dict[str, Tensor]]:
        config, total = self.config, torch.zeros(())
        for i, (prompt, completion) in enumerate(self.rows):
            weight = {
                "token_mean": 1 / self.tokens,
                "sequence_mean": 1 / len(self.rows) / len(completion),
                "constant_length": 1 / len(self.rows) / config.max_completion_tokens,
            }[config.aggregation]
            A = self.advantages[i]
            for t, logp_V in enumerate(self.distributions(prompt, completion)):
                new, old, ref = logp_V[completion[t]], self.old[i][t], self.reference[i][t]
                ratio = (new - old).exp()
                bounded = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
                surrogate = ratio * A if (ratio * A).item() < (bounded * A).item() else bounded * A
                kl = (ref - new).exp() - (ref - new) - 1
                total = total + weight * (config.beta * kl - surrogate)
                self.clipped_low += A < 0 and ratio.item() < 1 - config.epsilon_low
                self.clipped_high += A > 0 and ratio.item() > 1 + config.epsilon_high
                self.kl += kl.item()
                self.entropy -= (logp_V.exp() * logp_V).sum().item()
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        found = torch.autograd.grad(total, parameters)
        return total.item(), dict(zip(names, found, strict=True))

    @torch.no_grad()
    def move(self, gradient: dict[str, Tensor], lr: float) -> None:
        for name, p in self.model.named_parameters():
            p -= lr * gradient[name]


# --- cutting, padding, recomputing ---


@families
@aggregations
def test_microbatching_leaves_the_gradient_unchanged(family: Family, aggregation: Any) -> None:
    config = grpo_config(aggregation=aggregation, beta=0.1, mu=2, group_size=4)

    def cut(micro_batch: int) -> list[dict[str, Tensor]]:
        policy = ends_often(tiny_policy(family, torch.float64))
        return gradients(policy, replace(config, micro_batch=micro_batch), lr=0.1)

    whole = cut(8)
    for micro_batch in (1, 3, 100):
        for update, gradient in enumerate(cut(micro_batch)):
            assert relative_difference(whole[update], gradient) < (1e-12 if family == "gpt2" else 1e-6)


@aggregations
def test_microbatching_leaves_the_float32_gradient_unchanged_up_to_rounding(aggregation: Any) -> None:
    config = grpo_config(aggregation=aggregation, beta=0.1, group_size=4)
    whole, cut = (gradients(ends_often(tiny_policy()), replace(config, micro_batch=size))[0] for size in (8, 3))
    assert relative_difference(whole, cut) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "lora"])
def test_gradient_checkpointing_leaves_the_gradient_unchanged_and_the_cache_on(kind: str) -> None:
    def policy() -> Policy:
        return ends_often(tiny_policy("gpt2" if kind == "gpt2" else "qwen2", torch.float64))

    def lora(policy: Policy) -> Policy:
        return adapted(policy) if kind == "lora" else policy

    config = grpo_config(micro_batch=4)
    plain = gradients(lora(policy()), config)[0]

    checkpointed = policy()
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


def with_samples(parts: Learner, samples: Samples) -> Learner:
    """The same parts with a sampler that hands out these samples."""
    return replace(parts, sampler=lambda *_: samples)


def measured(policy: Policy, config: GRPOConfig, samples: Samples) -> dict[str, Any]:
    """The log line, without its times, of a step on these samples; it moves the weights between its two updates."""
    report = step(with_samples(caught(policy, config, lr=0.1), samples))
    record = step_record(report, config)
    return {name: value for name, value in record.items() if not name.endswith("_s")}


@families
def test_padding_changes_no_metric(family: Family) -> None:
    config = grpo_config(beta=0.1, mu=2, group_size=4, epsilon_low=0.05, epsilon_high=0.05)
    samples = sample_groups(ends_often(tiny_policy(family)), EXAMPLES, config)
    lengths = samples.rows.completion_len_N
    assert lengths.min() < lengths.max()

    expected = measured(ends_often(tiny_policy(family)), config, samples)
    assert expected["kl"] > 0 and expected["clip_ratio_low"] > 0 and expected["clip_ratio_high"] > 0
    without_any_padding = measured(ends_often(tiny_policy(family)), replace(config, micro_batch=1), samples)
    # More padding on both sides, and another token in all of it.
    logp_NT = torch.nn.functional.pad(samples.logp_NT, (0, 5))
    wide = replace(samples, rows=widened(samples.rows, 3, 5, filler=77), logp_NT=logp_NT)
    padded = measured(ends_often(tiny_policy(family)), config, wide)
    for found in (without_any_padding, padded):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # sampler_gap is itself rounding: a few millionths
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_entropy_is_the_mean_over_the_completions_own_tokens() -> None:
    policy = ends_often(tiny_policy())
    report = step(caught(policy, grpo_config(micro_batch=2)))
    total = 0.0
    for prompt, completion in completions(report.rollout.samples):
        logp = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        total -= float((logp.exp() * logp).sum().detach())
    tokens = sum(len(completion) for _, completion in completions(report.rollout.samples))
    assert report.tally.means()["entropy"] == pytest.approx(total / tokens, rel=1e-5)


# --- sampling ---


@families
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_first_update_has_ratio_exactly_one_and_the_samplers_logprobs(family: Family, temperature: float) -> None:
    report = step(caught(ends_often(tiny_policy(family)), grpo_config(temperature=temperature, micro_batch=4)))
    means = report.tally.means()
    assert means["ratio_min"] == means["ratio_max"] == 1
    assert means["sampler_gap_max"] < 1e-5


def test_the_sampler_gap_is_measured_on_the_completions_own_tokens() -> None:
    config, policy = grpo_config(micro_batch=4), ends_often(tiny_policy())
    samples = sample_groups(policy, EXAMPLES, config)
    assert not samples.rows.mask_NT.all()
    off_NT = torch.where(samples.rows.mask_NT, 0.5, 0.0)
    off_NT[0, 0] += 0.25
    spoilt = replace(samples, logp_NT=samples.logp_NT + off_NT)
    gap = step(with_samples(caught(policy, config), spoilt)).tally.gap
    assert gap["sampler_gap_mean"] == pytest.approx(0.5 + 0.25 / int(samples.rows.mask_NT.sum()), abs=1e-5)
    assert gap["sampler_gap_max"] == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("mu", [1, 4])
def test_a_step_samples_once_however_many_updates_it_takes(mu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ends_often(tiny_policy())
    parts = caught(policy, grpo_config(mu=mu, micro_batch=4), lr=0.1)
    generate, sampled = policy.model.generate, []

    def counted(**kwargs: Any) -> Any:
        sampled.append(kwargs)
        return generate(**kwargs)

    monkeypatch.setattr(policy.model, "generate", counted)
    with forward_calls(policy.model) as calls:
        report = step(parts)
    assert len(sampled) == 1
    assert len([call for call in calls if call["use_cache"] is False]) == 2 * mu  # a forward for each micro-batch
    assert report.tally.updates == mu == len(parts.optimizer.gradients)  # type: ignore[attr-defined]
    means = report.tally.means()
    assert (means["ratio_min"] == 1) == (mu == 1)


def test_sampled_ids_are_trained_as_sampled_even_where_their_text_encodes_otherwise() -> None:
    policy = ends_often(tiny_policy())
    with forward_calls(policy.model) as calls:
        report = step(caught(policy, grpo_config(prompts_per_step=2, group_size=4)))
    (learned,) = [call for call in calls if call["use_cache"] is False]
    assert torch.equal(learned["input_ids"], report.rollout.samples.rows.ids_NL)
    reread = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in report.rollout.samples.texts]
    assert any(again != ids for again, (_, ids) in zip(reread, completions(report.rollout.samples), strict=True))


@families
def test_a_model_with_dropout_samples_and_learns_one_distribution(family: Family) -> None:
    dropout = {"attention_dropout": 0.1} if family == "qwen2" else dict.fromkeys(("resid_pdrop", "embd_pdrop"), 0.1)
    policy = ends_often(tiny_policy(family, **dropout))
    # Left on, dropout would be seen:
    assert step(caught(policy, grpo_config())).tally.gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert step(caught(policy, grpo_config())).tally.gap["sampler_gap_max"] < 1e-5


@pytest.mark.parametrize("place", ["resid_pdrop", "attn_pdrop", "embd_pdrop"])
def test_every_dropout_of_gpt2_is_turned_off(place: str) -> None:
    policy = ends_often(tiny_policy("gpt2", **{place: 0.1}))
    assert step(caught(policy, grpo_config())).tally.gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert step(caught(policy, grpo_config())).tally.gap["sampler_gap_max"] < 1e-5


def test_lora_dropout_is_turned_off() -> None:
    policy = adapted(ends_often(tiny_policy()), dropout=0.1)
    assert step(caught(policy, grpo_config())).tally.gap["sampler_gap_max"] > 1e-3
    without_dropout(policy.model)
    assert step(caught(policy, grpo_config(beta=0.1))).tally.gap["sampler_gap_max"] < 1e-5


@aggregations
def test_completions_that_end_at_once_are_learned_and_not_divided_by_zero(aggregation: Any) -> None:
    policy = tiny_policy()
    policy = replace(policy, eos_ids=tuple(range(len(policy.tokenizer))))
    parts = caught(policy, grpo_config(aggregation=aggregation, beta=0.1), lambda prompts, **_: range(len(prompts)))
    report = step(parts)
    assert report.rollout.samples.rows.completion_len_N.tolist() == [1] * 6
    (gradient,) = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert all(g.isfinite().all() for g in gradient.values()) and any(g.abs().max() > 0 for g in gradient.values())
    assert all(math.isfinite(value) for value in report.tally.means().values())


def test_a_micro_batch_in_which_nothing_is_left_to_learn_does_no_harm() -> None:
    config = grpo_config(mask_truncated=True, micro_batch=1, beta=0.1, mu=2)
    parts = caught(ends_often(tiny_policy()), config, lr=0.1)
    report = step(parts)
    cut_off = report.rollout.samples.truncated_N
    assert cut_off.any() and not cut_off.all()  # rows of their own in micro-batches of one
    for gradient in parts.optimizer.gradients:  # type: ignore[attr-defined]
        assert all(g.isfinite().all() for g in gradient.values()) and any(g.abs().max() > 0 for g in gradient.values())
    assert all(math.isfinite(value) for value in report.tally.means().values())


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
    assert float(entropy_NT.sum() / rows.mask_NT.sum()) > report.tally.means()["entropy"] + 1e-3


# --- rewards ---


class Identity:
    """A reward that numbers the rows and keeps what it was called with."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: list[str]) -> list[float]:
        self.called = {"prompts": list(prompts), "completions": list(completions), **columns}
        return [float(row) for row in range(len(prompts))]


def test_every_row_is_scored_against_its_own_prompts_gold() -> None:
    policy, reward = ends_often(tiny_policy()), Identity()
    config = grpo_config()
    report = step(caught(policy, config, reward))
    assert reward.called["answer"] == ["7"] * 3 + ["10"] * 3
    for column in ("prompts", "question"):
        assert reward.called[column] == [EXAMPLES[0].question] * 3 + [EXAMPLES[1].question] * 3
    assert reward.called["solution"] == [EXAMPLES[0].solution] * 3 + [EXAMPLES[1].solution] * 3
    assert reward.called["completions"] == report.rollout.samples.texts
    encoded = [encode_prompt(policy.tokenizer, prompt_messages(example, config)) for example in EXAMPLES]
    assert [prompt for prompt, _ in completions(report.rollout.samples)] == [encoded[0]] * 3 + [encoded[1]] * 3
    for (_, ids), text in zip(completions(report.rollout.samples), report.rollout.samples.texts, strict=True):
        assert policy.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_row_gets_its_own_reward_and_advantage() -> None:
    report = step(caught(ends_often(tiny_policy()), grpo_config(scale_rewards="none"), Identity()))
    assert report.rollout.reward_BG.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert report.advantage_BG.tolist() == [[-1, 0, 1], [-1, 0, 1]]


@pytest.mark.parametrize("row", range(6))
def test_a_rewarded_completion_gains_on_its_group(row: int) -> None:
    """One row is paid: a small step down the gradient lifts its log-probability above the mean of its group, for that
    is the inner product of the step with its own direction."""
    policy = ends_often(tiny_policy(dtype=torch.float64))
    config = grpo_config(scale_rewards="none", aggregation="constant_length")

    def reward(prompts: Sequence[str], **_: Any) -> list[float]:
        return [float(i == row) for i in range(len(prompts))]

    parts = caught(policy, config, reward, lr=1e-3)
    report = step(parts)
    before, after = (
        NaiveStep(model, config, completions(report.rollout.samples), []).old
        for model in (tiny_policy(dtype=torch.float64).model, policy.model)
    )
    gains = [float(sum(new) - sum(old)) for old, new in zip(before, after, strict=True)]
    first = row // 3 * 3
    assert gains[row] > fmean(gains[first : first + 3])


@pytest.mark.parametrize("value", [0.0, 0.01, 1.0])
def test_equal_rewards_give_zero_gradient(value: float) -> None:
    (gradient,) = gradients(
        ends_often(tiny_policy()), grpo_config(), reward=lambda prompts, **_: [value] * len(prompts)
    )
    assert all((g == 0).all() for g in gradient.values())


def test_equal_rewards_leave_the_weights_alone() -> None:
    policy = ends_often(tiny_policy())
    parts = learner(policy, grpo_config(), lambda prompts, **_: [0.01] * len(prompts))
    before = weights(policy)
    step(parts)
    assert largest_difference(weights(policy), before) == 0


def test_a_row_that_no_reward_function_judged_is_left_out() -> None:
    values = [None, 1.0, 3.0, 0.0, 0.0, 6.0]
    config = grpo_config(scale_rewards="none")
    report = step(caught(ends_often(tiny_policy()), config, lambda **_: values))
    assert report.rollout.reward_BG[0, 0].isnan()
    assert report.advantage_BG.tolist() == [[0, -1, 1], [-2, -2, 4]]
    record = step_record(report, config)
    assert record["reward_mean"] == 2.0 and record["rewards/reward"] == 2.0


def test_a_step_that_no_reward_function_judged_teaches_nothing_and_can_be_logged() -> None:
    policy, config = ends_often(tiny_policy()), grpo_config()
    parts = caught(policy, config, lambda prompts, **_: [None] * len(prompts))
    report = step(parts)
    (gradient,) = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert all((g == 0).all() for g in gradient.values())
    record = step_record(report, config)
    assert math.isnan(record["reward_mean"]) and record["rewards/reward"] is None
    assert record["zero_variance_share"] == 1 and math.isnan(record["reward_std"])


def test_weights_of_rewards_are_applied() -> None:
    config = grpo_config(scale_rewards="none")
    parts = caught(ends_often(tiny_policy()), config)
    ones = Reward("ones", lambda prompts, **_: [1.0] * len(prompts), 10.0)
    report = step(replace(parts, rewards=[Reward("identity", Identity(), 2.0), ones]))
    assert report.rollout.reward_BG.tolist() == [[10, 12, 14], [16, 18, 20]]
    assert set(report.rollout.scores.by_function) == {"identity", "ones"}


def test_shuffled_rewards_are_the_same_rewards_on_other_rows() -> None:
    report = step(caught(ends_often(tiny_policy()), grpo_config(shuffle_rewards=True), Identity()))
    dealt = report.rollout.reward_BG.flatten().tolist()
    assert sorted(dealt) == [0, 1, 2, 3, 4, 5] and dealt != sorted(dealt)


# --- steps that must not be taken ---


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_reported() -> None:
    policy = ends_often(tiny_policy())
    parts = learner(policy, grpo_config(mu=2))
    before, lr = weights(policy), parts.optimizer.lr
    spoil = policy.trainable()[0][1].register_hook(lambda gradient: gradient * math.nan)
    report = step(parts)
    assert not math.isfinite(report.grad_norm)
    assert largest_difference(weights(policy), before) == 0 and parts.optimizer.lr == lr
    assert report.tally.updates == 2  # no endless repetition in float32
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
    means = report.tally.means()
    assert means["ratio_min"] == means["ratio_max"] == 1


# --- the run around the step ---


def train_lines(tmp_path: Path, **fields: Any) -> list[dict[str, Any]]:
    """The log of a run, of one step unless `fields` say otherwise, on a GPT-2 with dropout."""
    tiny_policy("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).save(tmp_path / "model")
    arithmetic = {"task": "arithmetic", "difficulty": 1, "eval_problems": 2, "max_steps": 1, "max_prompt_tokens": 64}
    quiet = {"progress": False, "tensorboard": False, "show_every": 0, "output_dir": str(tmp_path / "run")}
    config = grpo_config(model=str(tmp_path / "model"), **(arithmetic | quiet | fields))
    config.check()
    folder = grpo_core.train.prepare(config).run()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_run_turns_dropout_off_in_policy_and_reference(tmp_path: Path) -> None:
    (line,) = train_lines(tmp_path, beta=0.1, gradient_checkpointing=True)
    assert line["sampler_gap_max"] < 1e-5
    assert line["kl"] == 0


def test_a_run_holds_no_reference_at_beta_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self, policy: Policy) -> None:
            raise AssertionError("a reference was made")

    monkeypatch.setattr(grpo_core.train, "Reference", Refused)
    assert train_lines(tmp_path, beta=0.0)[0]["kl"] == 0


@pytest.mark.parametrize("mu", [1, 2])
def test_the_schedule_spans_the_run_however_many_updates_a_step_takes(mu: int, tmp_path: Path) -> None:
    lines = train_lines(tmp_path, mu=mu, max_steps=4, lr=1e-3, lr_schedule="linear", eval_problems=0)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
