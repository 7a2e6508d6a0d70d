"""A second implementation of a GRPO step, to compare the first with: loops over rows and tokens, one row at a time
without padding, statistics by the standard library, and nothing of this project but the values of its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

# --loss: whose ratio, what a token contributes, what it weighs
NAMED = {
    "grpo": ("token", "clip", "sequence_mean"),
    "bnpo": ("token", "clip", "token_mean"),
    "dapo": ("token", "clip", "token_mean"),
    "dr_grpo": ("token", "clip", "constant_length"),
    "gspo": ("sequence", "clip", "sequence_mean"),
    "luspo": ("sequence", "clip", "sequence_sum"),
    "cispo": ("token", "cispo", "token_mean"),
    "sapo": ("token", "sapo", "sequence_mean"),
    "vespo": ("token", "vespo", "token_mean"),
}


def normalised(values: Sequence[float | None], std_of: Sequence[float | None] | None) -> list[float]:
    """(value - mean) / (standard deviation of `std_of` + 1e-4), 0 for None and where all are equal; `std_of` None:
    divided by 1."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return [0.0] * len(values)
    divisor = 1.0 if std_of is None else stdev([value for value in std_of if value is not None]) + 1e-4
    return [0.0 if value is None else (value - fmean(known)) / divisor for value in values]


def advantages(values: Sequence[Sequence[float | None]], weights: Sequence[float], config: Any) -> list[float]:
    """From each reward function's values to one advantage for each row."""
    G, N = config.group_size, len(values[0])

    def total(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
        sums: list[float | None] = []
        for row in range(N):
            terms = [w * c[row] for w, c, v in zip(weights, columns, values, strict=True) if v[row] is not None]  # type: ignore
            sums.append(sum(terms) if terms else None)
        return sums

    if config.reward_aggregation == "normalize_then_sum":
        scores = [sum((normalised(c[b : b + G], c[b : b + G]) for b in range(0, N, G)), []) for c in values]
        summed = total(scores)
        return normalised(summed, summed)
    rewards, found = total(values), []
    for b in range(0, N, G):
        group = rewards[b : b + G]
        found += normalised(group, {"group": group, "batch": rewards, "none": None}[config.scale_rewards])
    return found


class NaiveStep:
    """The loss of a step and its gradient, update by update.

    rows: prompt and completion ids; a completion that teaches nothing (`mask_truncated`) is empty.
    """

    def __init__(
        self, model: Any, config: Any, rows: list[tuple[list[int], list[int]]], advantages: list[float]
    ) -> None:
        self.model, self.config, self.rows, self.advantages = model, config, rows, advantages
        named = NAMED[config.loss]
        self.level = config.ratio_level or named[0]
        self.token_loss = config.token_loss or named[1]
        self.aggregation = config.aggregation or named[2]
        self.tokens = sum(len(completion) for _, completion in rows)
        self.old = self.reference = self.logps()
        self.kept = self.high_entropy_tokens()
        self.clipped_low = self.clipped_high = 0  # and the sums of all calls:
        self.kl = self.entropy = 0.0
        self.ratios: list[float] = []

    def distributions(self, prompt: list[int], completion: list[int]) -> list[Tensor]:
        """log pi(. | everything before it) for each token of one completion."""
        logits = self.model(torch.tensor([prompt + completion])).logits[0] / self.config.temperature
        return [logits[len(prompt) + t - 1].log_softmax(dim=0) for t in range(len(completion))]

    @torch.no_grad()
    def logps(self) -> list[list[Tensor]]:
        """Each row's tokens as the model scores them now."""
        scored = [(self.distributions(prompt, completion), completion) for prompt, completion in self.rows]
        return [[logp_V[token] for logp_V, token in zip(*row, strict=True)] for row in scored]

    @torch.no_grad()
    def high_entropy_tokens(self) -> set[tuple[int, int]]:
        """(row, token) of the `top_entropy` share: those above the quantile that linear interpolation gives."""
        if self.config.top_entropy == 1:
            return {(i, t) for i, (_, completion) in enumerate(self.rows) for t in range(len(completion))}
        entropies = {
            (i, t): -(logp_V.exp() * logp_V).sum().item()
            for i, (prompt, completion) in enumerate(self.rows)
            for t, logp_V in enumerate(self.distributions(prompt, completion))
        }
        ordered = sorted(entropies.values())
        place = (1 - self.config.top_entropy) * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        # The first tokens of a group are drawn from one and the same distribution: they tie but for rounding.
        bound = below + (above - below) * (place - math.floor(place)) - 1e-9
        return {at for at, entropy in entropies.items() if entropy >= bound}

    def weight(self, completion: list[int]) -> float:
        N = len(self.rows)
        return {
            "token_mean": 1 / self.tokens,
            "sequence_mean": 1 / N / len(completion),
            "constant_length": 1 / N / self.config.max_completion_tokens,
            "sequence_sum": 1 / N,
        }[self.aggregation]

    def gain(self, ratio: Tensor, new: Tensor, whole_ratio: float, A: float) -> Tensor:
        """What a token of advantage A adds to the objective; `whole_ratio` is its completion's."""
        config = self.config
        if self.token_loss == "clip":
            free = ratio
            if config.delta and ratio.item() > config.delta:
                free = torch.tensor(config.delta, dtype=ratio.dtype)
            bounded = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
            return free * A if (free * A).item() < (bounded * A).item() else bounded * A
        if self.token_loss == "cispo":
            return min(ratio.item(), 1 + config.epsilon_high) * A * new
        if self.token_loss == "sapo":
            tau = config.sapo_temperature_pos if A > 0 else config.sapo_temperature_neg
            return 4 / tau / (1 + (-tau * (ratio - 1)).exp()) * A
        k, decay = (
            (config.vespo_k_pos, config.vespo_lambda_pos) if A >= 0 else (config.vespo_k_neg, config.vespo_lambda_neg)
        )
        return whole_ratio**k * math.exp(decay * (1 - whole_ratio)) * A * new

    def loss_and_gradient(self) -> tuple[float, dict[str, Tensor]]:
        config, total = self.config, torch.zeros((), dtype=torch.float64)
        for i, (prompt, completion) in enumerate(self.rows):
            if not completion:
                continue
            distributions = self.distributions(prompt, completion)
            news = [logp_V[token] for logp_V, token in zip(distributions, completion, strict=True)]
            drifts = [old - new for old, new in zip(self.old[i], news, strict=True)]
            whole_ratio = math.exp(-sum(drift.item() for drift in drifts))
            left_behind = (
                0 < config.off_policy_threshold < fmean(drift.item() for drift in drifts) and self.advantages[i] < 0
            )
            if self.level == "sequence":
                ratios = [(-sum(drifts) / len(drifts)).exp()] * len(drifts)  # type: ignore[operator]
                self.count(ratios[0].item(), self.advantages[i])
            else:
                ratios = [(-drift).exp() for drift in drifts]
            for t, (logp_V, new, ratio) in enumerate(zip(distributions, news, ratios, strict=True)):
                A = self.advantages[i] if (i, t) in self.kept else 0.0
                if self.level == "token":
                    self.count(ratio.item(), A)
                gain = 0.0 if left_behind else self.gain(ratio, new, whole_ratio, A)
                ref = self.reference[i][t]
                kl = (ref - new).exp() - (ref - new) - 1
                if config.kl_correction:
                    kl = kl * ratio
                entropy = -(logp_V.exp() * logp_V).sum()
                total = total + self.weight(completion) * (config.beta * kl - gain)
                if (i, t) in self.kept:
                    total = total - config.entropy_coef * entropy / len(self.kept)
                self.kl += kl.item()
                self.entropy += entropy.item()
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        found = torch.autograd.grad(total, parameters)
        return total.item(), dict(zip(names, found, strict=True))

    def count(self, ratio: float, A: float) -> None:
        self.ratios.append(ratio)
        self.clipped_low += self.token_loss == "clip" and A < 0 and ratio < 1 - self.config.epsilon_low
        self.clipped_high += self.token_loss in ("clip", "cispo") and A > 0 and ratio > 1 + self.config.epsilon_high

    @torch.no_grad()
    def move(self, gradient: dict[str, Tensor], lr: float) -> None:
        for name, p in self.model.named_parameters():
            p -= lr * gradient[name]
