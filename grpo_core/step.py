"""Group Relative Policy Optimization, one step: DeepSeekMath (arXiv 2402.03300), Algorithm 1, on a screen.

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

import torch
from torch import Tensor

from eval.sampling import Samples
from grpo_core.config import GRPOConfig
from grpo_core.losses import advantages, kept_tokens, kl_penalty, learned_rows, policy_loss, token_advantages
from grpo_core.metrics import Tally
from grpo_core.objective import importance_ratio, token_weights
from grpo_core.reference import Reference
from grpo_core.rollout import Draw, Rollout, replace_equal_groups, sample_and_score, sample_groups
from rewards import Reward
from sft_core.clock import Stopwatch
from sft_core.logprobs import token_logprobs
from sft_core.optim import Optimizer
from sft_core.policy import Policy
from sft_core.rows import Rows
from sft_core.tasks import Example


@dataclass(frozen=True)
class Learner:
    """All that a step works with."""

    config: GRPOConfig
    policy: Policy
    reference: Reference | None  # None where beta is 0
    rewards: list[Reward]
    optimizer: Optimizer
    sampler: Callable[[Policy, Sequence[Example], GRPOConfig], Samples] = sample_groups


@dataclass(frozen=True)
class StepReport:
    """What a step did, for logs and people."""

    rollout: Rollout
    advantage_BG: Tensor
    kept_NT: Tensor  # bool: the tokens that the advantage acts on
    tally: Tally
    grad_norm: float
    learning_rate: float
    clock: Stopwatch


def grpo_step(learner: Learner, examples: Sequence[Example], more: Draw | None = None) -> StepReport:
    """Sample a group of completions for each of B examples, then take `mu` optimizer steps on them.

    `more` gives further examples where dynamic sampling asks for them.
    """
    config, policy, optimizer = learner.config, learner.policy, learner.optimizer
    clock, tally, learning_rate = Stopwatch(policy.device), Tally(config), optimizer.lr

    rollout = sample_and_score(learner, examples, clock)
    if more:
        rollout = replace_equal_groups(rollout, learner, more, clock)

    rows = learned_rows(rollout.samples, config)
    kept_NT = kept_tokens(policy, rows, config)
    advantage_BG = advantages(rollout, config)
    advantage_NT = token_advantages(advantage_BG, kept_NT, policy.logp_dtype)
    weight_NT = token_weights(
        rows.mask_NT.to(policy.logp_dtype), config.objective.aggregation, config.max_completion_tokens
    )
    clock.lap("reward")

    if learner.reference:
        ref_logp_NT = learner.reference.logprobs(rows, config.temperature, optimizer.micro_batch)
    clock.lap("reference")

    old_logp_NT = torch.zeros_like(rows.completion_NT, dtype=policy.logp_dtype)

    def learn(at: slice, micro: Rows) -> list[Tensor]:
        """The loss of one micro-batch, differentiated."""
        cut, mask_NT = (at, slice(micro.completion_NT.shape[1])), micro.mask_NT
        logp_NT, entropy_NT = token_logprobs(policy, micro, config.temperature, config.entropy)
        if on_policy:  # this is pi_old, and the ratio is 1, with the gradient of log pi_theta
            old_logp_NT[cut] = logp_NT.detach()
        ratio = importance_ratio(logp_NT, old_logp_NT[cut], mask_NT, config.objective.ratio_level)
        surrogate_NT = policy_loss(ratio, logp_NT, old_logp_NT[cut], mask_NT, advantage_NT[cut], config)
        kl_NT = torch.zeros_like(logp_NT)
        if learner.reference:
            kl_NT = kl_penalty(ratio, logp_NT, ref_logp_NT[cut], config)
        loss = (weight_NT[cut] * (surrogate_NT + config.beta * kl_NT)).sum()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy_NT[kept_NT[cut]].sum() / kept_NT.sum().clamp(min=1)
        optimizer.backward(loss)
        terms = (loss, mask_NT, weight_NT[cut], advantage_NT[cut], ratio, surrogate_NT, kl_NT, entropy_NT)
        return [term.detach() for term in terms]

    for update in range(config.mu):
        again, on_policy = True, update == 0
        while again:  # once; under fp16 until nothing overflows
            terms_of_each = optimizer.accumulate(rows, learn)
            clock.lap("backward")
            grad_norm, again = optimizer.clip_and_step()
            clock.lap("optimizer")
        tally.add_all(terms_of_each)  # of the pass that counts
        if learner.reference:
            learner.reference.follow()
    tally.compare(rollout.samples.logp_NT, old_logp_NT, rows.mask_NT)
    return StepReport(rollout, advantage_BG, kept_NT, tally, grad_norm, learning_rate, clock)
