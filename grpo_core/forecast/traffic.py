"""What ranks exchange in a step, in bytes that each of them sends, and the least time for it.

In a ring each of W ranks sends (W - 1) / W of a tensor to gather it or to add it up in parts, and twice that to add it
up for all (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

from grpo_core.config import GRPOConfig
from sft_core.learn.footprint import SINGLE, Batch
from sft_core.model.shapes import Shapes

IN_A_MACHINE = 8  # GPUs, beyond which they are reached over the network


def sent(config: GRPOConfig, shapes: Shapes, batches: list[Batch], ranks: int) -> float:
    """Bytes of weights and gradients. (Completions and log-probabilities, a few bytes a token, are left out.)

    ddp: the gradients, added up once an update. fsdp: for each of a rank's micro-batches, of which there are `batches`,
    the weights twice, for the forward and the backward pass, and the gradients once; the weights once for the sampler
    and once for each of the reference's passes.
    """
    if ranks == 1:
        return 0.0
    trained, weights, part = SINGLE * sum(shapes.trained), SINGLE * (shapes.base + shapes.adapter), (ranks - 1) / ranks
    if config.parallel != "fsdp":
        return part * 2 * trained * config.mu
    passes = len(batches)
    return part * (passes * config.mu * (2 * weights + trained) + weights * (1 + passes * bool(config.beta)))
