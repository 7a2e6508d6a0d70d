"""The policy: a causal language model with its tokenizer, its precision and the ids that end a sequence."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.config import ModelConfig
from sft_core.errors import refused
from sft_core.model import tiny
from sft_core.model.allocator import keep_freed_memory
from sft_core.model.decoding import Decoding, decoding_for
from sft_core.model.half import halve
from sft_core.model.segments import Layout, attend_by_segments, layouts
from sft_core.model.source import Source, find_source
from sft_core.precision import Precision, has_ampere_units, pick_device, pick_precision

# peft 0.21 asks transformers 5 for an attribute by its old name; the warning would not help whoever trains.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

FUSED_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # peft refuses their out_proj
# For tokenizers that bring no chat template (base models, GPT-2): the messages' texts, a blank line after each.
PLAIN_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


@dataclass(frozen=True)
class Policy:
    """pi_theta. `eos_ids`: every id that ends a sequence, the tokenizer's own first (that one ends demonstrations)."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any
    precision: Precision
    eos_ids: tuple[int, ...]
    pad_id: int
    layout: Layout = "rows"  # how the learner lays out rows (sft_core.model.segments)
    prefill: bool = True  # the sampler, too, encodes the prompt of consecutive rows once
    split_head: bool = True  # logits are head(backbone), of the tokens that are scored alone
    logit_chunk: int = 2**26  # logits that exist at once in the learner: 256 MB in float32; 0: all
    rows_leave: bool = True  # completions that have ended leave the batch while it is sampled
    rows_join: bool = True  # prompts that wait take their places
    pads: bool = True  # prompts of unlike lengths are sampled in one batch
    cached: bool = True  # the sampler computes each token once
    decoding: Decoding = "segments"
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # by the sampler, for its next call
    half_copies: bool = True  # under autocast, sampler and reference have their matrices in half precision
    hollow: Any = field(default=None, compare=False)  # where ranks share out the weights: the model without any
    checks: tuple[dict[str, Any], ...] = field(default=(), compare=False)  # what trying the shortcuts found

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def logp_dtype(self) -> torch.dtype:
        """Of log-probabilities and everything computed from them: float32, or float64 for a float64 model."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def vocabulary(self) -> int:
        """Words that the model has logits for."""
        config = self.model.config
        # Models that read pictures, too, keep the text's settings one level down.
        return int((config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size)

    @property
    def half_dtype(self) -> torch.dtype | None:
        """Of the matrices that sampler and reference copy; None: they copy none."""
        return self.precision.autocast_dtype if self.half_copies else None

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        """Hugging Face format: the model's safetensors, config and tokenizer, or the adapter's where there is one."""
        if is_adapted(self.model):
            self.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote, into the existing tensors.

        Raises:
            ValueError: they cannot be read, or are those of another model.
        """
        with refused(str(folder)):
            if is_adapted(self.model):
                from peft import set_peft_model_state_dict

                weights = load_file(folder / "adapter_model.safetensors")
                _refuse_lacking(_adapter_names(self.model) - weights.keys())
                set_peft_model_state_dict(self.model, weights, adapter_name="default")
            else:
                saved = _whole_model(str(folder), dtype=self.model.dtype, local_files_only=True)
                self.model.load_state_dict(saved.state_dict())


def is_adapted(model: Any) -> bool:
    """True for a peft model."""
    return hasattr(model, "peft_config")


def load_tokenizer(source: Source | None) -> Any:
    """The tokenizer of a source (None: the built-in model's), in any case with a chat template.

    Raises:
        ValueError: its files cannot be read, or there is no end-of-sequence token.
    """
    if source is None:
        return tiny.build_tokenizer()
    own = source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file()
    folder = source.adapter if own else source.base
    with refused(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    end_of_sequence_ids(tokenizer, source)
    return tokenizer


def load_policy(config: ModelConfig, source: Source | None = None) -> Policy:
    """Tokenizer and model in float32 on the chosen device, with its LoRA adapter loaded or newly made where asked; the
    matrices below an adapter, which are never trained, in half precision or in 4 bits.

    Weights are read from safetensors only and no code from a model's repository is run.

    Raises:
        ValueError: as `find_source` and `load_tokenizer`; weights that cannot be loaded, or lack a tensor.
    """
    source = source or find_source(config)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    if device.type == "cuda" and precision.autocast_dtype is torch.bfloat16 and not has_ampere_units(device):
        print("note: this GPU only emulates bf16; --precision fp16 is several times as fast here", file=sys.stderr)
    if config.keep_freed_memory and device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(source)
    eos_ids = end_of_sequence_ids(tokenizer, source)
    if config.from_scratch:
        model = AutoModelForCausalLM.from_config(source.model_config, dtype=torch.float32, trust_remote_code=False)
        model.generation_config = source.generation_config
    else:
        options = _four_bits(precision) if config.use_4bit else {}
        with refused(f"--model {source.base}"):
            model = _whole_model(source.base, dtype=torch.float32, **options)
    if config.gradient_checkpointing:
        # transformers 5 renames the method and warns about the old name, which it drops in 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if source.adapter is not None or config.lora:
        model = _adapt(model, config, source)
        if config.half_copies and precision.autocast_dtype:
            halve(model, precision.autocast_dtype, trained=False)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    model = model.eval() if config.use_4bit else model.to(device).eval()
    attend_by_segments(model)
    usable = layouts(model)
    divisible = "groups" in usable  # to one prompt and one completion, by a mask or a choice of rows
    return Policy(
        model,
        tokenizer,
        precision,
        eos_ids,
        pad_id,
        layout=usable[0] if config.share_prompts else "rows",
        prefill=config.share_prompts and divisible,
        logit_chunk=config.logit_chunk,
        rows_leave=config.rows_leave and divisible,
        decoding=decoding_for(config.decoding, model, device),
        half_copies=config.half_copies,
    )


def end_of_sequence_ids(tokenizer: Any, source: Source) -> tuple[int, ...]:
    """Every end-of-sequence id of the tokenizer, the generation config and the model config, in that order.

    Qwen2.5-Instruct has two: <|im_end|> ends a turn, <|endoftext|> ends a document; the model may stop with either.
    """
    found: list[int] = []
    # Models that read pictures, too, keep the text's settings one level down.
    configs = (source.generation_config, source.model_config, source.model_config.get_text_config())
    for ids in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not found:
        raise ValueError(f"--model {source.base}: has no end-of-sequence token, so its completions would never end")
    return tuple(dict.fromkeys(found))


def _four_bits(precision: Precision) -> dict[str, Any]:
    """Arguments of `from_pretrained` for QLoRA's base weights (arXiv 2305.14314): NF4 with quantized constants."""
    from transformers import BitsAndBytesConfig  # `check` asks for bitsandbytes

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.autocast_dtype or torch.float32,
    )
    return {"quantization_config": packing, "device_map": {"": precision.device}}


def _adapt(model: Any, config: ModelConfig, source: Source) -> Any:
    """Put a LoRA adapter on the model: the one at `source.adapter`, to be trained further, or a new one that adds 0."""
    from peft import LoraConfig, PeftModel, get_peft_model  # an extra; `check` and `find_source` ask for it

    if source.adapter is not None:
        with refused(f"the adapter {source.adapter}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # peft's word for what is refused here
            model = PeftModel.from_pretrained(model, source.adapter, is_trainable=True, use_safetensors=True)
            with safe_open(Path(source.adapter) / "adapter_model.safetensors", framework="pt") as weights:
                _refuse_lacking(_adapter_names(model) - set(weights.keys()))
            return model
    everywhere = config.lora_targets == ["all-linear"]
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets[0] if everywhere else config.lora_targets,
        exclude_modules=_no_place_for_lora(model) if everywhere else None,
        task_type="CAUSAL_LM",
    )
    with refused(f"--lora_targets {' '.join(config.lora_targets)}"):
        return get_peft_model(model, lora)


def _no_place_for_lora(model: Any) -> list[str]:
    """Linear layers that cannot have an adapter: those whose weights fused kernels read by themselves, and those that a
    model computes in a way of its own (Llama 4's router), unless it does so everywhere (Falcon)."""
    head, fused = model.get_output_embeddings(), model.config.model_type in FUSED_OUT_PROJ
    linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    own = [name for name, each in linear.items() if type(each).__module__.startswith("transformers.")]
    plain = [name for name, each in linear.items() if name not in own and each is not head]
    return (own if plain else []) + [name for name in plain if fused and name.endswith(".out_proj")]


def _whole_model(name: str, **options: Any) -> Any:
    """A model from safetensors that hold all of its tensors; superfluous tensors are named on stderr.

    Raises:
        ValueError: a tensor is missing.
    """
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of missing tensors is replaced by an error below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    finally:
        transformers.logging.set_verbosity(before)
    model, report = loaded
    _refuse_lacking(report["missing_keys"])
    if report["unexpected_keys"]:
        print(f"{name}: not a part of the model, and left out: {_some(report['unexpected_keys'])}", file=sys.stderr)
    return model


def _adapter_names(model: Any) -> set[str]:
    """The tensors of the adapter, by their names in its file."""
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False))


def _refuse_lacking(names: Collection[str]) -> None:
    """The libraries fill missing tensors at random, and only warn. (Tied ones are not missing.)

    Raises:
        ValueError: there are some.
    """
    if names:
        raise ValueError(f"the weights lack {_some(names)}")


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def without_dropout(model: Any) -> None:
    """Turn off every dropout, and every router's jitter, for good. In GRPO the sampler (eval mode) and the learner
    (train mode, which gradient checkpointing needs) must be the same distribution, or the ratio does not start at 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Attention layers keep theirs as a plain number.
            if ("dropout" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
