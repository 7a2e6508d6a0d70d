"""How far two traces are apart, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.parity.cases import Case, Trace
from grpo_core.config import LOSSES

# Stage -> the largest difference allowed: absolute, but relative for losses and metrics above 1, and for gradients
# (see `relative`).
LEAST_MOVED = 1e-2  # the weight that moved most: a comparison of trajectories that stand still proves nothing
BOUNDS = {
    "masks": 0.0,
    "advantages": 2e-6,
    "log-probs": 1e-5,
    "old log-probs": 1e-5,
    "reference log-probs": 1e-5,
    "KL": 1e-6,
    "loss": 1e-6,
    "gradients": 2e-5,  # 7e-6 on the record's CPU; VESPO reaches 1.2e-5 on an Intel Xeon, by rounding
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
CLIP_METRICS = {
    "clip_ratio_low": "clip_ratio/low_mean",
    "clip_ratio_high": "clip_ratio/high_mean",
    "clip_ratio_low_min": "clip_ratio/low_min",
    "clip_ratio_high_max": "clip_ratio/high_max",
}


def differences(case: Case, ours: Trace, theirs: Trace) -> dict[str, float | None]:
    """Stage -> the largest difference over all rollouts or updates; None where the stage does not occur."""
    metrics = metric_differences(case, ours, theirs)
    return {
        "masks": _largest(_apart(ours.mask, theirs.mask)),
        "advantages": _largest(_apart(ours.advantage, theirs.advantage)),
        "log-probs": _largest(_apart(ours.logp, theirs.logp)),
        "old log-probs": _largest(_apart(ours.old_logp, theirs.old_logp)) if case.mu > 1 else None,
        "reference log-probs": _largest(_apart(ours.ref_logp, theirs.ref_logp)) if case.beta else None,
        "KL": metrics["kl"] if case.beta and case.accumulation == 1 else None,
        "loss": _loss_difference(case, ours, theirs),
        "gradients": _largest(relative(a, b) for a, b in zip(ours.gradient, theirs.gradient, strict=True)),
        "metrics": _largest(metrics.values()),
        "weights": _largest(
            float((a[name] - b[name]).abs().max())
            for a, b in zip(ours.weights, theirs.weights, strict=True)
            for name in a
        ),
    }


def over_bound(found: dict[str, float | None]) -> list[str]:
    """The stages whose difference is above its bound, or not a number."""
    return [stage for stage, value in found.items() if value is not None and not value <= BOUNDS[stage]]


def _loss_difference(case: Case, ours: Trace, theirs: Trace) -> float:
    """Relative to the size of the loss's terms, or to the loss where that is larger. Most terms are of size 1, an
    advantage times a ratio; CISPO's and VESPO's are advantages times log-probabilities, of several nats, and a sum over
    a completion's tokens has as many terms as the completion is long."""
    loss = LOSSES[case.loss]
    size = theirs.metrics[0]["completions/mean_length"] if loss.aggregation == "sequence_sum" else 1.0
    if loss.token_loss in ("cispo", "vespo"):
        size *= float(theirs.logp[0][theirs.mask[0]].abs().mean())
    return _largest(abs(a - b) / max(size, abs(b)) for a, b in zip(ours.loss, theirs.loss, strict=True))


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of each parameter the norm of the difference of its two gradients, over its gradient's norm, or over a hundredth
    of the whole gradient's where that is larger; the largest of these. (Small gradients can be what large terms have
    left: a key bias moves all scores of a query alike, which the softmax does not see, but for rotary positions.)"""
    assert ours.keys() == theirs.keys()
    whole = float(torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    floor = max(1e-30, whole / 100)
    return _largest(
        float((ours[name] - theirs[name]).norm()) / max(float(theirs[name].norm()), floor) for name in theirs
    )


def moved(trace: Trace) -> float:
    """How far the weight that moved most has gone."""
    return max(float((trace.weights[-1][name] - start).abs().max()) for name, start in trace.start.items())


def metric_differences(case: Case, ours: Trace, theirs: Trace) -> dict[str, float]:
    """TRL's metric -> the largest difference: relative where values are above 1, and for the learning rate."""
    found: dict[str, list[float]] = {other: [] for other in metrics_of(case).values()}
    for mine, its in zip(ours.metrics, theirs.metrics, strict=True):
        for name, other in metrics_of(case).items():
            if mine[name] is None and its.get(other) is None:
                continue  # the standard deviation of fewer than two rewards
            scale = max(1e-9 if other == "learning_rate" else 1.0, abs(its[other]))
            found[other].append(abs(mine[name] - its[other]) / scale)
    return {other: _largest(values) for other, values in found.items()}


def metrics_of(case: Case) -> dict[str, str]:
    """Our metric -> TRL's, for all that both must log of this case."""
    names = dict(SAME_METRICS)
    kind = case.fields.get("token_loss", LOSSES[case.loss].token_loss)
    level = case.fields.get("ratio_level", LOSSES[case.loss].ratio_level)
    if case.accumulation == 1:
        names |= {"entropy": "entropy"} | ({"kl": "kl"} if case.beta else {})
        if kind == "clip" and not (case.mask_truncated and level == "sequence"):  # then masked rows count in TRL:
            names |= CLIP_METRICS  # a declared difference
        if kind == "cispo":
            names |= {"clip_ratio_high": "cispo_clip_ratio"}
    if case.fields.get("scale_rewards") == "batch" or "reward_aggregation" in case.fields:
        del names["zero_variance_share"]  # TRL then looks at the batch's standard deviation
    return names


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Iterable[float]:
    """The largest difference within each rollout or update, in one width: what is beyond the narrower one's is
    padding."""
    for mine, its in zip(ours, theirs, strict=True):
        if mine.dim() == 2:
            width = max(mine.shape[1], its.shape[1])
            mine, its = (torch.nn.functional.pad(x.float(), (0, width - x.shape[1])) for x in (mine, its))
        yield float((mine - its).abs().max())


def _largest(values: Iterable[float]) -> float:
    """NaN where any is: nothing that is not a number may pass for small."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())
