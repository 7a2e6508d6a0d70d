"""Models for a sitting, without a hub: `python -m benchmarks.sitting.shape FOLDER` makes

FOLDER/shape     the config of Qwen2.5-0.5B (or a small one) and the built-in tokenizer; no weights
FOLDER/tiny      the built-in model, untrained
FOLDER/shared    where the tests look for the config and tokenizer of Qwen2.5-0.5B: --model's, or the above
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.plan.sizes import known_shape
from sft_core.model.tiny import build_tiny, build_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_shape(folder: Path, small: bool) -> Path:
    """A config of Qwen2.5-0.5B's sizes, or of small ones with the tokenizer's 375 words, and that tokenizer."""
    tokenizer, source = build_tokenizer(), known_shape("Qwen/Qwen2.5-0.5B-Instruct")
    assert source
    values = source.model_config.to_dict() | {"max_position_embeddings": 4096}
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values |= {**SMALL, "vocab_size": len(tokenizer)} if small else {}
    del values["layer_types"]  # follows from the number of layers, which a flag may change
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    shape = make_shape(given.folder / "shape", given.small)
    build_tiny(given.folder / "tiny", seed=0)
    shared = given.folder / "shared" / "models" / "qwen2.5-0.5b-instruct"
    weights = shutil.ignore_patterns("*.safetensors", "*.bin")  # which nothing here reads
    shutil.copytree(given.model or shape, shared, dirs_exist_ok=True, ignore=weights)


if __name__ == "__main__":
    main()
