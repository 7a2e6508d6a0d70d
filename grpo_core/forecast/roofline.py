"""The least time that a step can take on a machine, phase by phase: its arithmetic at the machine's rate for matrix
products, or its traffic at the memory's bandwidth, whichever takes longer (the roofline model).

Real steps take longer: kernels are launched one by one, small products do not reach a machine's rate, Python runs in
between. The forecast is good for which phase will be long, and what limits it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import Ceilings
from grpo_core.forecast.memory import batches_of
from sft_core.learn.footprint import HALF, SINGLE, Batch, Lengths, kept_bytes
from sft_core.model.shapes import Shapes

LOGIT_PASSES = 6  # times that a chunk's logits are read or written in a forward pass; as many in its backward pass
ADAMW = 40  # bytes a trained weight: the gradient read for its norm, scaled, read; weight and two moments read, written


@dataclass(frozen=True)
class Phase:
    """What a phase computes (flops; a multiply-add is two) and moves (bytes)."""

    flops: float
    bytes: float

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Phase:
        return Phase(self.flops * times, self.bytes * times)

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)

    def bound(self, ceilings: Ceilings) -> str:
        """What limits it: arithmetic or memory."""
        return "arithmetic" if self.flops / ceilings.flops > self.bytes / ceilings.bytes else "memory"


def phases(config: GRPOConfig, shapes: Shapes, half: bool, lengths: Lengths) -> dict[str, Phase]:
    """The phases of a step in their order, those that there are. The way of offloaded moments, over a bus or from a
    disk, is not counted."""
    found = {"prefill": prefill(config, shapes, half, lengths), "decode": decode(config, shapes, half, lengths)}
    batches = batches_of(config, shapes, lengths)
    if config.beta:
        halved = half and config.half_copies and not shapes.adapter and not config.ref_sync_every
        found["reference"] = _total(forward(shapes, half, halved, b.tokens, b.pairs, b.predicted) for b in batches)
    learner = _total(_learned(config, shapes, half, b) for b in batches) * config.mu
    if config.top_entropy < 1:
        learner += _total(forward(shapes, half, False, b.tokens, b.pairs, b.predicted) for b in batches)
    found["learner"] = learner
    found["optimizer"] = Phase(0, ADAMW * sum(shapes.trained)) * config.mu
    return found


def prefill(config: GRPOConfig, shapes: Shapes, half: bool, lengths: Lengths) -> Phase:
    """The prompts, each once where they are shared."""
    read = config.prompts_per_step * (1 if config.share_prompts else config.group_size) * lengths.prompt
    return forward(shapes, half, config.half_copies, read, read * lengths.prompt / 2, 0)


def decode(config: GRPOConfig, shapes: Shapes, half: bool, lengths: Lengths) -> Phase:
    """A token of every row at a time, for as long as the longest completion; each token reads all weights and its rows'
    keys and values."""
    rows = config.prompts_per_step * config.group_size
    width = lengths.prompt + lengths.completion / 2  # on average
    token = forward(shapes, half, config.half_copies, rows, rows * width, rows)
    cache = 2 * (HALF if half else SINGLE) * shapes.keys * shapes.layers * rows * width
    return (token + Phase(0, cache)) * lengths.completion


def forward(shapes: Shapes, half: bool, halved: bool, tokens: int, pairs: float, predicted: int) -> Phase:
    """`tokens` through the layers, `pairs` of a query and a key through attention, `predicted` tokens through the head.
    `halved`: the matrices are kept in half precision; else autocast reads, writes and reads them again."""
    layers = shapes.layers * (2 * shapes.layer * tokens + 4 * shapes.queries * pairs)
    matrices = shapes.layers * shapes.layer + (shapes.head if predicted else 0)
    logits = LOGIT_PASSES * SINGLE * predicted * shapes.vocab
    return Phase(layers + 2 * shapes.head * predicted, _weight_bytes(half, halved) * matrices + logits)


def _weight_bytes(half: bool, halved: bool) -> float:
    """Moved for each weight of a matrix that a pass uses."""
    if not half:
        return SINGLE
    return HALF if halved else SINGLE + 2 * HALF


def _learned(config: GRPOConfig, shapes: Shapes, half: bool, batch: Batch) -> Phase:
    """Forward and backward of a micro-batch. A backward pass is two products for each of the forward pass, one for the
    gradient of the input and one for that of the weight; a frozen weight needs the first alone. What is recomputed is a
    forward pass more: the layers with checkpointing, the head where its logits come in chunks."""
    layers = forward(shapes, half, False, batch.tokens, batch.pairs, 0)
    whole = forward(shapes, half, False, batch.tokens, batch.pairs, batch.predicted)
    head = Phase(whole.flops - layers.flops, whole.bytes - layers.bytes)
    backward = 1 if shapes.adapter else 2
    passes = layers * (1 + backward + config.gradient_checkpointing) + head * (1 + backward + bool(config.logit_chunk))
    gradients = Phase(0, 3 * SINGLE * sum(shapes.trained))  # written, and added to those of earlier micro-batches
    activations = Phase(0, 2 * kept_bytes(config, shapes, half, batch))  # written and read
    return passes + gradients + activations


def _total(parts: Iterable[Phase]) -> Phase:
    return sum(parts, start=Phase(0, 0))
