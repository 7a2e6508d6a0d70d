"""What a GRPO step holds in memory, from the shapes of its model alone: the learner's part
(sft_core/learn/footprint.py, which says what an item is), and beside it

    item                    bytes, and in which moments
    reference               2 a matrix's weight and 4 any other's under autocast, else 4. Always, where --beta is not 0
    half-precision twin     2 a matrix's weight, the head's too. While sampling under autocast
    keys and values         4 under autocast, else 8, a row, token, layer and key's width. While sampling

The last two stay all the time where decoding is compiled, whose graphs know addresses.

Measured against real runs by `python -m benchmarks.plan --check`; the record is benchmarks/results/plan.md.
"""

from __future__ import annotations

from dataclasses import replace

from grpo_core.config import GRPOConfig
from sft_core.learn.fit import Fit
from sft_core.learn.fit import fitted as fit_here
from sft_core.learn.footprint import (
    HALF,
    SINGLE,
    Batch,
    Items,
    Lengths,
    Plan,
    added,
    head,
    learner_moments,
    micro_batches,
    of_a_rank,
    passing_bytes,
    standing,
)
from sft_core.learn.rows import LARGEST, Tokens
from sft_core.model.shapes import Shapes
from sft_core.model.source import Source

KEPT_COMPILED = ("half-precision twin", "keys and values")


def plan(
    config: GRPOConfig,
    shapes: Shapes,
    half: bool,
    kind: str,
    lengths: Lengths | None = None,
    micro_batch: int | Tokens | None = None,
    ranks: int = 1,
) -> Plan:
    """Every moment of a step from the second on, when AdamW has its moments. `half`: under autocast; `kind`: cpu or
    cuda; `lengths`: of prompts and completions, by default the longest that the config admits; `ranks`: how many share
    the step's prompts."""
    config = replace(config, prompts_per_step=-(-config.prompts_per_step // ranks))
    lengths = lengths or Lengths(config.max_prompt_tokens, config.max_completion_tokens)
    batches = batches_of(config, shapes, lengths, micro_batch)
    always = standing(config, shapes, half, kind, batches)
    if config.beta:
        always["reference"] = reference(config, shapes, half)
    rows = config.prompts_per_step * config.group_size
    sampled = sampling(config, shapes, half, rows, config.prompts_per_step, lengths)
    if kind == "cuda" and config.decoding in ("auto", "compiled"):  # eval/decoding/compiled.py
        always |= {name: sampled[name] for name in KEPT_COMPILED}
    moments = {"sampling": always | sampled}
    moments |= learner_moments(config, shapes, half, kind, batches, always, bool(config.entropy_coef))
    if config.eval_problems:
        asked = config.eval_batch_size
        moments["evaluation"] = always | sampling(config, shapes, half, asked, asked, lengths)
    if config.beta:
        batch = max(batches, key=lambda b: b.tokens)
        passing = {"activations": passing_bytes(shapes, half, batch.tokens)}
        moments["the reference's pass"] = added(always, passing, head(config, shapes, half, batch, False))
    return Plan(of_a_rank(config, shapes, moments, ranks))


def fitted(config: GRPOConfig, source: Source | None) -> Fit[GRPOConfig]:
    """What a run of this configuration will do on this machine, with its forecast."""

    def of_size(
        config: GRPOConfig, shapes: Shapes, half: bool, kind: str, micro_batch: int | Tokens, ranks: int
    ) -> Plan:
        return plan(config, shapes, half, kind, None, micro_batch, ranks)

    return fit_here(config, source, of_size)


def batches_of(
    config: GRPOConfig, shapes: Shapes, lengths: Lengths, micro_batch: int | Tokens | None = None
) -> list[Batch]:
    """A step's micro-batches, by default of the size that is asked for."""
    micro_batch = micro_batch or config.micro_batch or LARGEST
    rows, shared = config.prompts_per_step * config.group_size, config.share_prompts and shapes.packs
    return micro_batches(rows, config.group_size, lengths, shared, micro_batch)


def reference(config: GRPOConfig, shapes: Shapes, half: bool) -> float:
    """Bytes of the frozen copy."""
    if shapes.adapter:
        return SINGLE * shapes.adapter
    halved = half and config.half_copies and not config.ref_sync_every
    return SINGLE * shapes.base - (SINGLE - HALF) * shapes.matrices * halved


def sampling(config: GRPOConfig, shapes: Shapes, half: bool, rows: int, prompts: int, lengths: Lengths) -> Items:
    """What is held in addition while `rows` completions of `prompts` prompts are sampled."""
    matrices = shapes.layers * shapes.layer + shapes.head
    if shapes.adapter:  # all but the adapter and a tied head are in half precision, or packed, in any case
        matrices = shapes.adapter + (shapes.head if shapes.tied else 0)
    twin = HALF * matrices if half and config.half_copies else 0.0
    cast = HALF * shapes.head if half and not config.half_copies else 0.0
    cache = 2 * (HALF if half else SINGLE) * shapes.keys * shapes.layers * rows * (lengths.prompt + lengths.completion)
    read = (prompts if config.share_prompts else rows) * lengths.prompt
    # A position's logits, generate's copy of them, and the weights by which a token is drawn; what is cut has two more.
    cut = config.top_k or config.top_p < 1 or config.min_p
    copies = (4 if cut else 2) * SINGLE + (HALF if half else SINGLE)
    return {
        "half-precision twin": twin,
        "head and embedding": cast,
        "keys and values": cache,
        "activations": passing_bytes(shapes, half, read),
        "logits": copies * rows * shapes.vocab,
    }
