"""What the program relies on is tried on the loaded model: each planted fault is found, and one that is none is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import eval.sampling
from eval.trust import trusted, trusted_sampler
from sft_core.errors import Refused
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.trust import largest_difference, plain_logprobs, probe_rows, refuse_dropout, trusted_learner
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy
from tests.helpers import FAMILIES, PEFT_IS_BEHIND, Family, adapted, tiny_policy, tokenizer

SHORTCUTS = ("share_prompts", "split_head", "prefill", "rows_leave")


def on(policy: Policy) -> set[str]:
    return {name for name in SHORTCUTS if getattr(policy, name)}


def wrapped(module: Any, change: Callable[..., Any]) -> None:
    """`change` stands in for the module's forward and gets the real one first."""
    real = module.forward
    # `generate` looks at the signature.
    module.forward = wraps(real)(lambda *args, **kwargs: change(real, *args, **kwargs))


def agrees(policy: Policy) -> bool:
    """The learner as the policy sets it up scores tokens as the plain model does."""
    rows = probe_rows(policy)
    with torch.no_grad():
        found_NT, _ = token_logprobs(policy, rows)
        return largest_difference(found_NT, plain_logprobs(policy, rows), rows) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_healthy_model_keeps_every_shortcut_and_nothing_is_said(
    family: Family, precision: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny_policy(family, precision=precision)
    assert trusted(policy) == policy and on(policy) == set(SHORTCUTS)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_a_lora_adapter_keeps_every_shortcut() -> None:
    policy = adapted(tiny_policy())
    assert trusted(policy) == policy


def test_the_check_moves_no_random_state_and_no_weight() -> None:
    policy = tiny_policy()
    before, weights = torch.random.get_rng_state(), [p.clone() for p in policy.model.parameters()]
    trusted(policy)
    refuse_dropout(policy)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in policy.model.parameters()) and not policy.model.training


def test_a_head_with_a_hidden_scale_is_found_and_the_whole_models_logits_are_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = tiny_policy()

    def scaled(real: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    wrapped(policy.model, scaled)
    found = trusted(policy)
    assert on(found) == {"share_prompts", "prefill", "rows_leave"} and agrees(found) and not agrees(policy)
    said = capsys.readouterr().err
    assert said.startswith("learner without the output head by itself: ") and said.count("\n") == 1
    assert "nats off" in said


def test_a_model_that_ignores_position_ids_reads_rows_apart() -> None:
    policy = tiny_policy()

    def counting(real: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], counting)
    found = trusted_learner(policy)
    assert on(found) == {"split_head", "prefill", "rows_leave"} and agrees(found) and not agrees(policy)


def test_a_model_that_ignores_masks_of_four_dimensions_reads_rows_apart() -> None:
    policy = tiny_policy()

    def causal_alone(real: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        four = attention_mask is not None and attention_mask.dim() == 4
        return real(*args, attention_mask=None if four else attention_mask, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], causal_alone)
    found = trusted_learner(policy)
    assert on(found) == {"split_head", "prefill", "rows_leave"} and agrees(found) and not agrees(policy)


def test_a_cache_that_cannot_be_selected_from_is_left_to_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot(*_: Any) -> None:
        raise AttributeError("'LinearAttentionLayer' object has no attribute 'batch_select_indices'")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", cannot)
    found = trusted_sampler(tiny_policy())
    assert on(found) == {"share_prompts", "split_head"}
    assert "AttributeError" in capsys.readouterr().err


def test_a_cache_that_selects_the_wrong_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda cache, rows: real(cache, torch.zeros_like(rows)))
    assert on(trusted_sampler(tiny_policy())) == {"share_prompts", "split_head"}


def test_a_sampler_that_notes_the_log_probabilities_of_another_temperature_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = eval.sampling._LogprobRecorder
    monkeypatch.setattr(eval.sampling, "_LogprobRecorder", lambda temperature, eos: recorder(temperature * 0.7, eos))
    with pytest.raises(Refused, match=r"--model: the sampler does not compute .* nats off"):
        trusted_sampler(tiny_policy())


def test_a_model_that_scores_a_row_by_its_neighbours_is_refused() -> None:
    policy = tiny_policy()

    def mixing(real: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = real(*args, **kwargs).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden + hidden.mean(dim=0, keepdim=True) * (len(hidden) > 1))

    backbone, _ = backbone_and_head(policy.model)
    wrapped(backbone, mixing)
    wrapped(
        policy.model,
        lambda real, *args, use_cache=None, **kwargs: SimpleNamespace(
            logits=policy.model.lm_head(backbone(*args, **kwargs).last_hidden_state)
        ),
    )
    with pytest.raises(Refused, match="--model: the learner does not compute what the plain model does"):
        trusted_learner(policy)


def test_dropout_that_is_left_on_is_refused() -> None:
    policy = tiny_policy("gpt2", resid_pdrop=0.1)
    with pytest.raises(Refused, match="dropout that cannot be switched off"):
        refuse_dropout(policy)
    refuse_dropout(tiny_policy("gpt2"))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2, "max_position_embeddings": 128}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# Families that differ in kind: their settings, and the shortcuts that are wrong or fail there.
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (SMALL, set()),
    "granite": (SMALL | {"logits_scaling": 4.0}, set()),  # a scale that is known
    "cohere": (SMALL | {"logit_scale": 0.25}, {"split_head"}),  # one that is not
    "gptj": (GPT | {"rotary_dim": 4}, {"share_prompts"}),  # packed rows
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, {"share_prompts"}),  # ALiBi
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, {"share_prompts"}),
    "mixtral": (SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}, set()),
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        {"share_prompts", "prefill", "rows_leave"},
    ),
    "qwen3_5_text": (
        SMALL | LINEAR | {"num_hidden_layers": 4, "head_dim": 8},
        {"share_prompts", "prefill", "rows_leave"},
    ),
    "lfm2": (
        SMALL | {"block_ff_dim": 64, "layer_types": ["conv", "full_attention"]},
        {"share_prompts", "prefill", "rows_leave"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_each_kind_is_learned_from_as_it_is(kind: str) -> None:
    settings, wrong = KINDS[kind]
    special = {name: tokenizer().eos_token_id for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer()), **special, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            if p.dim() > 1:  # logits far from uniform, on which most faults are invisible
                torch.nn.init.normal_(p, std=0.3)
    found = trusted(replace(tiny_policy(), model=model))
    assert set(SHORTCUTS) - on(found) == wrong and agrees(found)


def test_a_recurrent_model_whose_state_reads_the_padding_is_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, vocab_size=375
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(Refused, match="the sampler does not compute what the plain model does"):
        trusted(replace(tiny_policy(), model=model))
