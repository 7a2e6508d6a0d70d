"""The shapes of the Qwen models that a plan is made for most often, so that it needs no hub. From their config.json."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from sft_core.model.source import Source

# Width, MLP's width, layers, query heads, key heads, rows of the embedding; the smaller ones use it as their head, too.
QWEN2_5 = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
    "14B": (5120, 13_824, 48, 40, 8, 152_064),
    "32B": (5120, 27_648, 64, 40, 8, 152_064),
}
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, 151_936),
    "1.7B": (2048, 6144, 28, 16, 8, 151_936),
    "4B": (2560, 9728, 36, 32, 8, 151_936),
    "8B": (4096, 12_288, 36, 32, 8, 151_936),
    "14B": (5120, 17_408, 40, 40, 8, 151_936),
    "32B": (5120, 25_600, 64, 64, 8, 151_936),
}
TIED = ("0.5B", "1.5B", "3B", "0.6B", "1.7B", "4B")
CONTEXT = 32_768  # tokens; for plans no shorter one matters


def known_shape(model: str) -> Source | None:
    """The shape of Qwen/Qwen2.5-SIZE or Qwen/Qwen3-SIZE, with or without -Instruct, -Base, -Math; None: another model,
    or a folder.

    >>> known_shape("Qwen/Qwen2.5-0.5B-Instruct").model_config.hidden_size
    896
    """
    found = re.fullmatch(r"Qwen/Qwen(2\.5|3)(?:-Math|-Coder)?-([\d.]+B)(?:-Instruct|-Base)?", model)
    sizes = (QWEN2_5 if found[1] == "2.5" else QWEN3) if found else {}
    if not found or found[2] not in sizes or Path(model).exists():
        return None
    hidden, inner, layers, heads, keys, vocab = sizes[found[2]]
    kind: type[PreTrainedConfig] = Qwen2Config if found[1] == "2.5" else Qwen3Config
    values = kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocab,
        tie_word_embeddings=found[2] in TIED,
        max_position_embeddings=CONTEXT,
        **({"head_dim": 128} if kind is Qwen3Config else {}),
    )
    return Source(model, None, values, GenerationConfig())
