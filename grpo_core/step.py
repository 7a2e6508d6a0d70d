"""Group Relative Policy Optimization, one step: DeepSeekMath (arXiv 2402.03300), Algorithm 1, on a screen.

paper                                   here
question q                              example of `examples`
outputs o_1 .. o_G ~ pi_old(. | q)      samples, rows b * G .. b * G + G - 1 for example b
reward r_i                              reward_BG
advantage A_i,t                         advantage_N (one for all tokens of a completion)
pi_theta, pi_old, pi_ref                exp of logp_NT, old_logp_NT, ref_logp_NT
epsilon, beta, mu                       config.epsilon_low / epsilon_high, config.beta, config.mu
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.sampling import Samples, sample
from grpo_core.advantages import group_advantages
from grpo_core.config import GRPOConfig
from grpo_core.metrics import Tally
from grpo_core.objective import clipped_surrogate, importance_ratio, k3_kl, token_weights
from grpo_core.reference import Reference
from rewards import Reward, Scores, score
from sft_core.logprobs import token_logprobs
from sft_core.optim import Optimizer
from sft_core.policy import Policy
from sft_core.prompts import encode_prompt, prompt_messages
from sft_core.runlog import Stopwatch
from sft_core.tasks import Example

REWARD_COLUMNS = ("question", "answer", "solution")  # what reward functions get of an `Example`, by these names


@dataclass(frozen=True)
class Learner:
    """All that a step works with."""

    config: GRPOConfig
    policy: Policy
    reference: Reference | None  # None where beta is 0
    rewards: list[Reward]
    optimizer: Optimizer


@dataclass(frozen=True)
class StepReport:
    """What a step did, for logs and people."""

    samples: Samples
    scores: Scores
    reward_BG: Tensor
    advantage_BG: Tensor
    tally: Tally
    grad_norm: float
    learning_rate: float
    clock: Stopwatch


def grpo_step(learner: Learner, examples: Sequence[Example]) -> StepReport:
    """Sample a group of completions for each of B examples, then take `mu` optimizer steps on them."""
    config, policy, optimizer = learner.config, learner.policy, learner.optimizer
    clock, tally, learning_rate = Stopwatch(policy.device), Tally(), optimizer.lr

    samples = sample_groups(policy, examples, config)
    rows = samples.rows
    clock.lap("generation")

    scores, reward_BG = score_groups(learner.rewards, samples, examples, config)
    advantage_BG = group_advantages(reward_BG, config.scale_rewards)
    advantage_N = advantage_BG.flatten().to(policy.device)
    weight_NT = token_weights(rows.mask_NT, config.aggregation, config.max_completion_tokens)
    clock.lap("reward")

    if learner.reference:
        ref_logp_NT = learner.reference.logprobs(rows, config.temperature, config.micro_batch)
    clock.lap("reference")

    old_logp: dict[int, Tensor] = {}  # micro-batch -> its log-probabilities in the first pass, before any step: pi_old
    for _ in range(config.mu):
        again = True
        while again:  # once; under fp16 until nothing overflows
            for at, micro in rows.micro_batches(config.micro_batch):
                cut = (at, slice(micro.completion_NT.shape[1]))
                logp_NT, entropy_NT = token_logprobs(policy, micro, config.temperature)
                old_logp_NT = old_logp.setdefault(at.start, logp_NT.detach())
                ratio_NT = importance_ratio(logp_NT, old_logp_NT)  # first pass: 1, with the gradient of log pi_theta
                surrogate_NT = clipped_surrogate(ratio_NT, advantage_N[at], config.epsilon_low, config.epsilon_high)
                kl_NT = k3_kl(logp_NT, ref_logp_NT[cut]) if learner.reference else torch.zeros_like(logp_NT)
                loss = (weight_NT[cut] * (surrogate_NT + config.beta * kl_NT)).sum()
                optimizer.backward(loss)
                tally.add(
                    config, micro.mask_NT, weight_NT[cut], advantage_N[at], ratio_NT, surrogate_NT, kl_NT, entropy_NT
                )
            grad_norm, again = optimizer.clip_and_step()
            tally.updates += 1
    tally.compare(samples.logp_NT, old_logp, rows.mask_NT)
    clock.lap("backward")
    return StepReport(samples, scores, reward_BG, advantage_BG, tally, grad_norm, learning_rate, clock)


def sample_groups(policy: Policy, examples: Sequence[Example], config: GRPOConfig) -> Samples:
    """G completions for each example, side by side: rows b * G .. b * G + G - 1 belong to example b."""
    prompts = [encode_prompt(policy.tokenizer, prompt_messages(example, config)) for example in examples]
    return sample(policy, [prompt for prompt in prompts for _ in range(config.group_size)], config.sampling)


def score_groups(
    rewards: list[Reward], samples: Samples, examples: Sequence[Example], config: GRPOConfig
) -> tuple[Scores, Tensor]:
    """Every reward function's values, and their weighted sums as reward_BG (float32, on the CPU)."""
    repeated = [example for example in examples for _ in range(config.group_size)]
    columns = {name: [getattr(example, name) for example in repeated] for name in REWARD_COLUMNS}
    scores = score(rewards, columns["question"], samples.texts, columns)
    reward_N = torch.tensor(scores.total, dtype=torch.float32)
    if config.shuffle_rewards:
        reward_N = reward_N[torch.randperm(len(reward_N))]
    return scores, reward_N.view(len(examples), config.group_size)
