"""Where a policy comes from: everything that can be checked, and refused, before any weight is read.

A model's folder was written by somebody else. Weights are read from safetensors files only, everything
else is JSON, text or a template in a sandbox; no pickle is opened, and no code that comes with a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from sft_core.config import ModelConfig
from sft_core.errors import refused
from sft_core.model import tiny
from sft_core.pairs import read_pairs


@dataclass(frozen=True)
class Source:
    """Where a policy's weights come from and what its config.json says; known before any weight is read."""

    base: str
    adapter: str | None
    model_config: PreTrainedConfig
    generation_config: GenerationConfig

    @property
    def context(self) -> int:
        """The longest sequence the model can hold, in tokens."""
        return int(getattr(self.model_config, "max_position_embeddings", 0)) or 2**31


@contextmanager
def no_retry_messages() -> Iterator[None]:
    """Silence the hub library's two lines for each failed attempt: this project prints one line in the end."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def find_source(config: ModelConfig) -> Source:
    """Resolve --model and --adapter_path, reading configuration files and the headers of local weights only.

    `--model` may itself be an adapter folder, which names its base model.

    Raises:
        ValueError: no such folder, unreachable hub, an adapter without its config, an unknown --config_overrides key,
            weights that are not safetensors, code that the model would bring along.
    """
    base, adapter = config.model, config.adapter_path
    for flag, folder in (("--model", base), ("--adapter_path", adapter)):
        if folder is not None and is_a_path(folder) and not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder}: no such folder")
    if adapter is None and (Path(base) / "adapter_config.json").is_file():
        adapter = base
    if adapter is not None:
        description = Path(adapter) / "adapter_config.json"
        if not description.is_file():
            raise ValueError(f"--adapter_path {adapter}: holds no adapter_config.json, so it is not a LoRA adapter")
        if config.lora:
            raise ValueError(f"--lora: expected a model without an adapter; {adapter} is one, and is trained further")
        if find_spec("peft") is None:
            raise ValueError(f"the adapter {adapter} needs the peft package: pip install '.[lora]'")
        with refused(str(description)):
            described = json.loads(description.read_text(encoding="utf-8"))
        if adapter == base:
            base = _base_of(description, described)
        if isinstance(described, dict) and described.get("megatron_config"):
            raise ValueError(f"{description}: names a module to import (megatron_core), and no code of a model is run")
        _check_weights(f"the adapter {adapter}", Path(adapter), ["adapter_model.safetensors"])
    try:
        with no_retry_messages():
            values, _ = PreTrainedConfig.get_config_dict(base)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")[:160]
        raise ValueError(
            f"--model {base}: neither a model folder here nor to be had from the hub ({reason})"
        ) from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(
            f"--model {base}: holds no config.json with a model_type, so it is not a model folder"
            f"{stages_in(Path(base))}"
        )
    _check_safe(base, values)
    if Path(base).is_dir() and not config.from_scratch:
        _check_weights(f"--model {base}", Path(base), _weight_files(Path(base)))
    values.update(_overrides(config.config_overrides, values))
    try:
        model_config = AutoConfig.for_model(**values)
    except Exception as error:  # a class of its own for each way in which a value can be wrong
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"--model {base}: its config.json describes no model known here ({reason})") from error
    return Source(base, adapter, model_config, _generation_config(base))


def _generation_config(base: str) -> GenerationConfig:
    """The model's own, if it has one."""
    if (Path(base) / "generation_config.json").exists():
        with refused(f"--model {base}: its generation_config.json"):
            return GenerationConfig.from_pretrained(base)
    try:
        return GenerationConfig() if Path(base).is_dir() else GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig()


def _check_safe(base: str, values: dict[str, Any]) -> None:
    """Refuse what a config.json can name besides its own model: a file of weights of any kind, a kernel of the hub."""
    kernel = any("/" in str(values.get(key)) for key in ("attn_implementation", "_attn_implementation"))
    if kernel or "transformers_weights" in values:
        raise ValueError(f"--model {base}: its config.json names a kernel or a file of weights, which are not loaded")


def _weight_files(folder: Path) -> list[str]:
    """The names of a model's safetensors files: one, or those that an index lists."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole.name]
    with refused(f"--model {folder}: its {index.name}"):
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})


def _check_weights(owner: str, folder: Path, names: list[str]) -> None:
    """Refuse files that are missing, outside the folder, or not whole safetensors by their headers."""
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{owner}: its index names {name[:80]!r}; only *.safetensors beside it are read")
        if not (folder / name).is_file():
            hint = "; --from_scratch starts from random weights" if owner.startswith("--model") else ""
            raise ValueError(f"{owner}: holds no {name}, and weights in other formats are not read{hint}")
        with refused(f"{owner}: its {name}"), safe_open(folder / name, framework="pt"):
            pass


def _base_of(path: Path, described: Any) -> str:
    """The base model that an adapter_config.json names."""
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{path}: names no base_model_name_or_path; give --model and --adapter_path")
    return base


def is_a_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; anything rooted, deeper, or below an existing folder is meant as a path."""
    path = Path(name)
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or Path(path.parts[0]).is_dir()


def stages_in(folder: Path) -> str:
    """A hint for an error message, where the folder is a pipeline's: the run folders in it."""
    if not (folder / "pipeline.yaml").is_file():
        return ""
    return (
        f"; it is a pipeline's, with the runs {', '.join(sorted(p.parent.name for p in folder.glob('*/config.yaml')))}"
    )


def _overrides(pairs: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """
    >>> _overrides(["hidden_size=64"], {"hidden_size": 896})
    {'hidden_size': 64}
    """
    for pair in pairs:
        if pair.partition("=")[0] not in known:
            raise ValueError(f"--config_overrides {pair}: expected key=value with a key of the model's config.json")
    return read_pairs("--config_overrides", pairs)


def check_context(source: Source | None, prompt_tokens: int, completion_tokens: int) -> None:
    """`source` None: the built-in model.

    Raises:
        ValueError: prompt and completion budgets together exceed the model's context.
    """
    context, name = (source.context, source.base) if source else (tiny.CONTEXT, "the built-in model")
    if prompt_tokens + completion_tokens > context:
        raise ValueError(
            f"--max_prompt_tokens {prompt_tokens} + --max_completion_tokens {completion_tokens}: more than the "
            f"{context} tokens that {name} can hold"
        )
