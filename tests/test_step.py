"""What `grpo_core.step` claims: what is sampled is what is scored and learned, each row with its own reward.

That the loss and its gradient are right is in test_float64.py; that they do not depend on how a batch is cut, padded or
recomputed is in test_invariances.py.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_core.job
import grpo_core.train
from eval.sampling import Samples
from grpo_core.metrics import Tally, step_record
from grpo_core.step import grpo_step, sample_groups
from rewards import Reward
from sft_core.learn.logprobs import token_logprobs
from sft_core.model.policy import Policy, without_dropout
from sft_core.text.prompts import encode_prompt, prompt_messages
from sft_core.text.tasks import load_task
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
    gradients,
    grpo_config,
    largest_difference,
    learner,
    step,
    tiny_policy,
    weights,
    with_samples,
)
from tests.naive import NaiveStep

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
        NaiveStep(model, config, completions(report.rollout.samples), [0.0] * 6).old
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
    record = step_record(report)
    assert record["reward_mean"] == 2.0 and record["rewards/reward"] == 2.0


def test_a_step_that_no_reward_function_judged_teaches_nothing_and_can_be_logged() -> None:
    policy, config = ends_often(tiny_policy()), grpo_config()
    parts = caught(policy, config, lambda prompts, **_: [None] * len(prompts))
    report = step(parts)
    (gradient,) = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert all((g == 0).all() for g in gradient.values())
    record = step_record(report)
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


# --- the run around the step ---


def train_lines(tmp_path: Path, **fields: Any) -> list[dict[str, Any]]:
    """The log of a run, of one step unless `fields` say otherwise, on a GPT-2 with dropout."""
    tiny_policy("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).save(tmp_path / "model")
    arithmetic = {"task": "arithmetic", "difficulty": 1, "eval_problems": 2, "max_steps": 1, "max_prompt_tokens": 64}
    quiet = {"progress": False, "tensorboard": False, "show_every": 0, "output_dir": str(tmp_path / "run")}
    config = grpo_config(model=str(tmp_path / "model"), **(arithmetic | quiet | fields))
    config.check()
    folder = grpo_core.train.run(grpo_core.job.prepare(config))
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

    monkeypatch.setattr(grpo_core.job, "Reference", Refused)
    assert train_lines(tmp_path, beta=0.0)[0]["kl"] == 0


@pytest.mark.parametrize("mu", [1, 2])
def test_the_schedule_spans_the_run_however_many_updates_a_step_takes(mu: int, tmp_path: Path) -> None:
    lines = train_lines(tmp_path, mu=mu, max_steps=4, lr=1e-3, lr_schedule="linear", eval_problems=0)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize(("attempts", "replaced"), [(0, 0), (2, 4)])
def test_a_run_draws_further_prompts_where_dynamic_sampling_asks_for_them(
    attempts: int, replaced: int, tmp_path: Path
) -> None:
    """An untrained model is never right: both groups of a step are equal, and so are all that replace them."""
    lines = train_lines(tmp_path, dynamic_sampling=attempts, max_steps=2)
    assert [line["replaced_groups"] for line in lines] == [replaced] * 2
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    questions = list(dict.fromkeys(record["question"] for record in records))
    task = load_task(grpo_config(task="arithmetic", difficulty=1, eval_problems=2), seed=42)
    walk = [example.question for example in task.draw(0, 4 + 2 * replaced, 42)]
    # Each step's last two draws are what it learns.
    assert questions == [*walk[replaced : replaced + 2], *walk[2 * replaced + 2 : 2 * replaced + 4]]


@pytest.mark.parametrize("every", [0, 1])
def test_a_runs_reference_follows_where_asked(every: int, tmp_path: Path) -> None:
    moving = {"lr": 1e-2, "entropy_coef": 1.0, "max_steps": 3}  # an untrained model earns nothing
    lines = train_lines(tmp_path, beta=0.1, ref_sync_every=every, ref_sync_mix=1.0, **moving)
    assert lines[0]["kl"] == 0
    assert all((line["kl"] == 0) == (every == 1) for line in lines[1:])


def test_the_training_step_fits_on_a_screen() -> None:
    """60 lines of at most 120 characters, its docstring within: what an editor shows at once."""
    lines = inspect.getsource(grpo_step).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
