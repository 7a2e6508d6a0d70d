"""What is measured in a GRPO step, each quantity defined where it is computed.

Averages over tokens run over the completions' own tokens, over all micro-batches and updates of the step; padding
counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_core.advantages import nan_std, zero_spread
from grpo_core.config import GRPOConfig
from rewards import same_number
from sft_core.prompts import FORMATS
from sft_core.tasks import Example

if TYPE_CHECKING:
    from grpo_core.step import StepReport


class Tally:
    """Sums over the micro-batches of a step. Sums stay on the device until the step is over; reading one waits."""

    def __init__(self) -> None:
        self.updates = 0
        self.sums: dict[str, Tensor] = {}
        self.ratio_range: list[Tensor] = []
        self.gap: dict[str, float] = {}

    @torch.no_grad()
    def add(
        self,
        config: GRPOConfig,
        mask_NT: Tensor,
        weight_NT: Tensor,
        advantage_N: Tensor,
        ratio_NT: Tensor,
        surrogate_NT: Tensor,
        kl_NT: Tensor,
        entropy_NT: Tensor,
    ) -> None:
        """Count one micro-batch."""
        advantage_N1 = advantage_N[:, None]
        sums = {
            "tokens": mask_NT.sum(),
            "policy_loss": (weight_NT * surrogate_NT).sum(),
            "kl_loss": (weight_NT * kl_NT).sum(),
            "kl": kl_NT.sum(),
            "entropy": entropy_NT.sum(),
            # clipped: the surrogate is flat there, so these tokens no longer pull
            "clipped_low": (mask_NT & (ratio_NT < 1 - config.epsilon_low) & (advantage_N1 < 0)).sum(),
            "clipped_high": (mask_NT & (ratio_NT > 1 + config.epsilon_high) & (advantage_N1 > 0)).sum(),
        }
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.float()
        self.ratio_range.append(torch.stack(ratio_NT[mask_NT].aminmax()))

    @torch.no_grad()
    def compare(self, sampler_logp_NT: Tensor, old_logp: dict[int, Tensor], mask_NT: Tensor) -> None:
        """Sampler against learner: both scored the same tokens with the same weights, so they differ by rounding only.
        A larger gap means that the learner learns from samples of another distribution than its own."""
        gap = torch.cat(
            [
                (sampler_logp_NT[at : at + len(logp_NT), : logp_NT.shape[1]] - logp_NT).abs().flatten()
                for at, logp_NT in old_logp.items()
            ]
        )
        self.gap = {"sampler_gap_mean": float(gap.sum() / mask_NT.sum()), "sampler_gap_max": float(gap.max())}

    def means(self, beta: float) -> dict[str, float]:
        """Losses per update, token means, the ratio's range."""
        sums = {name: float(value) for name, value in self.sums.items()}
        ratios = torch.stack(self.ratio_range)
        policy_loss, kl_loss = sums["policy_loss"] / self.updates, sums["kl_loss"] / self.updates
        return {
            "grpo_loss": policy_loss + beta * kl_loss,
            "policy_loss": policy_loss,
            "kl_loss": kl_loss,
            "kl": sums["kl"] / sums["tokens"],
            "entropy": sums["entropy"] / sums["tokens"],
            "clip_ratio_low": sums["clipped_low"] / sums["tokens"],
            "clip_ratio_high": sums["clipped_high"] / sums["tokens"],
            "ratio_min": float(ratios[:, 0].min()),
            "ratio_max": float(ratios[:, 1].max()),
            **self.gap,
        }


def step_record(report: StepReport, examples: Sequence[Example], config: GRPOConfig) -> dict[str, Any]:
    """The log line of a step. Times in seconds: `backward_time_s` is the learner's (forward, backward and optimizer);
    `other_time_s` is all but generation and learner, so rewards and reference are within it."""
    rows, samples, seconds = report.samples.rows, report.samples, report.clock.seconds
    lengths_N = rows.completion_len_N.float()
    reward_BG, advantage_BG = report.reward_BG, report.advantage_BG
    known = reward_BG[~reward_BG.isnan()]
    flat_B = zero_spread(reward_BG)
    correct = [
        bool(a) and same_number(a, e) for a, e in zip(*extracted_and_expected(report, examples, config), strict=True)
    ]
    record: dict[str, Any] = {
        **report.tally.means(config.beta),
        "reward_mean": float(known.mean()),
        "reward_std": float(nan_std(reward_BG.flatten()[None])),
        "accuracy": sum(correct) / len(correct),
        "adv_mean": float(advantage_BG.mean()),
        "adv_std": float(nan_std(advantage_BG.flatten()[None])),
        "adv_abs_mean": float(advantage_BG.abs().mean()),
        "zero_variance_share": float(flat_B.float().mean()),  # groups that teach nothing
        "zero_variance_tokens": int((lengths_N.view(reward_BG.shape).cpu() * flat_B[:, None]).sum()),
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "length_mean": float(lengths_N.mean()),
        "length_max": int(lengths_N.max()),
        "truncated_share": float(samples.truncated_N.float().mean()),
        "tokens_generated": int(lengths_N.sum()),
        "time_per_step_s": report.clock.total,
        "generation_time_s": seconds["generation"],
        "reward_time_s": seconds["reward"],
        "reference_time_s": seconds["reference"],
        "backward_time_s": seconds["backward"],
        "other_time_s": report.clock.total - seconds["generation"] - seconds["backward"],
    }
    for name, values in report.scores.by_function.items():
        given = [value for value in values if value is not None]
        record[f"rewards/{name}"] = sum(given) / len(given) if given else None
    return record


def extracted_and_expected(
    report: StepReport, examples: Sequence[Example], config: GRPOConfig
) -> tuple[list[str], list[str]]:
    """For each row: the answer found by the prompt format's rule ('': none), and the gold one."""
    extract = FORMATS[config.prompt_format].extract
    expected = [example.answer for example in examples for _ in range(config.group_size)]
    return [extract(text) or "" for text in report.samples.texts], expected
