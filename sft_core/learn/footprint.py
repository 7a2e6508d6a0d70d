"""What the learner holds in memory, from the shapes of a model alone: in SFT all that there is, in GRPO a part
(grpo_core.forecast.memory).

Not everything exists at the same time: activations are freed as gradients appear. So a forecast lists the items of each
moment of a step, and the peak is the largest moment, not the sum of all items.

    item                    bytes, and in which moments
    process                 Python, torch and the tokenizer; on a GPU its context. Always
    weights                 4 a weight, float32 masters. Always. Below a LoRA adapter 2, or 0.5, a matrix's weight
    AdamW                   8 a trained weight. Always, unless --offload_optimizer: then of one piece, in the update
    gradients               4 a trained weight. From the backward pass to the update
    activations             what a forward pass keeps for the backward pass (`kept_bytes`)
    logits                  of a chunk of tokens, with its log-softmax, entropy and gradients
    head and embedding      their half-precision cast, and gradients that are not yet added up
    gathered                under --parallel fsdp, of which the others are parts (`of_a_rank`)
    kept when freed         on a CPU under --keep_freed_memory, an allowance (`kept_when_freed`). Always
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sft_core.learn.layout import KEY_BLOCK, prompts_are_keys_alone
from sft_core.learn.offload import PIECE
from sft_core.learn.rows import Tokens
from sft_core.model.shapes import Shapes

GB = 1e9
SINGLE, HALF = 4, 2  # bytes of a number in float32, in bf16 or fp16
PACKED = 0.5 + 0.016  # of one in NF4, with its share of the block's constants (QLoRA, arXiv 2305.14314, section 3)

# Bytes outside of tensors. CPU: measured, Python, torch and transformers; CUDA: context and kernels, not measured here.
PROCESS = {"cpu": 0.42 * GB, "cuda": 0.5 * GB}

Items = dict[str, float]  # bytes by name
SAMPLING = ("sampling", "evaluation")  # moments
IN_PARTS = ("weights", "AdamW", "gradients", "reference")  # of which a rank keeps a part under --parallel fsdp


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts and completions that are planned for."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Batch:
    """What one micro-batch sends through the learner: `tokens` through the layers, of which the head sees `predicted`.
    Attention sees so many `queries` and `keys`, more than tokens where it takes one sequence `apart` into rows, and
    `pairs` of both; of these a mask covers `masked`."""

    tokens: int
    queries: int
    keys: int
    pairs: float
    predicted: int
    apart: bool
    masked: int = 0

    @staticmethod
    def of(groups: int, rows: int, lengths: Lengths, shared: bool) -> Batch:
        """So many rows of these lengths, of so many prompts where they are `shared`."""
        P, T, predicted = lengths.prompt, lengths.completion, rows * lengths.completion
        whole = rows * (P + T)
        if not shared:
            return Batch(whole, whole, whole, whole * (P + T) / 2, predicted, apart=False)
        tokens, masked = groups * P + rows * T, rows * T * (P + T)
        if prompts_are_keys_alone(P, [T] * (rows // groups), KEY_BLOCK["cpu"]):  # on a GPU little differs
            keys, pairs = groups * P + whole, groups * P**2 / 2 + masked
            return Batch(tokens, tokens, keys, pairs, predicted, True, masked)
        return Batch(tokens, whole, whole, whole * (P + T) / 2, predicted, apart=True)


@dataclass(frozen=True)
class Plan:
    """Items by moment, in bytes."""

    moments: dict[str, Items]

    @property
    def worst(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def items(self) -> Items:
        """What is held at the peak, the largest first."""
        held = self.moments[self.worst]
        return {name: held[name] for name in sorted(held, key=lambda name: -held[name]) if held[name]}

    @property
    def peak(self) -> float:
        return sum(self.moments[self.worst].values())

    def line(self) -> str:
        """The forecast in one line, printed before a run."""
        items = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.items.items() if size >= 0.05 * GB)
        return f"memory: about {self.peak / GB:.1f} GB at its peak, in {self.worst} ({items or 'the process'})"


class Settings(Protocol):
    """What is asked of a configuration, SFT's or GRPO's."""

    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def logit_chunk(self) -> int: ...
    @property
    def half_copies(self) -> bool: ...
    @property
    def use_4bit(self) -> bool: ...
    @property
    def keep_freed_memory(self) -> bool: ...
    @property
    def offload_optimizer(self) -> str: ...
    @property
    def parallel(self) -> str: ...


def micro_batches(rows: int, group: int, lengths: Lengths, shared: bool, micro_batch: int | Tokens) -> list[Batch]:
    """A step's rows of these lengths as the learner lays them out: where prompts are `shared`, one for `group` rows."""
    P, T = lengths.prompt, lengths.completion
    if isinstance(micro_batch, Tokens):
        fitting = [n for n in range(1, rows + 1) if (-(-n // group) if shared else n) * P + n * T <= micro_batch.count]
        micro_batch = max(fitting, default=1)
    batches = []
    for start in range(0, rows, micro_batch):
        count = min(micro_batch, rows - start)
        groups = len({row // group for row in range(start, start + count)}) if shared else count
        batches.append(Batch.of(groups, count, lengths, shared))
    return batches


def learner_moments(
    config: Settings, shapes: Shapes, half: bool, kind: str, batches: list[Batch], always: Items, entropy: bool
) -> dict[str, Items]:
    """The moments of a step's passes and update, from the second step on, when AdamW has its moments. `half`: under
    autocast; `kind`: cpu or cuda; `entropy`: it is differentiated."""
    batch, several = max(batches, key=lambda b: b.tokens), len(batches) > 1
    gradients: Items = {"gradients": SINGLE * sum(shapes.trained)}
    before = gradients if several else {}  # of earlier micro-batches
    kept: Items = {"activations": kept_bytes(config, shapes, half, batch)}
    return {
        "the head's backward pass": added(always, before, kept, head(config, shapes, half, batch, True, entropy)),
        "the layers' backward pass": added(always, gradients if several else _head_gradient(shapes), kept)
        | {"activations": kept["activations"] + layer_bytes(config, shapes, half, batch)},
        "the embedding's gradient": added(always, gradients, _embedding(shapes, several)),
        "the update": added(always, _update(shapes, moments_are_elsewhere(config, kind))),
    }


def of_a_rank(config: Settings, shapes: Shapes, moments: dict[str, Items], count: int) -> dict[str, Items]:
    """The moments of one of `count` ranks, from those of a process that has its rows. Under --parallel fsdp it keeps a
    part of what lasts (sft_core.learn.shards), and gathers: in a pass two layers, of which one is ahead, and what is
    around the layers, with their gradients; while sampling all weights. It begins with all weights, too."""
    if config.parallel != "fsdp" or count == 1:
        return moments
    start = next({item: items[item] for item in ("process", "weights")} for items in moments.values())
    found: dict[str, Items] = {"the start": start}
    around = shapes.base - shapes.layers * shapes.layer
    trained = around + shapes.layer if shapes.embedding_trained else 0
    for name, items in moments.items():
        weights, twin = items["weights"], items.get("half-precision twin")
        in_pass = weights * (around + 2 * shapes.layer) / shapes.base
        gathered = {"gathered": 0.0 if name == "the update" else in_pass + SINGLE * trained * ("backward" in name)}
        if twin is not None and name in SAMPLING:
            rest = weights if shapes.adapter or not twin else SINGLE * (shapes.base - shapes.matrices)
            gathered = {"gathered": rest}
        found[name] = {item: size / count if item in IN_PARTS else size for item, size in items.items()} | gathered
    return found


def standing(config: Settings, shapes: Shapes, half: bool, kind: str, batches: list[Batch]) -> Items:
    """What is held in every moment."""
    trained, base = sum(shapes.trained), shapes.base
    items = {"process": PROCESS.get(kind, 0.0), "weights": SINGLE * (base + shapes.adapter)}
    if shapes.adapter and (config.use_4bit or (half and config.half_copies)):
        items["weights"] -= (SINGLE - (PACKED if config.use_4bit else HALF)) * shapes.matrices  # needs no masters
    if not moments_are_elsewhere(config, kind):
        items["AdamW"] = 2 * SINGLE * trained
    if kind == "cpu" and config.keep_freed_memory:
        largest = max(batches, key=lambda batch: batch.tokens)
        items["kept when freed"] = kept_when_freed(config, shapes, largest, len(batches) > 1)
    return items


def kept_when_freed(config: Settings, shapes: Shapes, batch: Batch, several: bool) -> float:
    """Memory that the C library keeps and that nothing fits into: blocks of logits are as large as the chunk at hand,
    and what is allocated between them stops them from growing together again. Not derived but measured, in eight small
    and large configurations: three chunks of logits; with several micro-batches three gradients of the head more."""
    chunk = SINGLE * shapes.vocab * min(_chunk(config, shapes, batch), batch.predicted)
    return 3 * chunk + (3 * SINGLE * shapes.head if several and shapes.embedding_trained else 0)


def _chunk(config: Settings, shapes: Shapes, batch: Batch) -> int:
    """Tokens whose logits exist at once."""
    return max(1, config.logit_chunk // shapes.vocab) if config.logit_chunk else batch.predicted


def moments_are_elsewhere(config: Settings, kind: str) -> bool:
    """Whether AdamW's moments are off the device. A CPU's own memory is no place apart from it."""
    return bool(config.offload_optimizer) and (kind != "cpu" or config.offload_optimizer != "cpu")


def kept_bytes(config: Settings, shapes: Shapes, half: bool, batch: Batch) -> float:
    """What the whole forward pass of a micro-batch leaves for its backward pass: with checkpointing the stream at each
    layer's entrance, without it everything that each layer's derivative needs."""
    stream = SINGLE * shapes.hidden * batch.tokens
    if config.gradient_checkpointing:
        return shapes.layers * stream
    return shapes.layers * _layer_kept(shapes, half, batch)


def layer_bytes(config: Settings, shapes: Shapes, half: bool, batch: Batch) -> float:
    """What the backward pass of one layer needs on top: with checkpointing the layer's own tensors, computed again; in
    any case the gradients that run through its MLP."""
    again = _layer_kept(shapes, half, batch) if config.gradient_checkpointing else 0.0
    return again + passing_bytes(shapes, half, batch.tokens)


def passing_bytes(shapes: Shapes, half: bool, tokens: int) -> float:
    """What lives at once inside a layer whose results nobody keeps: the stream, its norm, and the MLP's products."""
    return tokens * (3 * SINGLE * shapes.hidden + 3 * (HALF if half else SINGLE) * shapes.inner)


def _layer_kept(shapes: Shapes, half: bool, batch: Batch) -> float:
    """What autograd saves in one layer, which tests/test_plan.py counts in real models.

    Norms: their input, and for RMSNorm the normalised input, both float32. Under autocast each matrix saves its own
    half-precision copy of its input, and its weight's; in float32 the input is saved once for those that share it.
    Attention: queries, keys, values, result, a mask as numbers. MLP: the projections, the activation, their product.
    """
    D, Q, K, inner = shapes.hidden, shapes.queries, shapes.keys, shapes.inner
    size = HALF if half else SINGLE
    norms = SINGLE * (4 if shapes.rms else 2) * D
    if shapes.head_norms:
        norms += (SINGLE + size) * (Q + K)
    inputs = (5 if shapes.rms else 2) * D if half else 2 * D
    attention = batch.queries * (2 * Q + SINGLE * shapes.heads / size) + batch.keys * 2 * K + batch.masked
    attention += batch.tokens * Q if batch.apart else 0  # the result, put together again
    mlp = (4 if shapes.gated else 5) * inner
    casts = HALF * shapes.layer if half else 0
    return batch.tokens * (norms + size * (inputs + mlp)) + size * attention + casts


def head(config: Settings, shapes: Shapes, half: bool, batch: Batch, learning: bool, entropy: bool = False) -> Items:
    """A chunk of logits, its backward pass, and what becomes of the head's weights meanwhile."""
    n, V = min(_chunk(config, shapes, batch), batch.predicted), shapes.vocab
    cast = HALF * shapes.head if half else 0
    if not learning:
        return {"logits": (2 * SINGLE + (HALF if half else 0)) * n * V, "head and embedding": cast}
    # Forward: logits, their log-softmax and its exponential for the entropy, backward: log-softmax and two gradients.
    # Three at once; six where the entropy is differentiated.
    copies = 6 if entropy else 3
    logits = SINGLE * copies * n * V
    if not shapes.embedding_trained:
        return {"logits": logits, "head and embedding": cast}
    # The weight's gradient appears in half precision, becomes float32, and is added to that of earlier chunks: by then
    # only one gradient of the logits is left.
    earlier = SINGLE * shapes.head if batch.predicted > n else 0
    gradient = (HALF if half else 0) * shapes.head + SINGLE * shapes.head
    left = (HALF if half else SINGLE) * n * V
    if logits > left + gradient:
        return {"logits": logits, "head and embedding": cast + earlier}
    return {"logits": left, "head and embedding": cast + earlier + gradient}


def _head_gradient(shapes: Shapes) -> Items:
    return {"gradients": SINGLE * shapes.head if shapes.embedding_trained else 0.0}


def _embedding(shapes: Shapes, several: bool) -> Items:
    """The embedding's gradient comes last, as large as the embedding. A tied head's waits for it, to be added; and
    where there are gradients of earlier micro-batches, both are apart from those."""
    extra = (shapes.tied + several) * SINGLE * shapes.head if shapes.embedding_trained else 0
    return {"head and embedding": extra}


def _update(shapes: Shapes, elsewhere: bool) -> Items:
    """Gradients, with the moments that are there already; offloaded ones come for a piece of a parameter at a time."""
    gradients: Items = {"gradients": SINGLE * sum(shapes.trained)}
    return gradients | {"AdamW": 2 * SINGLE * min(max(shapes.trained), PIECE)} if elsewhere else gradients


def added(*parts: Items) -> Items:
    """Items of the same name added up."""
    total: Items = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0.0) + size
    return total
