"""How far two traces are apart, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.parity.cases import Case, Trace
from grpo_core.objective import LOSSES

# Stage -> the largest difference allowed: absolute, but relative for losses and metrics above 1, and for gradients
# relative to the parameter's largest entry.
BOUNDS = {
    "masks": 0.0,
    "advantages": 2e-6,
    "log-probs": 1e-5,
    "old log-probs": 1e-5,
    "reference log-probs": 1e-5,
    "KL": 1e-6,
    "loss": 1e-6,
    "gradients": 1e-5,
    "metrics": 1e-5,
    "weights": 2e-5,
}

# Our metric -> TRL's name for it.
SAME_METRICS = {
    "grpo_loss": "loss",
    "reward_mean": "reward",
    "reward_std": "reward_std",
    "zero_variance_share": "frac_reward_zero_std",
    "rewards/first": "rewards/first/mean",
    "rewards/second": "rewards/second/mean",
    "rewards_std/first": "rewards/first/std",
    "rewards_std/second": "rewards/second/std",
    "length_mean": "completions/mean_length",
    "length_min": "completions/min_length",
    "length_max": "completions/max_length",
    "truncated_share": "completions/clipped_ratio",
    "ended_length_mean": "completions/mean_terminated_length",
    "ended_length_min": "completions/min_terminated_length",
    "ended_length_max": "completions/max_terminated_length",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}
# Over tokens: TRL averages the averages of micro-batches, so these agree where the batch is learned in one piece.
SAME_TOKEN_METRICS = {
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio_low": "clip_ratio/low_mean",
    "clip_ratio_high": "clip_ratio/high_mean",
    "clip_ratio_low_min": "clip_ratio/low_min",
    "clip_ratio_high_max": "clip_ratio/high_max",
}


def differences(case: Case, ours: Trace, theirs: Trace) -> dict[str, float]:
    """Stage -> the largest difference over all rollouts or updates; nan where the stage does not occur."""
    return {
        "masks": _largest((a != b).float() for a, b in _pairs(ours.mask, theirs.mask)),
        "advantages": _largest(a - b for a, b in _pairs(ours.advantage, theirs.advantage)),
        "log-probs": _largest(a - b for a, b in _pairs(ours.logp, theirs.logp)),
        "old log-probs": _largest(a - b for a, b in _pairs(ours.old_logp, theirs.old_logp))
        if case.mu > 1
        else math.nan,
        "reference log-probs": _largest(a - b for a, b in _pairs(ours.ref_logp, theirs.ref_logp))
        if case.beta
        else math.nan,
        "KL": _metric_differences(case, ours, theirs).get("kl", math.nan),
        "loss": _loss_difference(case, ours, theirs),
        "gradients": max(relative(a, b) for a, b in zip(ours.gradient, theirs.gradient, strict=True)),
        "metrics": max(_metric_differences(case, ours, theirs).values()),
        "weights": max(
            float((a[name] - b[name]).abs().max())
            for a, b in zip(ours.weights, theirs.weights, strict=True)
            for name in a
        ),
    }


def _loss_difference(case: Case, ours: Trace, theirs: Trace) -> float:
    """Relative to the size of the loss's terms, or to the loss where that is larger. Most terms are of size 1, an
    advantage times a ratio; CISPO's and VESPO's are advantages times log-probabilities, of several nats, and a sum over
    a completion's tokens has as many terms as the completion is long."""
    loss = LOSSES[case.loss]
    size = ours.metrics[0]["length_mean"] if loss.aggregation == "sequence_sum" else 1.0
    if loss.token_loss in ("cispo", "vespo"):
        size *= float(ours.logp[0][ours.mask[0]].abs().mean())
    return max(abs(a - b) / max(size, abs(b)) for a, b in zip(ours.loss, theirs.loss, strict=True))


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference between two gradients of one parameter over that parameter's largest entry; parameters
    whose gradient is rounding (below a millionth of the largest) count against the largest."""
    assert ours.keys() == theirs.keys()
    floor = max(1e-30, 1e-6 * max(float(gradient.abs().max()) for gradient in theirs.values()))
    return max(
        float((ours[name] - theirs[name]).abs().max()) / max(float(theirs[name].abs().max()), floor) for name in theirs
    )


def moved(trace: Trace) -> float:
    """How far the weight that moved most has gone."""
    return max(float((trace.weights[-1][name] - start).abs().max()) for name, start in trace.start.items())


def _metric_differences(case: Case, ours: Trace, theirs: Trace) -> dict[str, float]:
    """Metric -> its largest difference, relative where the values are above 1."""
    names = dict(SAME_METRICS)
    if case.accumulation == 1:
        names |= SAME_TOKEN_METRICS | ({"clip_ratio_high": "cispo_clip_ratio"} if case.loss == "cispo" else {})
    if case.mask_truncated and case.fields.get("ratio_level", LOSSES[case.loss].ratio_level) == "sequence":
        for name in ("clip_ratio_low", "clip_ratio_high"):
            names.pop(name, None)  # TRL counts the masked completions: a declared difference
    if case.fields.get("scale_rewards") == "batch" or "reward_aggregation" in case.fields:
        del names["zero_variance_share"]  # TRL then looks at the batch's spread
    found: dict[str, float] = {}
    for mine, its in zip(ours.metrics, theirs.metrics, strict=True):
        for name, other in names.items():
            if other in its and mine[name] is not None:
                scale = max(1.0, abs(its[other]))
                found[other] = max(found.get(other, 0.0), abs(mine[name] - its[other]) / scale)
    return found


def _pairs(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """The same rollout or update of both, in one width: what is beyond the narrower one's is padding."""
    for mine, its in zip(ours, theirs, strict=True):
        if mine.dim() == 2:
            width = max(mine.shape[1], its.shape[1])
            mine, its = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (mine, its))
        yield mine, its


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)
