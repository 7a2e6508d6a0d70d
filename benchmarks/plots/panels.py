"""Which quantities stand on which sheet. A panel for which no run has logged anything is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.plots.lines import Panel, Value, logged
from grpo_core.doctor.readlog import Run

# A step's parts, which add up to it, and the fields that they are logged in.
PARTS = {
    "generation": "generation_time_s",
    "learner": "backward_time_s",
    "optimizer": "optimizer_time_s",
    "rewards": "reward_time_s",
    "reference": "reference_time_s",
}


def rate(tokens: str, seconds: str) -> Value:
    """Tokens a second."""

    def value(line: dict[str, Any]) -> float | None:
        if tokens not in line or seconds not in line:
            return None
        return line[tokens] / line[seconds] if line[tokens] is not None and line[seconds] else math.nan

    return value


def about(mean: str, std: str) -> tuple[Value, Value]:
    """One standard deviation below and above."""

    def bound(sign: int) -> Value:
        def value(line: dict[str, Any]) -> float | None:
            if line.get(mean) is None or line.get(std) is None:
                return None
            return line[mean] + sign * line[std]

        return value

    return bound(-1), bound(+1)


GRAD_NORM = Panel("gradient norm before clipping", "norm", logged("grad_norm"))
LEARNING_RATE = Panel("learning rate", "a step", logged("learning_rate"), setting=True)
SFT_LOSS = Panel("loss of SFT", "nats per token", logged("loss"))
SFT_HELDOUT = Panel("held-out loss of SFT", "nats per token", logged("heldout_loss"), "eval")
SKIPPED = Panel("skipped steps so far", "steps", logged("skipped_steps"), setting=True)
REWARD = Panel("mean reward of the samples", "reward", logged("reward_mean"))
LENGTH = Panel("mean length of the samples", "tokens", logged("length_mean"))
TRUNCATED = Panel("samples cut off by the budget", "of the samples", logged("truncated_share"), share=True)
FLAT = Panel("groups without any variance", "of the groups", logged("zero_variance_share"), share=True)
ADVANTAGE = Panel("mean absolute advantage", "advantage", logged("adv_abs_mean"))
WILSON = (logged("accuracy_low"), logged("accuracy_high"))

SHEETS: dict[str, list[Panel]] = {
    "losses": [
        Panel("GRPO loss", "loss", logged("grpo_loss")),
        Panel("policy loss", "loss", logged("policy_loss")),
        Panel("KL loss, before beta", "nats", logged("kl_loss"), reference=True),
        SFT_LOSS,
        SFT_HELDOUT,
        GRAD_NORM,
        LEARNING_RATE,
        SKIPPED,
    ],
    "rewards": [
        Panel("reward, mean ± std", "reward", logged("reward_mean"), band=about("reward_mean", "reward_std")),
        Panel("standard deviation of the rewards", "std of the reward", logged("reward_std")),
        Panel("advantage, mean ± std", "advantage", logged("adv_mean"), band=about("adv_mean", "adv_std")),
        ADVANTAGE,
        FLAT,
        Panel("correct samples", "of the samples", logged("accuracy"), share=True),
    ],
    "timing": [
        Panel("whole step", "seconds", logged("time_per_step_s")),
        Panel("generation", "seconds", logged("generation_time_s")),
        Panel("learner (forward and backward)", "seconds", logged("backward_time_s")),
        Panel("optimizer", "seconds", logged("optimizer_time_s")),
        Panel("all else (rewards, reference)", "seconds", logged("other_time_s")),
    ],
    "tokens": [
        Panel("tokens generated", "tokens a step", logged("tokens_generated")),
        Panel("generation", "tokens a second", rate("tokens_generated", "generation_time_s")),
        LENGTH,
        Panel("longest sample", "tokens", logged("length_max")),
        TRUNCATED,
        Panel("tokens of groups without variance", "tokens a step", logged("zero_variance_tokens")),
        Panel("tokens learned by SFT", "tokens a step", logged("tokens")),
        Panel("SFT", "tokens a second", rate("tokens", "time_per_step_s")),
    ],
    "curve": [
        REWARD,
        Panel("held-out accuracy, greedy", "of the problems", logged("accuracy"), "eval", WILSON, share=True),
        Panel("held-out answers that show working", "of the answers", logged("worked_share"), "eval", share=True),
        Panel("held-out answers in the format", "of the answers", logged("format_rate"), "eval", share=True),
        LENGTH,
        TRUNCATED,
        Panel("entropy", "nats per token", logged("entropy")),
        Panel("KL to the reference", "nats per token", logged("kl"), reference=True),
        Panel("clipped", "of the tokens", logged("clip_ratio_low", "clip_ratio_high"), share=True),
        FLAT,
        ADVANTAGE,
        SFT_LOSS,
        SFT_HELDOUT,
        GRAD_NORM,
        LEARNING_RATE,
    ],
}


def panels(sheet: str, runs: Sequence[Run]) -> list[Panel]:
    """The panels of a sheet for which any of the runs has logged something."""
    wanted = list(SHEETS[sheet])
    if sheet == "rewards":
        functions = dict.fromkeys(name for run in runs for name in run.functions)
        if len(functions) > 1:
            wanted += [Panel(f"reward: {name}", "mean reward", logged(f"rewards/{name}")) for name in functions]
    return [panel for panel in wanted if any(panel.points(run) for run in runs)]
