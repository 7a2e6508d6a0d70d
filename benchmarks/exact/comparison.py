"""How far an estimate is from the truth, in size and in direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """An expected direction against a true gradient."""

    cosine: float
    size: float  # its length over the true gradient's
    rest: float  # the share of its length that lies across the true gradient: what no learning rate repairs


def compare(direction: Tensor, truth: Tensor) -> Comparison:
    """Cosine 0 and rest 0 for a direction of length 0."""
    length, true_length = direction.norm(), truth.norm()
    if length <= 1e-12 * true_length:
        return Comparison(0.0, 0.0, 0.0)
    across = direction - (direction @ truth) / true_length**2 * truth
    return Comparison(
        float(direction @ truth / (length * true_length)), float(length / true_length), float(across.norm() / length)
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())
