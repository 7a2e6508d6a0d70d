"""One prompt, encoded once, serves all its completions, and none sees another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, MambaConfig, MistralConfig, Qwen2Config

import sft_core.learn.layout
from sft_core.learn.layout import pack
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.model.segments import Layout, kinds_of_layers
from tests.helpers import FAMILIES, Family, forward_calls, largest_difference, tiny_policy

families = pytest.mark.parametrize("family", FAMILIES)
LAYOUTS: tuple[Layout, ...] = ("sequence", "groups", "rows")

PROMPTS = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [8, 9], [8, 9], [5, 6, 7]]
COMPLETIONS = [[10, 11, 2], [12, 2], [13], [14, 15, 16, 2], [17, 2], [18, 19]]


def rows() -> Rows:
    return pack_rows(PROMPTS, COMPLETIONS, pad_id=0)


def test_a_packed_row_is_the_one_drawn_in_the_module() -> None:
    q, a, b, c, e = 3, 4, 5, 6, 2
    packed = pack(pack_rows([[q, q, q], [q, q, q]], [[a, b, e], [c, e]], pad_id=0), "groups")
    assert packed.ids_RL.tolist() == [[q, q, q, a, b, e, c, e]]
    assert packed.position_RL.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    drawn = sft_core.learn.layout.__doc__.split("    attention")[1].splitlines()  # type: ignore
    seen = [[mark == "1" for mark in line.split()[:8]] for line in drawn if line.strip()]
    assert packed.attention[0, 0].tolist() == seen
    assert packed.predictor_M.tolist() == [2, 3, 4, 2, 6]


def test_consecutive_rows_of_one_prompt_share_it_and_others_do_not() -> None:
    packed = pack(rows(), "groups")
    assert packed.ids_RL.shape == (3, 9)  # 3 + 3 + 2 + 1, 2 + 4 + 2, 3 + 2
    assert packed.ids_RL[1].tolist() == [8, 9, 14, 15, 16, 2, 17, 2, 0]
    alone = pack(rows(), "rows")
    assert alone.ids_RL.shape == (6, 6) and alone.attention.dim() == 2


def test_a_completion_without_tokens_predicts_nothing() -> None:
    left_out = rows().without_completions(torch.tensor([True, False, False, True, True, False]))
    packed = pack(left_out, "groups")
    assert len(packed.predictor_M) == int(left_out.mask_NT.sum()) == 2 + 1 + 2


@pytest.mark.parametrize(("longest", "groups"), [(64, 1), (512, 1), (2048, 8)])
def test_a_mask_over_long_completions_gives_way_to_rows_apart(longest: int, groups: int) -> None:
    completions = [[7] * (longest - longest // 12 * number) for number in range(8)]
    packed = pack(pack_rows([[5] * 100] * 8, completions, pad_id=0), "groups")
    assert len(packed.ids_RL) == groups and packed.attention.dim() == (4 if groups == 1 else 2)
    assert len(packed.predictor_M) == sum(map(len, completions))


@families
@pytest.mark.parametrize("layout", ["sequence", "groups"])
def test_padding_of_a_packed_row_is_seen_by_no_token(layout: Layout, family: Family) -> None:
    policy = replace(tiny_policy(family), layout=layout)
    expected = token_logprobs(policy, rows())[0]
    first, second, third = (token_logprobs(policy, rows().cut(*part))[0] for part in ((0, 3), (3, 5), (5, 6)))
    for part, found in ((slice(0, 3), first), (slice(3, 5), second), (slice(5, 6), third)):
        torch.testing.assert_close(expected[part, : found.shape[1]], found, rtol=0, atol=1e-5)


def learned(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    logp_NT, _ = token_logprobs(policy, rows(), 0.7)
    logp_NT.square().sum().backward()
    return logp_NT.detach(), {name: p.grad for name, p in policy.trainable()}


@families
@pytest.mark.parametrize("layout", ["sequence", "groups"])
def test_sharing_prompts_leaves_logprobs_and_gradient_unchanged(layout: Layout, family: Family) -> None:
    shared, gradient = learned(replace(tiny_policy(family, torch.float64), layout=layout))
    alone, expected = learned(replace(tiny_policy(family, torch.float64), layout="rows"))
    tolerance = 1e-12 if family == "gpt2" else 1e-5  # Qwen2's norms are float32
    torch.testing.assert_close(shared, alone, rtol=0, atol=tolerance)
    assert largest_difference(gradient, expected) < 1e3 * tolerance


@families
def test_a_completion_that_sees_another_would_be_seen(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    policy = replace(tiny_policy(family), layout="groups")
    expected = token_logprobs(policy, rows())[0]

    def causal(part_RL: Tensor) -> Tensor:
        R, L = part_RL.shape
        return torch.ones(L, L, dtype=torch.bool).tril().expand(R, 1, L, L)

    monkeypatch.setattr(sft_core.learn.layout, "_attention", causal)
    assert (token_logprobs(policy, rows())[0] - expected).abs().max() > 0.1


@families
def test_wrong_positions_of_packed_completions_would_be_noticed(family: Family) -> None:
    policy = tiny_policy(family)
    expected = token_logprobs(policy, rows())[0]

    def counted_through(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = torch.arange(kwargs["input_ids"].shape[1]).expand_as(kwargs["input_ids"])
        return args, {**kwargs, "position_ids": positions}

    backbone = policy.model.model if family == "qwen2" else policy.model.transformer
    backbone.register_forward_pre_hook(counted_through, with_kwargs=True)
    assert (token_logprobs(policy, rows())[0] - expected).abs().max() > 0.1


def test_a_groups_prompt_is_encoded_once() -> None:
    policy = tiny_policy()
    with forward_calls(policy.model) as calls:
        for layout in LAYOUTS:
            token_logprobs(replace(policy, layout=layout), rows())
    assert [tuple(call["input_ids"].shape) for call in calls] == [(1, 22), (3, 9), (6, 6)]


@pytest.mark.parametrize(
    ("config", "everything"),
    [
        (Qwen2Config(), True),
        (GPT2Config(), True),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1), False),
        (MistralConfig(sliding_window=8), False),
        (MistralConfig(sliding_window=None), True),
        (Gemma2Config(), False),
        (MambaConfig(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_prompts_are_shared_only_where_a_mask_can_keep_completions_apart(config: Any, everything: bool) -> None:
    assert (kinds_of_layers(config) == {"full"}) == everything
