"""Group Relative Policy Optimization, one step: DeepSeekMath (arXiv 2402.03300), Algorithm 1, on a screen.

`grpo_core.one_page` is the same without options. Here speed, options and checks are functions with names.

paper                                   here
question q                              example of `examples`
outputs o_1 .. o_G ~ pi_old(. | q)      samples, rows b * G .. b * G + G - 1 for example b
reward r_i                              reward_BG
advantage A_i,t                         advantage_NT (one for all tokens of a completion)
pi_theta, pi_old, pi_ref                exp of logp_NT, old_logp_NT, ref_logp_NT
epsilon, beta, mu                       config.epsilon_low / epsilon_high, config.beta, config.mu
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eval.samples import Samples
from eval.sampling import sample
from grpo_core import variants
from grpo_core.config import GRPOConfig
from grpo_core.objective import (
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    k3_kl,
    token_advantages,
    token_weights,
)
from grpo_core.reference import Reference
from grpo_core.scoring import score_groups
from rewards import Reward, Scores
from sft_core.learn.clock import Stopwatch
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_ids


@dataclass(frozen=True)
class Rollout:
    """B groups of G completions; group b is rows b * G .. b * G + G - 1 of `samples` and of `scores`."""

    examples: Sequence[Example]
    samples: Samples
    scores: Scores
    reward_BG: Tensor  # float64, on the CPU: the weighted sums of `scores`
    replaced: int = 0  # groups that --dynamic_sampling threw away


class Terms(NamedTuple):
    """What one micro-batch of one update contributed to the loss, detached."""

    loss: Tensor
    mask_NT: Tensor
    weight_NT: Tensor
    advantage_NT: Tensor
    ratio: Tensor  # (n, t), or (n, 1) for whole completions
    surrogate_NT: Tensor
    kl_NT: Tensor
    entropy_NT: Tensor


@dataclass(frozen=True)
class StepReport:
    """What a step did, for logs and people."""

    config: GRPOConfig
    rollout: Rollout
    rows: Rows  # without the completions that --mask_truncated leaves out
    advantage_BG: Tensor
    kept_NT: Tensor  # bool: the tokens that the advantage acts on
    old_logp_NT: Tensor
    updates: list[list[Terms]]  # mu of them, each with its micro-batches
    grad_norm: float
    learning_rate: float
    clock: Stopwatch


def sample_groups(policy: Policy, examples: Sequence[Example], config: GRPOConfig) -> Samples:
    """G completions for each example, side by side: rows b * G .. b * G + G - 1 belong to example b."""
    prompts = [prompt_ids(policy.tokenizer, example, config) for example in examples]
    return sample(policy, [prompt for prompt in prompts for _ in range(config.group_size)], config.sampling)


def sample_and_score(learner: Learner, examples: Sequence[Example], clock: Stopwatch) -> Rollout:
    """The rollout of these examples."""
    samples = learner.sampler(learner.policy, examples, learner.config)
    clock.lap("generation")
    state = learner.optimizer.state
    scores, reward_BG = score_groups(learner.rewards, samples, examples, learner.config, state)
    clock.lap("reward")
    return Rollout(examples, samples, scores, reward_BG)


@dataclass(frozen=True)
class Learner:
    """All that a step works with."""

    config: GRPOConfig
    policy: Policy
    reference: Reference | None  # None where beta is 0
    rewards: list[Reward]
    optimizer: Optimizer
    sampler: Callable[[Policy, Sequence[Example], GRPOConfig], Samples] = sample_groups
    roll_out: Callable[[Learner, Sequence[Example], Stopwatch], Rollout] = sample_and_score


def grpo_step(learner: Learner, examples: Sequence[Example]) -> StepReport:
    """Sample a group of completions for each of B examples, then take `mu` optimizer steps on them."""
    config, policy, optimizer = learner.config, learner.policy, learner.optimizer
    clock, learning_rate = Stopwatch(policy.device), optimizer.lr

    rollout = learner.roll_out(learner, examples, clock)

    size = optimizer.micro_batch
    rows = variants.ended_rows(rollout.samples) if config.mask_truncated else rollout.samples.rows
    kept_NT = variants.kept_tokens(policy, rows, config, size) if config.top_entropy < 1 else rows.mask_NT
    advantage_BG = advantages(rollout, config)
    advantage_NT = token_advantages(advantage_BG, kept_NT, policy.logp_dtype)
    mask_NT, aggregation = rows.mask_NT.to(policy.logp_dtype), config.objective.aggregation
    weight_NT = token_weights(mask_NT, aggregation, config.max_completion_tokens)
    clock.lap("reward")

    if learner.reference:
        ref_logp_NT = learner.reference.logprobs(rows, config.temperature, size)
    clock.lap("reference")

    old_logp_NT = torch.zeros_like(rows.completion_NT, dtype=policy.logp_dtype)

    def learn(at: slice, micro: Rows) -> Terms:
        """The loss of one micro-batch, and its gradient."""
        cut, mask_NT = (at, slice(micro.completion_NT.shape[1])), micro.mask_NT
        logp_NT, entropy_NT = token_logprobs(policy, micro, config.temperature, config.entropy)
        if on_policy:  # this is pi_old, and the ratio is 1, with the gradient of log pi_theta
            old_logp_NT[cut] = logp_NT.detach()
        ratio = importance_ratio(logp_NT, old_logp_NT[cut], mask_NT, config.objective.ratio_level)
        surrogate_NT = policy_loss(ratio, logp_NT, old_logp_NT[cut], mask_NT, advantage_NT[cut], config)
        if config.vllm:
            taken = (old_logp_NT[cut], rollout.samples.logp_NT[cut], mask_NT)
            surrogate_NT = surrogate_NT * variants.sampler_correction(*taken, config.sampler_mode, config.sampler_cap)
        kl_NT = kl_penalty(ratio, logp_NT, ref_logp_NT[cut], config) if learner.reference else torch.zeros_like(logp_NT)
        loss = (weight_NT[cut] * (surrogate_NT + config.beta * kl_NT)).sum()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy_NT[kept_NT[cut]].sum() / kept_NT.sum().clamp(min=1)
        optimizer.backward(loss)
        terms = (loss, mask_NT, weight_NT[cut], advantage_NT[cut], ratio, surrogate_NT, kl_NT, entropy_NT)
        return Terms(*(term.detach() for term in terms))

    updates = []
    for update in range(config.mu):
        again, on_policy = True, update == 0
        while again:  # once; under fp16 until no gradient overflows
            terms_of_each = optimizer.accumulate(rows, learn)
            clock.lap("backward")
            grad_norm, again = optimizer.clip_and_step()
            clock.lap("optimizer")
        updates.append(terms_of_each)  # of the pass that counts
        if learner.reference:
            learner.reference.follow()
    taught = (rows, advantage_BG, kept_NT, rows.gathered(old_logp_NT, "old log-probabilities"), updates)
    return StepReport(config, rollout, *taught, grad_norm, learning_rate, clock)


# --- where the settings meet the mathematics


def advantages(rollout: Rollout, config: GRPOConfig) -> Tensor:
    """advantage_BG: rewards summed and normalised within groups, or each function normalised and then summed (GDPO)."""
    if config.reward_aggregation == "sum_then_normalize":
        return group_advantages(rollout.reward_BG, config.scale_rewards)
    return variants.decoupled_advantages(*variants.values_and_weights(rollout.scores, rollout.reward_BG))


def policy_loss(
    ratio: Tensor, logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, advantage_NT: Tensor, config: GRPOConfig
) -> Tensor:
    """What a token contributes before its weight and its KL: the clipped surrogate unless --loss says otherwise."""
    if config.objective.token_loss == "clip":
        bounds = (config.epsilon_low, config.epsilon_high, config.delta or torch.inf)
        loss_NT = clipped_surrogate(ratio, advantage_NT, *bounds)
    else:
        loss_NT = variants.token_loss(ratio, logp_NT, old_logp_NT, advantage_NT, config)
    if bound := config.off_policy_threshold:
        loss_NT = loss_NT * variants.near_policy_rows(logp_NT, old_logp_NT, mask_NT, advantage_NT, bound)
    return loss_NT


def kl_penalty(ratio: Tensor, logp_NT: Tensor, ref_logp_NT: Tensor, config: GRPOConfig) -> Tensor:
    """k3 of each token, times the ratio where --kl_correction asks for it."""
    kl_NT = k3_kl(logp_NT, ref_logp_NT)
    return variants.corrected_kl(kl_NT, ratio) if config.kl_correction else kl_NT
