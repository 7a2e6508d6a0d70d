"""What is measured in a GRPO step, each quantity defined where it is computed.

Averages over tokens run over the completions' own tokens, over all micro-batches and updates of the step; padding
never counts.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from grpo_core.config import GRPOConfig
from grpo_core.dynamic import equal_groups
from grpo_core.objective import nan_std
from grpo_core.step import StepReport, Terms
from rewards import same_number
from sft_core.text.prompts import FORMATS


class Tally:
    """Sums over the micro-batches of a step. They stay on the device until the end: reading one waits for it."""

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self.updates = 0
        self.sums: dict[str, Tensor] = {}
        self.ratio_range: list[Tensor] = []
        self.first_ratio_range: list[Tensor] = []  # of the first update's micro-batches
        self.clipped_range: dict[int, list[Tensor]] = {}  # of each update's micro-batches
        self.gap: dict[str, float] = {}

    @classmethod
    def of(cls, report: StepReport) -> Tally:
        """All of a step's updates."""
        tally = cls(report.config)
        for micro_batches in report.updates:
            for terms in micro_batches:
                tally.add(terms)
            tally.updates += 1
        tally.compare(report.rollout.samples.logp_NT, report.old_logp_NT, report.rows.mask_NT)
        return tally

    @torch.no_grad()
    def add(self, terms: Terms) -> None:
        """Count one micro-batch. With sequence-level ratios each completion counts once."""
        loss, mask_NT, weight_NT, advantage_NT, ratio, surrogate_NT, kl_NT, entropy_NT = terms
        counted = mask_NT if ratio.shape == mask_NT.shape else mask_NT.any(dim=1, keepdim=True)
        advantage = advantage_NT if ratio.shape == mask_NT.shape else advantage_NT.sum(dim=1, keepdim=True)
        low, high = clipped_beyond(self.config)
        # clipped: the token loss is flat there, so these tokens have no gradient
        clipped_low, clipped_high = (
            counted & (ratio < low) & (advantage < 0),
            counted & (ratio > high) & (advantage > 0),
        )
        sums = {
            "loss": loss,
            "tokens": mask_NT.sum(),
            "ratios": counted.sum(),
            "policy_loss": (weight_NT * surrogate_NT).sum(),
            "kl_loss": (weight_NT * kl_NT).sum(),
            "kl": (mask_NT * kl_NT).sum(),
            "entropy": entropy_NT.sum(),
            "clipped_low": clipped_low.sum(),
            "clipped_high": clipped_high.sum(),
        }
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().to(
                torch.promote_types(value.dtype, torch.float32)
            )
        lowest, highest = torch.where(counted, ratio, torch.inf).min(), torch.where(counted, ratio, -torch.inf).max()
        ratio_range = torch.stack([lowest, highest])
        self.ratio_range.append(ratio_range)
        if self.updates == 0:
            self.first_ratio_range.append(ratio_range)
        share_low, share_high = (clipped.sum(dim=1) / counted.sum(dim=1) for clipped in (clipped_low, clipped_high))
        clipped = [share_low.nan_to_num(torch.inf).min(), share_high.nan_to_num(-torch.inf).max()]
        self.clipped_range.setdefault(self.updates, []).append(torch.stack(clipped))

    @torch.no_grad()
    def compare(self, sampler_logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor) -> None:
        """Sampler against learner: both scored the same tokens with the same weights, so they differ by rounding only.
        A larger gap means that the samples come from another distribution than the learner's."""
        gap_NT = torch.where(mask_NT, (sampler_logp_NT - old_logp_NT).abs(), 0.0)
        mean, largest = torch.stack([gap_NT.sum() / mask_NT.sum().clamp(min=1), gap_NT.max()]).tolist()
        self.gap = {"sampler_gap_mean": mean, "sampler_gap_max": largest}

    def means(self) -> dict[str, float]:
        """Losses per update, means over tokens, the range of the ratio."""
        sums = dict(zip(self.sums, torch.stack([value.double() for value in self.sums.values()]).tolist(), strict=True))
        tokens, counted = max(1.0, sums["tokens"]), max(1.0, sums["ratios"])
        lowest = highest = first_low = first_high = 1.0
        least = most = [0.0]
        if sums["ratios"]:  # else all completions were masked
            ranges = [self.ratio_range, self.first_ratio_range, *self.clipped_range.values()]
            of_each = torch.stack([_range(each) for each in ranges]).tolist()  # one wait for all of them
            (lowest, highest), (first_low, first_high), *clipped = of_each
            least, most = [low for low, _ in clipped], [high for _, high in clipped]
        return {
            "grpo_loss": sums["loss"] / self.updates,  # all that is differentiated
            "policy_loss": sums["policy_loss"] / self.updates,
            "kl_loss": sums["kl_loss"] / self.updates,  # before beta
            "kl": sums["kl"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "clip_ratio_low": sums["clipped_low"] / counted,
            "clip_ratio_high": sums["clipped_high"] / counted,
            "clip_ratio_low_min": sum(least) / len(least),  # of the least clipped completion, mean over the updates
            "clip_ratio_high_max": sum(most) / len(most),  # of the most clipped completion
            "ratio_min": lowest,
            "ratio_max": highest,
            "ratio_first_min": first_low,  # in the first update nothing has moved: 1, or old and new disagree
            "ratio_first_max": first_high,
            **self.gap,
        }


def _range(ranges: list[Tensor]) -> Tensor:
    """(lowest, highest) of all these."""
    found = torch.stack(ranges).double()
    return torch.stack([found[:, 0].min(), found[:, 1].max()])


def clipped_beyond(config: GRPOConfig) -> tuple[float, float]:
    """The ratios beyond which a token of negative, of positive advantage has no gradient of its own (CISPO: a bounded
    one)."""
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    bounds = {"clip": (low, high), "cispo": (-torch.inf, high)}
    return bounds.get(config.objective.token_loss, (-torch.inf, torch.inf))


def step_record(report: StepReport) -> dict[str, Any]:
    """The log line of a step. Times in seconds: `backward_time_s` is the learner's forward and backward;
    `other_time_s` is the step minus generation, learner and optimizer, so it includes rewards and reference."""
    samples, seconds, config = report.rollout.samples, report.clock.seconds, report.config
    truncated_N = samples.truncated_N.cpu()
    lengths_N = torch.tensor([len(completion) for completion in samples.rows.completion_ids()], dtype=torch.float32)
    ended_N = lengths_N[~truncated_N]
    reward_BG, advantage_BG = report.rollout.reward_BG, report.advantage_BG
    known = reward_BG[~reward_BG.isnan()]
    flat_B = equal_groups(report.rollout, config)
    answers = zip(*extracted_and_expected(report), strict=True)
    correct = [bool(extracted) and same_number(extracted, expected) for extracted, expected in answers]
    record: dict[str, Any] = {
        **Tally.of(report).means(),
        "reward_mean": float(known.mean()),
        "reward_std": float(nan_std(reward_BG.flatten()[None])),
        "accuracy": sum(correct) / len(correct),
        "adv_mean": float(advantage_BG.mean()),
        "adv_std": float(nan_std(advantage_BG.flatten()[None])),
        "adv_abs_mean": float(advantage_BG.abs().mean()),
        "zero_variance_share": float(flat_B.float().mean()),  # groups that teach nothing
        "zero_variance_tokens": int((lengths_N.view(reward_BG.shape) * flat_B[:, None]).sum()),
        "replaced_groups": report.rollout.replaced,  # by dynamic sampling
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "length_mean": float(lengths_N.mean()),
        "length_min": int(lengths_N.min()),
        "length_max": int(lengths_N.max()),
        # of the completions that ended themselves; 0 where none did
        "ended_length_mean": float(ended_N.mean()) if len(ended_N) else 0.0,
        "ended_length_min": int(ended_N.min()) if len(ended_N) else 0,
        "ended_length_max": int(ended_N.max()) if len(ended_N) else 0,
        "truncated_share": float(truncated_N.float().mean()),
        "tokens_generated": int(lengths_N.sum()),
        "time_per_step_s": report.clock.total,
        "generation_time_s": seconds["generation"],
        "reward_time_s": seconds["reward"],
        "reference_time_s": seconds["reference"],
        "backward_time_s": seconds["backward"],
        "optimizer_time_s": seconds["optimizer"],
        "other_time_s": report.clock.total - sum(seconds[name] for name in ("generation", "backward", "optimizer")),
    }
    for name, values in report.rollout.scores.by_function.items():
        given = [value for value in values if value is not None]
        record[f"rewards/{name}"] = sum(given) / len(given) if given else None
        record[f"rewards_std/{name}"] = statistics.stdev(given) if len(given) > 1 else None
    return record


def extracted_and_expected(report: StepReport) -> tuple[list[str], list[str]]:
    """For each row: the answer found by the prompt format's rule ('': none), and the gold one."""
    config, extract = report.config, FORMATS[report.config.prompt_format].extract
    expected = [example.answer for example in report.rollout.examples for _ in range(config.group_size)]
    return [extract(text) or "" for text in report.rollout.samples.texts], expected
