"""What a GRPO step holds in memory, from the shapes of its model alone.

Not everything exists at the same time: the sampler's half-precision copy is freed before there are gradients, and
activations are freed as gradients appear. So the forecast lists the items of each moment of a step, and the peak is the
largest moment, not the sum of all items.

    item                    bytes, and in which moments
    process                 Python, torch and the tokenizer; on a GPU its context. Always
    weights                 4 a weight, float32 masters. Always. Below a LoRA adapter 2, or 0.5, a matrix's weight
    AdamW                   8 a trained weight. Always, unless --offload_optimizer: then of one piece, in the update
    reference               2 a matrix's weight and 4 any other's under autocast, else 4. Always, where --beta is not 0
    gradients               4 a trained weight. From the backward pass to the update
    half-precision twin     2 a matrix's weight, the head's too. While sampling under autocast
    keys and values         4 under autocast, else 8, a row, token, layer and key's width. While sampling
    activations             what a forward pass keeps for the backward pass (`kept_bytes`)
    logits                  of a chunk of tokens, with its log-softmax, entropy and gradients
    head and embedding      their half-precision cast, and gradients that are not yet added up
    kept when freed         on a CPU under --keep_freed_memory, an allowance (`kept_when_freed`). Always

Measured against real runs by `python -m benchmarks.plan --check`; the record is benchmarks/results/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_core.config import GRPOConfig
from sft_core.learn.offload import PIECE
from sft_core.model.shapes import Shapes, shapes_of
from sft_core.model.source import Source
from sft_core.precision import pick_device, pick_precision

GB = 1e9
SINGLE, HALF = 4, 2  # bytes of a number in float32, in bf16 or fp16
PACKED = 0.5 + 0.016  # of one in NF4, with its share of the block's constants (QLoRA, arXiv 2305.14314, section 3)

# Bytes outside of tensors. CPU: measured, Python, torch and transformers; CUDA: context and kernels, not measured here.
PROCESS = {"cpu": 0.42 * GB, "cuda": 0.5 * GB}

Items = dict[str, float]  # bytes by name


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts and completions that are planned for."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Batch:
    """What one micro-batch sends through the learner: `tokens` through the layers, of which the head sees `predicted`;
    attention sees `attended`, in rows of `width`: more where it takes one sequence `apart`, each completion with its
    prompt."""

    tokens: int
    attended: int
    width: int
    predicted: int
    apart: bool

    @property
    def pairs(self) -> float:
        """Of a query and a key that it looks at: all before it."""
        return self.attended * self.width / 2


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


def forecast(config: GRPOConfig, source: Source | None) -> str:
    """The line that a run prints before it loads a model. For a model whose shape is
    not understood here, it says so, and the run continues."""
    try:
        device = pick_device(config.device)
        half = pick_precision(config.precision, device).autocast_dtype is not None
        return plan(config, shapes_of(config, source), half, device.type).line()
    except Exception as error:  # whatever a model of another kind lacks
        return f"memory: no forecast for this model ({type(error).__name__}: {str(error)[:100]})"


def plan(config: GRPOConfig, shapes: Shapes, half: bool, kind: str, lengths: Lengths | None = None) -> Plan:
    """Every moment of a step from the second on, when AdamW has its moments. `half`: under autocast; `kind`: cpu or
    cuda; `lengths`: of prompts and completions, by default the longest that the config admits."""
    lengths = lengths or Lengths(config.max_prompt_tokens, config.max_completion_tokens)
    batches = micro_batches(config, shapes, lengths)
    batch, several = max(batches, key=lambda b: b.tokens), len(batches) > 1
    always = standing(config, shapes, half, kind)
    if kind == "cpu" and config.keep_freed_memory:
        always["kept when freed"] = kept_when_freed(config, shapes, batch, several)
    gradients: Items = {"gradients": SINGLE * sum(shapes.trained)}
    before = gradients if several else {}  # of earlier micro-batches
    kept: Items = {"activations": kept_bytes(config, shapes, half, batch)}
    rows = config.prompts_per_step * config.group_size
    moments = {
        "sampling": always | sampling(config, shapes, half, rows, config.prompts_per_step, lengths),
        "the head's backward pass": _sum(always, before, kept, head(config, shapes, half, batch, True)),
        "the layers' backward pass": _sum(always, gradients if several else _head_gradient(shapes), kept)
        | {"activations": kept["activations"] + layer_bytes(config, shapes, half, batch)},
        "the embedding's gradient": _sum(always, gradients, _embedding(shapes, several)),
        "the update": _sum(always, _update(shapes, moments_are_elsewhere(config, kind))),
    }
    if config.eval_problems:
        asked = config.eval_batch_size
        moments["evaluation"] = always | sampling(config, shapes, half, asked, asked, lengths)
    if config.beta:
        passing = {"activations": passing_bytes(shapes, half, batch.tokens)}
        moments["the reference's pass"] = _sum(always, passing, head(config, shapes, half, batch, False))
    return Plan(moments)


def micro_batches(config: GRPOConfig, shapes: Shapes, lengths: Lengths) -> list[Batch]:
    """The step's rows as the learner lays them out: where prompts are shared, each prompt once."""
    rows, P, T = config.prompts_per_step * config.group_size, lengths.prompt, lengths.completion
    batches = []
    for start in range(0, rows, config.micro_batch):
        count = min(config.micro_batch, rows - start)
        shared = config.share_prompts and shapes.packs
        groups = len({row // config.group_size for row in range(start, start + count)}) if shared else count
        batches.append(Batch(groups * P + count * T, count * (P + T), P + T, count * T, shared))
    return batches


def standing(config: GRPOConfig, shapes: Shapes, half: bool, kind: str) -> Items:
    """What is held in every moment."""
    trained, base = sum(shapes.trained), shapes.base
    matrices = shapes.layers * shapes.layer + (0 if shapes.tied else shapes.head)
    items = {"process": PROCESS.get(kind, 0.0), "weights": SINGLE * (base + shapes.adapter)}
    if shapes.adapter and (config.use_4bit or (half and config.half_copies)):
        items["weights"] -= (SINGLE - (PACKED if config.use_4bit else HALF)) * matrices  # frozen: no masters are needed
    if not moments_are_elsewhere(config, kind):
        items["AdamW"] = 2 * SINGLE * trained
    if config.beta:
        halved = half and config.half_copies and not config.ref_sync_every
        whole = SINGLE * base - (SINGLE - HALF) * matrices * halved
        items["reference"] = SINGLE * shapes.adapter if shapes.adapter else whole
    return items


def kept_when_freed(config: GRPOConfig, shapes: Shapes, batch: Batch, several: bool) -> float:
    """Memory that the C library keeps and that nothing fits into: blocks of logits are as large as the chunk at hand,
    and what is allocated between them stops them from growing together again. Not derived but measured, in eight small
    and large configurations: three chunks of logits; with several micro-batches three gradients of the head more."""
    chunk = SINGLE * shapes.vocab * min(_chunk(config, shapes, batch), batch.predicted)
    return 3 * chunk + (3 * SINGLE * shapes.head if several and shapes.embedding_trained else 0)


def _chunk(config: GRPOConfig, shapes: Shapes, batch: Batch) -> int:
    """Tokens whose logits exist at once."""
    return max(1, config.logit_chunk // shapes.vocab) if config.logit_chunk else batch.predicted


def moments_are_elsewhere(config: GRPOConfig, kind: str) -> bool:
    """Whether AdamW's moments are off the device. A CPU's own memory is no place apart from it."""
    return bool(config.offload_optimizer) and (kind != "cpu" or config.offload_optimizer != "cpu")


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


def kept_bytes(config: GRPOConfig, shapes: Shapes, half: bool, batch: Batch) -> float:
    """What the whole forward pass of a micro-batch leaves for its backward pass: with checkpointing the stream at each
    layer's entrance, without it everything that each layer's derivative needs."""
    stream = SINGLE * shapes.hidden * batch.tokens
    if config.gradient_checkpointing:
        return shapes.layers * stream
    return shapes.layers * _layer_kept(shapes, half, batch)


def layer_bytes(config: GRPOConfig, shapes: Shapes, half: bool, batch: Batch) -> float:
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
    Attention: queries, keys, values, result. MLP: the projections, the activation, their product.
    """
    D, Q, K, inner = shapes.hidden, shapes.queries, shapes.keys, shapes.inner
    size = HALF if half else SINGLE
    norms = SINGLE * (4 if shapes.rms else 2) * D
    if shapes.head_norms:
        norms += (SINGLE + size) * (Q + K)
    inputs = (5 if shapes.rms else 2) * D if half else 2 * D
    attention = batch.attended * (2 * Q + 2 * K + SINGLE * shapes.heads / size)
    attention += batch.tokens * Q if batch.apart else 0  # the result, put together again
    mlp = (4 if shapes.gated else 5) * inner
    casts = HALF * shapes.layer if half else 0
    return batch.tokens * (norms + size * (inputs + mlp)) + size * attention + casts


def head(config: GRPOConfig, shapes: Shapes, half: bool, batch: Batch, learning: bool) -> Items:
    """A chunk of logits, its backward pass, and what becomes of the head's weights meanwhile."""
    n, V = min(_chunk(config, shapes, batch), batch.predicted), shapes.vocab
    cast = HALF * shapes.head if half else 0
    if not learning:
        return {"logits": (2 * SINGLE + (HALF if half else 0)) * n * V, "head and embedding": cast}
    # Forward: logits, their log-softmax and its exponential for the entropy, backward: log-softmax and two gradients.
    # Three at once; six where the entropy is differentiated.
    copies = 6 if config.entropy_coef else 3
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


def _sum(*parts: Items) -> Items:
    """Items of the same name added up."""
    total: Items = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0.0) + size
    return total
