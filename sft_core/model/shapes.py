"""The sizes of a model's tensors, without the tensors: the model is built on PyTorch's `meta` device, where a weight is
a shape and takes no memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sft_core.config import ModelConfig
from sft_core.model import tiny
from sft_core.model.segments import layouts
from sft_core.model.source import Source


@dataclass(frozen=True)
class Shapes:
    """Counts of numbers (elements), not of bytes. A matrix is what autocast casts: a linear layer, with its bias."""

    trained: tuple[int, ...]  # of each parameter that AdamW moves
    base: int  # all of the model but its LoRA adapter
    adapter: int  # 0 without one
    head: int  # V * D; `tied`: the embedding is the same tensor
    tied: bool
    vocab: int
    hidden: int  # D
    layers: int
    layer: int  # the matrices of one layer
    heads: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads, which is that of the values
    inner: int  # width of the MLP
    gated: bool  # the MLP multiplies two projections (SwiGLU)
    rms: bool  # norms are RMSNorm, written out in Python: autograd keeps two tensors of each, of LayerNorm one
    head_norms: bool  # queries and keys are normalised too (Qwen3)
    packs: bool  # completions can share their prompt's row

    @property
    def embedding_trained(self) -> bool:
        return not self.adapter

    @property
    def matrices(self) -> int:
        """Of all layers, and the head where it has its own."""
        return self.layers * self.layer + (0 if self.tied else self.head)


def shapes_of(config: ModelConfig, source: Source | None) -> Shapes:
    """The shapes of the model that `load_policy` would load; no weight is read. `source` None: the built-in model."""
    values: Any = source.model_config if source else tiny.model_config(tiny.build_tokenizer())
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(values, dtype=torch.float32, trust_remote_code=False)
    head = model.get_output_embeddings()
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    of_layer = [sum(p.numel() for p in matrix.parameters()) for _, matrix in _matrices(layers[0])]
    sizes = tuple(p.numel() for p in model.parameters())
    adapter = _adapter_sizes(config, source, [(name, m) for name, m in _matrices(model) if m is not head])
    heads = values.num_attention_heads
    width = getattr(values, "head_dim", None) or values.hidden_size // heads
    sides = [side for _, matrix in _matrices(layers[0]) for side in matrix.weight.shape]
    norms: list[Any] = [m for m in layers[0].modules() if type(m).__name__.endswith("Norm")]
    return Shapes(
        trained=adapter or sizes,
        base=sum(sizes),
        adapter=sum(adapter),
        head=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
        vocab=values.vocab_size,
        hidden=values.hidden_size,
        layers=len(layers),
        layer=sum(of_layer),
        heads=heads,
        queries=heads * width,
        keys=(getattr(values, "num_key_value_heads", None) or heads) * width,
        inner=max(sides),
        gated=sides.count(max(sides)) > 2,
        rms=not any(isinstance(norm, torch.nn.LayerNorm) for norm in norms),
        head_norms=len(norms) > 2 and any(norm.weight.numel() == width for norm in norms),
        packs=layouts(model)[0] != "rows",
    )


def _matrices(module: Any) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in module.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)))


def _adapter_sizes(config: ModelConfig, source: Source | None, matrices: list[tuple[str, Any]]) -> tuple[int, ...]:
    """LoRA's two factors of each adapted matrix, (r, in) and (out, r); nothing without an adapter."""
    r, targets = config.lora_r, config.lora_targets
    if source and source.adapter is not None:
        described = json.loads((Path(source.adapter) / "adapter_config.json").read_text())
        r, targets = described["r"], described["target_modules"]
    elif not config.lora:
        return ()

    def adapted(name: str) -> bool:
        if isinstance(targets, str) and targets != "all-linear":  # peft takes a string for a regular expression
            return re.fullmatch(targets, name) is not None
        return "all-linear" in targets or any(name == t or name.endswith(f".{t}") for t in targets)

    return tuple(r * side for name, matrix in matrices if adapted(name) for side in matrix.weight.shape)
