"""Where TRL 1.16.0 and this project mean to differ, each difference measured on both sides with the same inputs.

G is trl/trainer/grpo_trainer.py of TRL 1.16.0, C its grpo_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import ours, theirs
from benchmarks.parity.cases import BUDGET, Case, Trace, equal_rewards
from benchmarks.parity.compare import relative
from grpo_core.objective import token_weights
from rewards.tables import markdown
from sft_core.model.policy import load_policy
from sft_core.model.source import find_source


@dataclass(frozen=True)
class Declared:
    """One difference. `quantity` is measured on both sides; `cause` says what makes it, and what is done here."""

    what: str
    quantity: str
    theirs: float
    ours: float
    cause: str


def declared_differences(folder: Path) -> str:
    """The table of all of them."""
    rows = [["difference", "what is measured", "TRL", "here", "cause"]]
    for measure in MEASURES:
        d = measure(folder)
        rows.append([d.what, d.quantity, _shown(d.theirs), _shown(d.ours), d.cause])
    return markdown(rows)


def _shown(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:.3g}"


def _both(case: Case, folder: Path, trl: dict[str, Any] | None = None, **parts: Any) -> tuple[Trace, Trace]:
    """TRL's trace and ours. `trl` are arguments for TRL alone."""
    config = ours.configuration(case, folder)
    their_trace = theirs.run(case, config, folder, **parts, **(trl or {}))
    return their_trace, ours.run(case, config, their_trace.rollouts, **parts)


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def cispo_bound(folder: Path) -> Declared:
    case = Case("cispo", fields={"epsilon_high": 0.28})
    their_trace, our_trace = _both(case, folder, {"epsilon_high": 0.28})
    return Declared(
        "CISPO's bound",
        "gradient norm of an on-policy step at `epsilon_high` 0.28",
        _norm(their_trace.gradient[0]),
        _norm(our_trace.gradient[0]),
        "G:3110 bounds the weight by epsilon_high itself, so that below 1 it shrinks every token's; MiniMax-M1 (eq. 5) "
        "by 1 + epsilon_high, as here. TRL's bound of b, from 1 up, is epsilon_high = b - 1",
    )


def kl_times_ratio(folder: Path) -> Declared:
    case = Case(beta=0.1, mu=2)
    default = theirs.run(case, ours.configuration(case, folder), folder, use_bias_correction_kl=True)
    our_trace = ours.run(case, ours.configuration(case, folder), default.rollouts)
    return Declared(
        "KL times the ratio",
        "gradient norm of a second update at beta 0.1, each by its default",
        _norm(default.gradient[1]),
        _norm(our_trace.gradient[1]),
        "G:3104: use_bias_correction_kl is on by default, off in DeepSeekMath and here; `--kl_correction` turns it on",
    )


def reference_by_name(folder: Path) -> Declared:
    def trained(model: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator)

    their_trace, our_trace = _both(Case(beta=0.1), folder, change_model=trained)
    return Declared(
        "the reference",
        "KL at the first step of a model that was trained in memory",
        their_trace.metrics[0]["kl"],
        our_trace.metrics[0]["kl"],
        "G:1003 loads the reference again by the model's name; here it is a copy of the weights at the start",
    )


def window_of_dapo(folder: Path) -> Declared:
    case = Case(accumulation=2)
    config = ours.configuration(case, folder)
    trace = theirs.run(case, config, folder, gradient_accumulation_steps=1, steps_per_generation=2)
    return Declared(
        "dapo where generation spans two optimizer steps",
        "sum of the token weights of the first of them",
        trace.window_weight[0],
        float(token_weights(trace.mask[0], "token_mean", BUDGET).sum()),
        "G:3172 scales the generation batch's token count by ga/spg instead of counting the window's own tokens; here "
        "every optimizer step learns the whole batch",
    )


def _cut_in_two(case: Case, folder: Path) -> tuple[float, float]:
    """How much the first gradient changes when the batch is learned in two pieces, in TRL and here."""
    whole, halves = replace(case, accumulation=1), replace(case, accumulation=2)
    their_whole, our_whole = _both(whole, folder)
    their_halves, our_halves = _both(halves, folder)
    return (
        relative(their_halves.gradient[0], their_whole.gradient[0]),
        relative(our_halves.gradient[0], our_whole.gradient[0]),
    )


def bnpo_in_pieces(folder: Path) -> Declared:
    return Declared(
        "bnpo in micro-batches",
        "relative change of the gradient when the batch is learned in two pieces",
        *_cut_in_two(Case("bnpo"), folder),
        "G:3158 divides by the tokens of the micro-batch; here by those of the step, which makes it dapo",
    )


def top_entropy_in_pieces(folder: Path) -> Declared:
    return Declared(
        "high-entropy tokens in micro-batches",
        "the same with `top_entropy` 0.4",
        *_cut_in_two(Case(fields={"top_entropy": 0.4}), folder),
        "G:3050 takes the quantile of each micro-batch, again in each update; here one over the step, of the policy "
        "that sampled. Where it falls among tokens of equal entropy (a group's first ones), rounding decides in TRL; "
        "here all of them are kept",
    )


def entropy_bonus_in_pieces(folder: Path) -> Declared:
    return Declared(
        "entropy bonus in micro-batches",
        "the same with `entropy_coef` 1",
        *_cut_in_two(Case(fields={"entropy_coef": 1.0}), folder),
        "G:3199 averages the averages of micro-batches; here every token has the same weight",
    )


def entropy_metric_in_pieces(folder: Path) -> Declared:
    case = Case(accumulation=2)
    their_trace, our_trace = _both(case, folder)
    their_whole, our_whole = _both(Case(), folder)
    return Declared(
        "metrics in micro-batches",
        "change of the logged entropy when the batch is learned in two pieces",
        abs(their_trace.metrics[0]["entropy"] - their_whole.metrics[0]["entropy"]),
        abs(our_trace.metrics[0]["entropy"] - our_whole.metrics[0]["entropy"]),
        "G:3264 and 3311 log the mean of the micro-batches' means (kl and clip ratios too); here the mean over tokens",
    )


def clip_ratio_of_masked_sequences(folder: Path) -> Declared:
    case = Case("gspo", mu=2, mask_truncated=True)
    their_trace, our_trace = _both(case, folder)
    return Declared(
        "GSPO's clip ratio with masked completions",
        "logged share of clipped completions, a quarter of them masked",
        their_trace.metrics[0]["clip_ratio/low_mean"] + their_trace.metrics[0]["clip_ratio/high_mean"],
        our_trace.metrics[0]["clip_ratio_low"] + our_trace.metrics[0]["clip_ratio_high"],
        "G:3261 counts masked completions as unclipped ones; here they are not counted",
    )


def advantage_of_equal_rewards(folder: Path) -> Declared:
    case = Case(group_size=12)
    their_trace, our_trace = _both(case, folder, reward_functions=equal_rewards(0.01))
    return Declared(
        "equal rewards",
        "largest advantage in groups of twelve rewards of 0.01",
        float(their_trace.advantage[0].abs().max()),
        float(our_trace.advantage[0].abs().max()),
        "the float32 mean of twelve 0.01 is not 0.01 (G:2765); here equal is decided by max == min",
    )


def _error_against_rows_alone(folder: Path, case: Case, trace: Trace, logp_NT: Tensor) -> float:
    """The largest error of the first rollout's log-probabilities against each row alone: no padding, no dropout."""
    config = ours.configuration(case, folder)
    model, worst = load_policy(config, find_source(config)).model, 0.0
    for (prompt, completion), logp_T in zip(trace.rollouts[0], logp_NT, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / case.temperature
        alone_T = logits.log_softmax(dim=-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        worst = max(worst, float((logp_T[: len(completion)] - alone_T).abs().max()))
    return worst


def absolute_positions(folder: Path) -> Declared:
    case = Case(family="gpt2")
    config = ours.configuration(case, folder)
    their_trace = theirs.run(case, config, folder, ragged=True)
    our_trace = ours.run(case, config, their_trace.rollouts)
    return Declared(
        "left padding with absolute positions (GPT-2)",
        "largest error of a log-prob against the row alone, without padding",
        *(_error_against_rows_alone(folder, case, trace, trace.logp[0]) for trace in (their_trace, our_trace)),
        "G:1498 passes no position ids, so padding shifts the prompt; `generate` numbers rightly, so sampler and "
        "learner part. The comparison above therefore gives GPT-2 prompts of one length",
    )


def dropout_in_the_ratio(folder: Path) -> Declared:
    def with_dropout(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        model.train()

    case = Case(family="gpt2", mu=2)
    their_trace, our_trace = _both(case, folder, change_model=with_dropout)
    return Declared(
        "dropout",
        "largest error of an old log-prob against the model without dropout, dropout 0.1",
        *(_error_against_rows_alone(folder, case, trace, trace.old_logp[0]) for trace in (their_trace, our_trace)),
        "TRL computes old log-probs, and then new ones, each with dropout on (G:2646); here dropout is off for sampler "
        "and learner",
    )


def hidden_nan(folder: Path) -> Declared:
    def spoil(update: int, loss: Tensor) -> Tensor:
        return loss * math.nan if update == 1 else loss

    their_trace, our_trace = _both(Case(), folder, spoil_loss=spoil)
    lost = [
        sum(int(w.isnan().sum()) for w in trace.weights[1].values()) / sum(w.numel() for w in trace.weights[1].values())
        for trace in (their_trace, our_trace)
    ]
    logged = their_trace.metrics[1]["loss"], our_trace.metrics[1]["grad_norm"]
    return Declared(
        "a NaN loss",
        "share of weights that are NaN after it",
        lost[0],
        lost[1],
        f"TRL logs the loss as {logged[0]:.3g} (logging_nan_inf_filter) and takes the step; here grad_norm is logged "
        f"as {logged[1]:.3g}, and the step skipped and counted",
    )


MEASURES: list[Callable[[Path], Declared]] = [
    cispo_bound,
    kl_times_ratio,
    reference_by_name,
    window_of_dapo,
    bnpo_in_pieces,
    top_entropy_in_pieces,
    entropy_bonus_in_pieces,
    entropy_metric_in_pieces,
    clip_ratio_of_masked_sequences,
    advantage_of_equal_rewards,
    absolute_positions,
    dropout_in_the_ratio,
    hidden_nan,
]
