"""What the program relies on is tried on the loaded model: each planted fault is found, and one that is none is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TopKLogitsWarper

import eval.sampling
from eval.samples import Sampling
from eval.sampling import sample
from eval.trust import trusted, trusted_sampler
from sft_core.errors import Refused
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.trust import (
    largest_difference,
    plain_logprobs,
    probe_rows,
    refuse_gap,
    trusted_learner,
)
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy
from tests.helpers import FAMILIES, PEFT_IS_BEHIND, Family, adapted, tiny_policy

SHORTCUTS = {"segments", "groups", "split_head", "prefill", "rows_leave", "rows_join"}


def on(policy: Policy) -> set[str]:
    layouts = {"sequence": {"segments", "groups"}, "groups": {"groups"}, "rows": set()}[policy.layout]
    return layouts | {name for name in SHORTCUTS - {"segments", "groups"} if getattr(policy, name)}


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
    assert trusted(policy) == policy and on(policy) == SHORTCUTS
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_a_lora_adapter_keeps_every_shortcut() -> None:
    policy = adapted(tiny_policy())
    assert trusted(policy) == policy


def test_the_check_moves_no_random_state_and_no_weight() -> None:
    policy = tiny_policy()
    before, weights = torch.random.get_rng_state(), [p.clone() for p in policy.model.parameters()]
    trusted(policy)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in policy.model.parameters()) and policy.model.training


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
    assert on(found) == SHORTCUTS - {"split_head"} and agrees(found) and not agrees(policy)
    said = capsys.readouterr().err
    assert said.startswith("learner without the output head by itself: ") and said.count("\n") == 1
    assert "nats off" in said


def test_a_model_that_ignores_position_ids_reads_rows_apart() -> None:
    policy = tiny_policy()

    def counting(real: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], counting)
    found = trusted_learner(policy)
    assert on(found) == {"split_head", "prefill", "rows_leave", "rows_join"} and agrees(found) and not agrees(policy)


def test_a_model_whose_attention_is_not_taken_apart_gets_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny_policy()

    def unregistered(real: Any, *args: Any, **kwargs: Any) -> Any:
        policy.model.config._attn_implementation = "sdpa"
        return real(*args, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], unregistered)
    found = trusted_learner(policy)
    assert on(found) == SHORTCUTS - {"segments"} and agrees(found) and not agrees(policy)
    assert capsys.readouterr().err.startswith("learner without attention by segments: ")


def test_a_model_that_ignores_masks_of_four_dimensions_reads_rows_apart() -> None:
    policy = replace(tiny_policy(), layout="groups")

    def causal_alone(real: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        four = attention_mask is not None and attention_mask.dim() == 4
        return real(*args, attention_mask=None if four else attention_mask, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], causal_alone)
    found = trusted_learner(policy)
    assert on(found) == {"split_head", "prefill", "rows_leave", "rows_join"} and agrees(found) and not agrees(policy)


def test_a_cache_that_cannot_be_selected_from_is_left_to_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot(*_: Any) -> None:
        raise AttributeError("'LinearAttentionLayer' object has no attribute 'batch_select_indices'")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", cannot)
    found = trusted_sampler(tiny_policy())
    assert on(found) == {"segments", "groups", "split_head"}
    assert "AttributeError" in capsys.readouterr().err


def test_a_cache_that_selects_the_wrong_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda cache, rows: real(cache, torch.zeros_like(rows)))
    assert on(trusted_sampler(tiny_policy())) == {"segments", "groups", "split_head"}


def test_a_sampler_that_notes_the_log_probabilities_of_another_temperature_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = eval.sampling.Draw
    monkeypatch.setattr(eval.sampling, "Draw", lambda temperature, *given: draw(temperature * 0.7, *given))
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


def test_sampler_and_learner_that_disagree_on_the_first_texts_of_a_run_end_it_in_one_line() -> None:
    policy = tiny_policy()
    refuse_gap(1e-5, policy)
    refuse_gap(0.2, tiny_policy(precision="bf16"))
    with pytest.raises(Refused, match="--model: sampler and learner disagree on the texts of the first step"):
        refuse_gap(0.2, policy)


def test_dropout_that_is_left_on_is_refused() -> None:
    policy = tiny_policy("gpt2", resid_pdrop=0.1)
    assert trusted_learner(policy) == policy  # in eval mode
    policy.model.train()
    with pytest.raises(Refused, match="nats off.* In eval mode it does: there is dropout that cannot be switched off"):
        trusted_learner(policy)
    healthy = tiny_policy("gpt2")
    healthy.model.train()
    assert trusted_learner(healthy) == healthy


def test_a_sampler_that_draws_at_another_temperature_than_it_notes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.sampling.Draw, "__call__", colder(eval.sampling.Draw.__call__))
    with pytest.raises(Refused, match=r"--model: the sampler does not compute .* nats off"):
        trusted_sampler(tiny_policy())


def colder(real: Any) -> Any:
    """Draws at 0.7 times the temperature."""

    def call(draw: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        pick = draw.pick
        draw.pick = lambda weight_NV, uniform_N1: pick(weight_NV ** (1 / 0.7), uniform_N1)
        try:
            return real(draw, input_ids, scores)
        finally:
            draw.pick = pick

    return call


def test_a_sampler_that_cuts_off_what_nobody_asked_it_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.sampling, "cuts", lambda sampling: [TopKLogitsWarper(3)])
    with pytest.raises(Refused, match=r"--model: the sampler does not compute .* nats off"):
        trusted_sampler(tiny_policy())


def test_a_model_that_reads_its_padding_gets_prompts_of_one_length_at_a_time() -> None:
    policy = tiny_policy()

    def unmasked(real: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    wrapped(policy.model, unmasked)
    found = trusted_sampler(policy)
    assert on(found) == {"segments", "groups", "split_head"} and found.cached and not found.pads


def test_completions_of_prompts_of_one_length_at_a_time_are_those_of_each_prompt_alone() -> None:
    policy = replace(tiny_policy(), prefill=False, rows_leave=False, pads=False)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [10], [11, 12]]
    together = sample(policy, prompts, Sampling(6, temperature=0))
    alone = [sample(policy, [prompt], Sampling(6, temperature=0)).rows.completion_ids()[0] for prompt in prompts]
    assert together.rows.completion_ids() == alone and together.rows.prompt_ids() == prompts
    drawn = sample(policy, prompts, Sampling(6))
    assert largest_difference(drawn.logp_NT, plain_logprobs(policy, drawn.rows), drawn.rows) < 1e-4


def test_a_model_that_counts_positions_by_its_cache_takes_in_no_prompt_in_the_middle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As RoFormer does: padding shifts a whole row, which rotary positions do not notice; coming in later does."""
    policy = tiny_policy()

    def by_cache(real: Any, *args: Any, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        known = past_key_values.get_seq_length() if past_key_values is not None else 0
        ids = args[0] if args else kwargs["input_ids"]
        place = torch.arange(known, known + ids.shape[1]).expand(len(ids), -1)
        return real(*args, position_ids=place, past_key_values=past_key_values, **kwargs)

    wrapped(backbone_and_head(policy.model)[0], by_cache)
    found = trusted_sampler(policy)
    assert on(found) == SHORTCUTS - {"rows_join"}
    assert capsys.readouterr().err.startswith("sampler without prompts that take the places of ended rows: ")
