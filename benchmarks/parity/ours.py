"""This project on a case: the real `grpo_step`, given the rollouts that TRL was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import grpo_core.step
from benchmarks.parity.cases import (
    BUDGET,
    PROMPTS_PER_STEP,
    REWARD_WEIGHTS,
    Case,
    Row,
    Trace,
    model_folder,
    rewards,
)
from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.metrics import step_record
from grpo_core.reference import Reference
from grpo_core.step import Learner, grpo_step
from rewards import Reward
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import pack_rows
from sft_core.model.policy import Policy, load_policy, without_dropout
from sft_core.model.source import find_source
from sft_core.text.example import Example


def configuration(case: Case, folder: Path) -> GRPOConfig:
    """The case as a configuration."""
    return GRPOConfig(
        **{
            "model": str(model_folder(case.family, folder)),
            "loss": case.loss,
            "beta": case.beta,
            "mu": case.mu,
            "temperature": case.temperature,
            "mask_truncated": case.mask_truncated,
            "prompts_per_step": PROMPTS_PER_STEP,
            "group_size": case.group_size,
            "max_completion_tokens": BUDGET,
            "micro_batch": case.rows // case.accumulation,
            "reward_weights": REWARD_WEIGHTS,
            "precision": "float32",
            "device": "cpu",
            "lr": 5.2e-3 if case.mu == 1 else 5e-3,  # so that the three or four steps move weights by 1e-2
            # Adam divides by the gradient's own size, and so makes steps of the rounding errors of gradients that are
            # zero in theory (GPT-2's key biases) unless its epsilon is above them.
            "adam_epsilon": 1e-4,
            "max_steps": case.updates,
            "epsilon_low": 0.4,  # so that a second update is clipped on both sides, in part
            "epsilon_high": 0.6,
            **case.fields,
        }
    )


class RecordingOptimizer(Optimizer):
    """The real optimizer, which notes what goes in and what comes out."""

    def __init__(
        self, policy: Policy, config: GRPOConfig, trace: Trace, spoil_loss: Callable[[int, Tensor], Tensor]
    ) -> None:
        super().__init__(policy, config, config.max_steps)
        self.policy, self.trace, self.spoil_loss = policy, trace, spoil_loss

    def backward(self, loss: Tensor) -> None:
        super().backward(self.spoil_loss(len(self.trace.loss), loss))

    def clip_and_step(self) -> tuple[float, bool]:
        named = self.policy.trainable()
        self.trace.gradient.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.trace.loss.append(float(self.loss))
        outcome = super().clip_and_step()
        self.trace.weights.append({name: p.detach().clone() for name, p in named})
        return outcome


@contextmanager
def noted_step(trace: Trace, mu: int) -> Iterator[None]:
    """Note the tensors that a `grpo_step` within the block computes with, as they pass through its functions."""
    passes: list[tuple[Tensor, Tensor, Tensor]] = []  # of each micro-batch: mask, log-probs, old log-probs
    references: list[Tensor] = []
    real_ratio, real_kl = grpo_core.step.importance_ratio, grpo_core.step.kl_penalty

    def ratio(logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, level: Any) -> Tensor:
        passes.append((mask_NT, logp_NT.detach(), old_logp_NT))
        return real_ratio(logp_NT, old_logp_NT, mask_NT, level)

    def kl(ratio: Tensor, logp_NT: Tensor, ref_logp_NT: Tensor, config: GRPOConfig) -> Tensor:
        references.append(ref_logp_NT)
        return real_kl(ratio, logp_NT, ref_logp_NT, config)

    with (
        patch.object(grpo_core.step, "importance_ratio", ratio),
        patch.object(grpo_core.step, "kl_penalty", kl),
    ):
        yield
    of_update = len(passes) // mu  # micro-batches
    cut = [passes[start : start + of_update] for start in range(0, len(passes), of_update)]
    masks, logps, olds = ([_stacked([one[part] for one in of_pass]) for of_pass in cut] for part in range(3))
    trace.mask.append(masks[0])
    trace.logp += logps
    trace.old_logp.append(olds[-1])
    if references:
        trace.ref_logp.append(_stacked(references[-of_update:]))


def _stacked(parts: list[Tensor]) -> Tensor:
    """Micro-batches of different widths one below the other, padded with 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def run(
    case: Case,
    config: GRPOConfig,
    rollouts: list[list[Row]],
    reward_functions: list[Any] | None = None,
    change_model: Callable[[Any], None] = lambda model: None,
    spoil_loss: Callable[[int, Tensor], Tensor] = lambda update, loss: loss,
) -> Trace:
    """One `grpo_step` for each rollout."""
    policy = load_policy(config, find_source(config))
    change_model(policy.model)
    reference = Reference(policy, config.ref_sync_every, config.ref_sync_mix) if config.beta else None
    without_dropout(policy.model)
    policy.model.train()
    start = {name: p.detach().clone() for name, p in policy.trainable()}
    trace = Trace(rollouts=rollouts, start=start)
    optimizer = RecordingOptimizer(policy, config, trace, spoil_loss)
    terms = [
        Reward(function.__name__, function, weight)
        for function, weight in zip(reward_functions or rewards(case.none_rewards), config.reward_weights, strict=True)
    ]
    for rollout in rollouts:
        samples = as_samples(policy, rollout)
        learner = Learner(config, policy, reference, terms, optimizer, partial(_replay, samples))
        with noted_step(trace, config.mu):
            report = grpo_step(learner, [Example("", "", "")] * PROMPTS_PER_STEP)
        trace.advantage.append(report.advantage_BG.flatten().float())
        trace.metrics.append(step_record(report))
    return trace


def _replay(samples: Samples, *_: Any) -> Samples:
    """A sampler that hands out what is there."""
    return samples


def as_samples(policy: Policy, rollout: list[Row]) -> Samples:
    """The rollout as if it had been sampled here, by a sampler whose log-probabilities are not compared."""
    rows = pack_rows([prompt for prompt, _ in rollout], [completion for _, completion in rollout], policy.pad_id)
    truncated_N = torch.tensor([completion[-1] not in policy.eos_ids for _, completion in rollout])
    texts = policy.tokenizer.batch_decode(rows.completion_ids(), skip_special_tokens=True)
    return Samples(rows, texts, truncated_N, torch.zeros_like(rows.mask_NT, dtype=torch.float32))
