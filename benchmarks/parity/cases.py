"""What both sides are given: weights, prompts, completions, rewards, settings. Nothing here depends on either side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from grpo_core.config import LOSSES
from grpo_core.recipes import RECIPES, settings_of
from sft_core.model.tiny import build_tokenizer

Family = Literal["qwen2", "gpt2"]  # rotary positions, and learned absolute ones
FAMILIES: tuple[Family, ...] = ("qwen2", "gpt2")
Row = tuple[list[int], list[int]]  # prompt ids, completion ids

PROMPTS_PER_STEP, BUDGET = 2, 8
PROMPTS = 8  # in the data set
REWARD_WEIGHTS = [1.0, 0.5]


@dataclass(frozen=True)
class Case:
    """One combination of settings. `fields` are GRPOConfig's beyond the named ones."""

    loss: str = "dapo"
    family: Family = "qwen2"
    beta: float = 0.0
    mu: int = 1
    temperature: float = 0.7
    accumulation: int = 1
    mask_truncated: bool = False
    none_rewards: bool = False
    group_size: int = 4
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return PROMPTS_PER_STEP * self.group_size

    @property
    def updates(self) -> int:
        """Optimizer steps: three, or two rollouts of mu."""
        return max(3, 2 * self.mu)


@dataclass
class Trace:
    """What one side computed. A list has an entry for each rollout or for each optimizer step."""

    rollouts: list[list[Row]] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)  # the weights before everything
    mask: list[Tensor] = field(default_factory=list)  # rollout: (N, T) bool
    advantage: list[Tensor] = field(default_factory=list)  # rollout: (N,)
    old_logp: list[Tensor] = field(default_factory=list)  # rollout: (N, T)
    ref_logp: list[Tensor] = field(default_factory=list)  # rollout: (N, T), none at beta 0
    logp: list[Tensor] = field(default_factory=list)  # update: (N, T)
    loss: list[float] = field(default_factory=list)  # update: sum over its micro-batches
    gradient: list[dict[str, Tensor]] = field(default_factory=list)  # update: before clipping
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # update: after it
    metrics: list[dict[str, float]] = field(default_factory=list)  # rollout: by the side's own names
    window_weight: list[float] = field(default_factory=list)  # micro-batch: the weight of its tokens in TRL's dapo


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return build_tokenizer()


@lru_cache(maxsize=2)
def model_folder(family: Family, parent: Path) -> Path:
    """A small model's weights on disk, where TRL reloads its reference from. Their standard deviation is twenty times
    the usual initialisation's, so that the model prefers some tokens to others."""
    tok = tokenizer()
    shared = {"vocab_size": len(tok), "initializer_range": 0.2, "bos_token_id": None}
    shared |= {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen2":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
            model: Any = Qwen2ForCausalLM(Qwen2Config(**(shared | sizes | heads)))
        else:
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(**(shared | sizes | no_dropout)))
    model.save_pretrained(parent / family)
    tok.save_pretrained(parent / family)
    return parent / family


def prompt_ids(number: int, ragged: bool) -> list[int]:
    """The prompt of this number: of 3 to 7 tokens if ragged, else of 5."""
    generator = torch.Generator().manual_seed(number)
    length = 3 + number % 5 if ragged else 5
    return torch.randint(3, len(tokenizer()), (length,), generator=generator).tolist()


def completions(rollout: int, rows: int) -> list[list[int]]:
    """N completions of all kinds: one that ends at once, some cut off by the budget, some between."""
    generator = torch.Generator().manual_seed(1000 + rollout)
    eos = tokenizer().eos_token_id
    made = []
    for row in range(rows):
        cut_off = row in (2, 5)
        length = BUDGET if cut_off else 1 if row == 3 else int(torch.randint(2, BUDGET + 1, (), generator=generator))
        ids = torch.randint(3, len(tokenizer()), (length,), generator=generator).tolist()
        made.append(ids if cut_off else [*ids[:-1], eos])
    return made


def rewards(none_rewards: bool) -> list[Any]:
    """Two reward functions of the completion's ids. With `none_rewards` each has no opinion on some rows, and both have
    none on a few."""

    def first(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [None if none_rewards and sum(ids) % 4 == 0 else sum(ids) % 11 / 5 for ids in completion_ids]

    def second(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [None if none_rewards and sum(ids) % 8 in (0, 1) else len(ids) % 3 / 2 for ids in completion_ids]

    return [first, second]


def equal_rewards(value: float) -> list[Any]:
    """Two reward functions that give every row the same value."""

    def first(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [value] * len(completion_ids)

    def second(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    return [first, second]


def all_cases() -> list[Case]:
    """Every named loss x family x beta x mu x accumulation x truncation mask x None rewards, at a temperature of 0.7 or
    1.3 in turn; then every other option, alone, on two updates of both families; then every recipe."""
    product = itertools.product(LOSSES, FAMILIES, (0.0, 0.1), (1, 2), (1, 2), (False, True), (False, True))
    cases = []
    for number, (loss, family, beta, mu, accumulation, mask_truncated, none_rewards) in enumerate(product):
        if loss == "bnpo" and accumulation > 1:
            continue  # TRL divides by each micro-batch's tokens: a declared difference
        temperature = (0.7, 1.3)[(number + number // 2 + number // 4) % 2]
        cases.append(Case(loss, family, beta, mu, temperature, accumulation, mask_truncated, none_rewards))
    for loss, fields in OPTIONS:
        for family in FAMILIES:
            hard = family == "gpt2"  # there with masked rows and missing rewards, too
            # The high-entropy tokens and the entropy bonus depend on the micro-batch in TRL: declared differences.
            whole = "top_entropy" in fields or "entropy_coef" in fields
            mu = 1 if "top_entropy" in fields else 2
            cases.append(Case(loss, family, 0.1, mu, 1.3, 1 if whole else 2, hard, hard, fields=fields))
    return [*cases, *(recipe_case(name, family) for name in RECIPES for family in FAMILIES)]


# Of a recipe: the optimizer's settings, for the cases have their own (`ours`), and what is no part of the objective.
NOT_COMPARED = (
    "lr",
    "lr_schedule",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "dynamic_sampling",
    "mu",
    "temperature",
)


def recipe_case(name: str, family: Family) -> Case:
    """A paper's objective on two updates of each rollout."""
    values = {"epsilon_low": 0.2, "epsilon_high": 0.2, **settings_of(name)}
    for flag in NOT_COMPARED:
        values.pop(flag, None)
    if values.get("ref_sync_every"):
        values["ref_sync_every"] = 2  # within the steps of a case
    loss, beta = values.pop("loss"), values.pop("beta", 0.0)
    masked = values.pop("mask_truncated", False)
    return Case(loss, family, beta, 2, 1.0, 2, masked, family == "gpt2", fields={"recipe": name, **values})


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((loss, {"ratio_level": "sequence"}) for loss in ("dapo", "dr_grpo", "cispo", "sapo")),
    ("vespo", {"ratio_level": "sequence", "kl_correction": True}),
    ("luspo", {"ratio_level": "token"}),
    ("dapo", {"kl_correction": True}),
    ("gspo", {"kl_correction": True}),
    ("dapo", {"epsilon_low": 0.01, "epsilon_high": 0.02, "delta": 1.03}),
    ("dapo", {"off_policy_threshold": 0.001}),
    ("dapo", {"top_entropy": 0.3}),
    ("dapo", {"entropy_coef": 0.05}),
    ("dapo", {"entropy_coef": 0.05, "top_entropy": 0.3}),
    ("dapo", {"scale_rewards": "batch"}),
    ("dapo", {"scale_rewards": "none"}),
    ("dapo", {"reward_aggregation": "normalize_then_sum"}),
    ("dapo", {"ref_sync_every": 1}),
    ("dapo", {"ref_sync_every": 2, "ref_sync_mix": 1.0}),
    ("dapo", {"epsilon_low": 0.01, "epsilon_high": 0.02}),
    ("sapo", {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5}),
    ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 2.5}),
    ("dapo", {"temperature": 1.0}),
    ("dapo", {"max_grad_norm": 0.05}),
    ("dapo", {"weight_decay": 0.1}),
    ("dapo", {"lr_schedule": "cosine"}),
    ("dapo", {"lr_schedule": "constant", "lr": 2.7e-3}),
    ("dapo", {"warmup_ratio": 0.25, "lr": 5.2e-3}),
    ("dapo", {"adam_beta1": 0.8, "adam_beta2": 0.95}),
]
