"""Small things that the tests build on: policies of two families, rows of random ids, a step ready to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from benchmarks.exact.enumeration import attention_of as attention_of
from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.metrics import step_record
from grpo_core.reference import policy_and_reference
from grpo_core.step import Learner, StepReport, grpo_step
from rewards import Reward, TrainerState
from sft_core.cli import parse_config
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy
from sft_core.model.segments import attend_by_segments, layouts
from sft_core.model.tiny import build_tokenizer
from sft_core.precision import pick_precision
from sft_core.text.example import Example

# On models this small a second thread only waits for the first, for seconds where the machine is busy; CI asks for it.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# For `pytest.mark.filterwarnings`: peft 0.21 asks transformers 5 for an attribute by its old name.
PEFT_IS_BEHIND = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"

Family = Literal["qwen2", "gpt2"]
# What the project's workplace shares: GSM8K, a real tokenizer and config. Tests that need it skip where it is absent.
SHARED = Path(os.environ.get("GRPO_SHARED") or Path(__file__).parent.parent.parent / "shared")

FAMILIES: tuple[Family, ...] = ("qwen2", "gpt2")


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The built-in model's tokenizer (375 tokens), built once for all tests: do not change it."""
    return build_tokenizer()


class Float64RMSNorm(Qwen2RMSNorm):  # type: ignore[misc]
    """The norm without transformers' cast to float32, which it does whatever the model's dtype: two ways to compute one
    and the same float64 number would come out of it 1e-8 apart."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.square().mean(dim=-1, keepdim=True)
        return self.weight * hidden_states * (mean_square + self.variance_epsilon).rsqrt()


def tiny_model(family: Family = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """An untrained model in eval mode: rotary positions (qwen2) or learned, absolute ones (gpt2).

    Its weights are twenty times as spread as a usual start's, so that it prefers some tokens to others and looks at
    positions: on a uniform distribution half of all mistakes are invisible.
    """
    shared = {"vocab_size": len(tokenizer()), "initializer_range": 0.4, "bos_token_id": None}
    shared |= {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "qwen2":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
            model = Qwen2ForCausalLM(Qwen2Config(**(shared | sizes | heads | config)))
        else:
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(**(shared | sizes | no_dropout | config)))
    for module in model.modules():
        if dtype == torch.float64 and isinstance(module, Qwen2RMSNorm):
            module.__class__ = Float64RMSNorm
    return model.to(dtype).eval()


def tiny_policy(
    family: Family = "qwen2",
    dtype: torch.dtype = torch.float32,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    **config: Any,
) -> Policy:
    """A policy on the CPU around `tiny_model`; `config` overrides entries of the model's configuration.

    The GPT-2 pads with its end-of-sequence token, as most tokenizers do; the Qwen2 has a padding token of its own.
    """
    tok = tokenizer()
    pad_id = tok.pad_token_id if family == "qwen2" else tok.eos_token_id
    model = tiny_model(family, dtype, **config)
    attend_by_segments(model)
    precise = pick_precision(precision, torch.device("cpu"))
    return Policy(model, tok, precise, (tok.eos_token_id,), pad_id, layouts(model)[0])


def ends_often(policy: Policy) -> Policy:
    """The same policy, for which every fifth ordinary token ends a sequence too: completions of many lengths."""
    return replace(policy, eos_ids=(*policy.eos_ids, *range(5, len(policy.tokenizer), 5)))


def adapted(policy: Policy, dropout: float = 0.0) -> Policy:
    """The policy with a LoRA adapter on every linear layer, filled with random numbers as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(policy.model, lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return replace(policy, model=model.to(policy.model.dtype).eval())


def checkpoint_activations(policy: Policy) -> None:
    """As `load_policy` does under --gradient_checkpointing."""
    enable = (
        getattr(policy.model, "activation_checkpointing_enable", None) or policy.model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def random_rows(
    policy: Policy,
    prompt_lengths: Sequence[int] = (4, 7, 2),
    completion_lengths: Sequence[int] = (5, 1, 8),
    seed: int = 0,
) -> Rows:
    """Rows of ordinary random ids with these lengths; every completion closes with the end-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, len(policy.tokenizer), (count,), generator=generator).tolist()  # 0-2 are special

    completions = [[*ids(length - 1), policy.eos_ids[0]] for length in completion_lengths]
    return pack_rows([ids(length) for length in prompt_lengths], completions, policy.pad_id)


def widened(rows: Rows, left: int, right: int, filler: int | None = None) -> Rows:
    """The same rows with more padding on both sides; with `filler`, every padding token becomes that id."""
    ids_NL = torch.nn.functional.pad(rows.ids_NL, (left, right), value=filler or 0)
    wide = Rows(ids_NL, rows.prompt_len_N, rows.completion_len_N, rows.prompt_width + left)
    return wide if filler is None else replace(wide, ids_NL=torch.where(attention_of(wide).bool(), ids_NL, filler))


def yaml_file(folder: Path, text: str) -> str:
    """The path of a config file of this text."""
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def message_of(argv: list[str], cls: Any = GRPOConfig, presets: Path | None = None) -> str:
    """The one line with which this command line is refused."""
    with pytest.raises(ValueError) as caught:
        parse_config(cls, argv, presets)
    message = str(caught.value)
    assert "\n" not in message
    return message


EXAMPLES = [
    Example("Tom has 3 apples. Tom buys 4. How many?", "3+4=<<3+4=7>>7\n#### 7", "7"),
    Example("Sue has 9 pens. Sue loses 1. Sue finds 2. How many pens does Sue have now?", "#### 10", "10"),
]


def grpo_config(**fields: Any) -> GRPOConfig:
    """A configuration for `EXAMPLES`: 2 prompts, 3 completions each, of at most 8 tokens, learned in one batch."""
    small = {"prompts_per_step": 2, "group_size": 3, "max_completion_tokens": 8, "micro_batch": 64}
    bare = {"prompt_format": "hash", "system_prompt": "", "precision": "float32", "device": "cpu", "lr": 1e-3}
    return GRPOConfig(**({"model": "tiny"} | small | bare | fields))


def length_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Differs from row to row and depends on the text alone."""
    return [len(text) % 7 / 4 for text in completions]


def learner(policy: Policy, config: GRPOConfig, reward: Callable[..., Any] = length_reward, steps: int = 10) -> Learner:
    """All that `grpo_step` needs, with the real optimizer, put together in the order in which a run does it."""
    policy, reference = policy_and_reference(policy, config)
    policy.model.train()
    return Learner(config, policy, reference, [Reward("reward", reward)], Optimizer(policy, config, steps))


class GradientCatcher:
    """Stands in for `Optimizer`: keeps each update's losses and gradients, and moves by `lr` down the gradient."""

    def __init__(self, policy: Policy, micro_batch: int, lr: float = 0.0) -> None:
        self.policy, self.micro_batch, self.lr = policy, micro_batch, lr
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self._loss, self.state = 0.0, TrainerState(0, 1)

    def accumulate(self, rows: Rows, learn: Callable[[slice, Rows], Any]) -> list[Any]:
        return [learn(at, micro) for at, micro in rows.micro_batches(self.micro_batch)]

    def backward(self, loss: Tensor) -> None:
        self._loss += loss.item()
        loss.backward()

    @torch.no_grad()
    def clip_and_step(self) -> tuple[float, bool]:
        self.losses.append(self._loss)
        self._loss = 0.0
        self.gradients.append({name: p.grad.clone() for name, p in self.policy.trainable()})
        for _, p in self.policy.trainable():
            p -= self.lr * p.grad
            p.grad = None
        return 0.0, False


def caught(policy: Policy, config: GRPOConfig, reward: Callable[..., Any] = length_reward, lr: float = 0.0) -> Learner:
    """As `learner`, with a `GradientCatcher` for its optimizer."""
    policy, reference = policy_and_reference(policy, config)
    policy.model.train()
    catcher = GradientCatcher(policy, config.micro_batch, lr)
    return Learner(config, policy, reference, [Reward("reward", reward)], catcher)  # type: ignore


def step(parts: Learner, seed: int = 0) -> StepReport:
    """One step on `EXAMPLES`."""
    torch.manual_seed(seed)
    return grpo_step(parts, EXAMPLES)


def with_samples(parts: Learner, samples: Samples) -> Learner:
    """The same parts with a sampler that hands out these samples."""
    return replace(parts, sampler=lambda *_: samples)


def gradients(
    policy: Policy,
    config: GRPOConfig,
    lr: float = 0.0,
    reward: Callable[..., Any] = length_reward,
    samples: Samples | None = None,
) -> list[dict[str, Tensor]]:
    """The gradient of every weight in each of a step's updates."""
    parts = caught(policy, config, reward, lr)
    step(with_samples(parts, samples) if samples else parts)
    return parts.optimizer.gradients  # type: ignore[attr-defined]


def measured(policy: Policy, config: GRPOConfig, samples: Samples, lr: float = 0.1) -> dict[str, Any]:
    """The log line, without its times, of a step on these samples; it moves the weights between its updates."""
    record = step_record(step(with_samples(caught(policy, config, lr=lr), samples)))
    return {name: value for name, value in record.items() if not name.endswith("_s")}


def completions(samples: Samples) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt and completion ids, cut out by its lengths."""
    rows, P = samples.rows, samples.rows.prompt_width
    lengths = zip(rows.ids_NL.tolist(), rows.prompt_len_N.tolist(), rows.completion_len_N.tolist(), strict=True)
    return [(ids[P - before : P], ids[P : P + after]) for ids, before, after in lengths]


def relative_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference, in units of the first's largest number."""
    scale = max(float(gradient.abs().max()) for gradient in first.values())
    assert scale > 0
    return largest_difference(first, second) / scale


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy of every weight, frozen ones too."""
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@contextmanager
def forward_calls(model: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the model's backbone while the block runs: the sampler calls it through the model,
    the learner by itself."""
    calls: list[dict[str, Any]] = []
    backbone, _ = backbone_and_head(model)

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs | ({"input_ids": args[0]} if args else {}))

    handle = backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
