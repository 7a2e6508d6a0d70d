"""Where a policy comes from: all that can be found out, and refused, before any weight is read."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from sft_core import tiny
from sft_core.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """Where a policy's weights come from and what its config.json says: found out before any weight is read."""

    base: str
    adapter: str | None
    model_config: PreTrainedConfig
    generation_config: GenerationConfig

    @property
    def context(self) -> int:
        """The longest sequence the model can hold, in tokens."""
        return int(getattr(self.model_config, "max_position_embeddings", 0)) or 2**31


def find_source(config: ModelConfig) -> Source:
    """Resolve --model and --adapter_path, reading configuration files only.

    `--model` may itself be an adapter folder, which names its base model.

    Raises:
        ValueError: no such folder, unreachable hub, an adapter without its config, an unknown --config_overrides key.
    """
    base, adapter = config.model, config.adapter_path
    for flag, folder in (("--model", base), ("--adapter_path", adapter)):
        if folder is not None and _is_a_path(folder) and not Path(folder).is_dir():
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
        if adapter == base:
            base = _base_of(description)
    try:
        values, _ = PreTrainedConfig.get_config_dict(base)
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--model {base}: neither a model folder here nor to be had from the hub ({reason})"
        ) from error
    if "model_type" not in values:
        raise ValueError(f"--model {base}: holds no config.json with a model_type, so it is not a model folder")
    if Path(base).is_dir() and not config.from_scratch and not any(Path(base).glob("*.safetensors")):
        raise ValueError(f"--model {base}: holds no *.safetensors; --from_scratch starts from random weights")
    values.update(_overrides(config.config_overrides, values))
    try:
        model_config = AutoConfig.for_model(**values)
    except Exception as error:  # a class of its own for each way in which a value can be wrong
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"--model {base}: its config.json describes no model known here ({reason})") from error
    generation_config = GenerationConfig()
    with contextlib.suppress(OSError):  # many models ship none
        generation_config = GenerationConfig.from_pretrained(base)
    return Source(base, adapter, model_config, generation_config)


def _base_of(description: Path) -> str:
    """The base model that an adapter_config.json names."""
    try:
        return str(json.loads(description.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{description}: names no base_model_name_or_path; give --model and --adapter_path") from error


def _is_a_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; anything rooted, deeper, or below an existing folder is meant as a path."""
    path = Path(name)
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or Path(path.parts[0]).is_dir()


def _overrides(pairs: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """`["hidden_size=64"]` as a dict, each value read as JSON.

    >>> _overrides(["hidden_size=64", "hidden_act=gelu"], {"hidden_size": 896, "hidden_act": "silu"})
    {'hidden_size': 64, 'hidden_act': 'gelu'}
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--config_overrides {pair}: expected key=value with a key of the model's config.json")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


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
