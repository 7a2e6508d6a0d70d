"""Rows in one sequence, which attention takes apart, against the same rows each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sft_core.learn.layout
import sft_core.model.segments
from benchmarks.layouts import kept, line_through, policy_of, row_of
from sft_core.learn.layout import KEY_BLOCK, WASTE, Row, batched, rows_of_group, segments
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from tests.helpers import PEFT_IS_BEHIND, adapted, checkpoint_activations, largest_difference, tiny_policy
from tests.kernels import asked_for

# The second layer's, shorter than rows.
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def rows_of(lengths: dict[int, list[int]], seed: int = 0) -> Rows:
    """For each prompt of this length completions of these."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    prompts = [ids(length) for length in lengths]
    repeated = [prompt for prompt, each in zip(prompts, lengths.values(), strict=True) for _ in each]
    return pack_rows(repeated, [ids(length) for each in lengths.values() for length in each], pad_id=0)


ROWS = {
    "groups": rows_of({7: [3, 11, 1, 6], 2: [9, 9], 12: [4]}),
    "single rows": rows_of({3: [8], 9: [1], 5: [5]}),  # as SFT's
    "completions without tokens": rows_of({4: [5, 0, 2], 6: [0, 0], 3: [0, 7]}),
    "long prompts": rows_of({40: [3, 1, 5, 2], 9: [7, 6], 30: [2, 2, 0, 4]}),  # keys alone
    "nothing to learn": rows_of({4: [0, 0], 6: [0]}),
}
POLICIES: dict[str, Callable[[], Policy]] = {
    "fewer keys than queries": lambda: tiny_policy(dtype=torch.float64),
    "absolute positions": lambda: tiny_policy("gpt2", torch.float64),
    "a sliding window": lambda: tiny_policy(dtype=torch.float64, **WINDOW),
    "LoRA": lambda: adapted(tiny_policy(dtype=torch.float64)),
    "checkpointing": lambda: checkpointed(tiny_policy(dtype=torch.float64, **WINDOW)),
    "float32": lambda: tiny_policy(),
}


def checkpointed(policy: Policy) -> Policy:
    checkpoint_activations(policy)
    policy.model.train()
    return policy


def learned(policy: Policy, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    logp_NT, _ = token_logprobs(policy, rows, 0.7)
    (logp_NT * torch.linspace(-1, 2, logp_NT.numel(), dtype=logp_NT.dtype).view_as(logp_NT)).sum().backward()
    gradient = {name: p.grad for name, p in policy.trainable() if p.grad is not None}
    return logp_NT.detach(), gradient


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
@pytest.mark.parametrize("block", [0, 512], ids=["short prompts in rows", "prompts as keys alone"])
@pytest.mark.parametrize("waste", [1, 10**6], ids=["a call for each length", "one call for all"])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", POLICIES)
def test_one_sequence_gives_the_logprobs_and_gradient_of_rows_apart(
    kind: str, case: str, waste: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KEY_BLOCK, "cpu", block)
    monkeypatch.setattr(sft_core.learn.layout, "WASTE", waste)
    assert POLICIES[kind]().layout == "sequence"
    found, gradient = learned(POLICIES[kind](), ROWS[case])
    expected, apart = learned(replace(POLICIES[kind](), layout="rows"), ROWS[case])
    # Sums of at most 300 products of numbers up to 30: a thousand roundings of such a number.
    bound = 1e-2 if kind == "float32" else 1e-10
    torch.testing.assert_close(found, expected, rtol=0, atol=bound / 100)
    assert gradient.keys() == apart.keys()
    assert largest_difference(gradient, apart) < bound


def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens_and_not_with_their_square() -> None:
    policy = replace(tiny_policy(), logit_chunk=2**14)
    few, more, most = (kept(policy, rows_of({20: [30] * completions})) for completions in (4, 8, 16))
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)


def shape_of(row: Row) -> tuple[int, int]:
    """Queries and keys."""
    return len(row.places) - row.before, len(row.places)


def test_rows_of_similar_size_share_a_call_and_others_do_not() -> None:
    rows = [Row(tuple(range(length)), before=0) for length in (110, 500, 112, 490)]
    assert [[len(row.places) for row in batch] for batch in batched(rows)] == [[500, 490], [112, 110]]
    # The padding of many rows is counted together.
    many = batched([Row(tuple(range(length)), before=0) for length in (*([110] * 50), 100)])
    assert [len(batch) for batch in many] == [50, 1] or [len(batch) for batch in many] == [51]
    wasted = [len(batch) * len(batch[0].places) ** 2 - sum(row.pairs for row in batch) for batch in many]
    assert max(wasted) < WASTE


def test_a_prompt_is_keys_alone_where_that_is_fewer_pairs() -> None:
    short = rows_of_group(range(100), [range(100, 103), range(103, 107)], 512)
    assert [shape_of(row) for row in short] == [(100, 100), (3, 103), (4, 104)]
    assert short[2].places == (*range(100), *range(103, 107))
    # 1,124 causal queries are 1124 * (1124 + 512) / 2 pairs; 1,024 that look at a prompt of 100, too, 1024 * 1124.
    long = rows_of_group(range(100), [range(100, 1124), range(1124, 1224)], 512)
    assert [shape_of(row) for row in long] == [(1124, 1124), (200, 200)]
    assert [shape_of(row) for row in rows_of_group(range(9), [], 512)] == [(9, 9)]
    # Where being causal pays from the first key on: 9 + 4 queries of half of 13 keys; or 9 of 4.5, and 4 of 13.
    assert [shape_of(row) for row in rows_of_group(range(9), [range(9, 13)], 0)] == [(13, 13)]
    assert [shape_of(row) for row in rows_of_group(range(9), [range(9, 13)], 512)] == [(9, 9), (4, 13)]


def test_each_token_finds_its_own_attention() -> None:
    """Of a sequence whose attention is each query's own place, back comes the sequence."""
    rows = [
        *rows_of_group(range(9), [range(9, 11), range(11, 12)], 512),
        *rows_of_group(range(12, 14), [range(14, 20)], 0),
    ]
    assert {bool(row.before) for row in rows} == {False, True}
    cut = segments(rows, 20)
    assert cut.query_at[cut.place_S].tolist() == list(range(20))


def test_a_row_that_sees_another_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    policy, rows = tiny_policy(), ROWS["groups"]
    expected, _ = token_logprobs(policy, rows)
    real: Any = sft_core.model.segments._at

    def another(tokens: Tensor, places: Tensor) -> Tensor:
        return real(tokens, places.roll(3))  # type: ignore[no-any-return]

    monkeypatch.setattr(sft_core.model.segments, "_at", another)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(token_logprobs(policy, rows)[0], expected, rtol=0, atol=0.1)


def test_the_table_of_layouts_counts_their_tokens() -> None:
    policy = policy_of(1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    cells = row_of(policy, longest=30, prompt=100, repeats=1)
    assert len(cells) == 7 and cells[0] == "30"
    assert cells[-1] == f"{8 * 130 / (100 + 10 + 13 + 16 + 19 + 21 + 24 + 27 + 30):.2f}"


def test_a_line_through_bytes_says_how_far_they_are_from_it() -> None:
    assert line_through([10, 20, 40], [1_020_000, 1_040_000, 1_080_000]).startswith("Kept: 1.0 MB and 2.0 kB a token;")
    bent = line_through([10, 20, 30], [100, 400, 900])
    assert "10: -33.3%" in bent and "20: +16.7%" in bent  # -1/3 (33 instead of 100) and 467 instead of 400


@pytest.mark.parametrize("masked", [False, True])
def test_the_next_tokens_attention_repeats_no_keys_and_is_the_same(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, tokens, 8, dtype=torch.float64, generator=generator)
        for heads, tokens in ((6, 1), (2, 40), (2, 40))
    )
    mask = torch.rand(3, 1, 1, 40, generator=generator) > 0.3 if masked else None
    module, given = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False), {"scaling": 0.3}
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
    seen = []

    def watched(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append((tuple(query.shape), tuple(key.shape)))
        return scaled_dot_product_attention(query, key, *rest, **named)

    monkeypatch.setattr(sft_core.model.segments, "scaled_dot_product_attention", watched)
    found, _ = sft_core.model.segments._attend(module, query, key, value, mask, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert seen == [((3, 2, 3, 8), (3, 2, 40, 8))]


@pytest.mark.parametrize(
    "capability, half, plain", [((7, 5), True, False), ((8, 0), True, True), ((8, 0), False, False)]
)
def test_heads_share_keys_only_where_flash_attention_is(
    capability: tuple[int, int], half: bool, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the table in docs/t4-memory.md says of the same call."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: half)
    assert sft_core.model.segments._repeats_no_keys(torch.device("cuda")) is plain
    dtype = torch.float16 if half else torch.float32
    assert asked_for("a prompt with its completion, in the learner", capability, dtype) == (not plain, plain)


@pytest.mark.parametrize("shares", [True, False])
def test_a_prompt_gets_a_mask_where_no_kernel_shares_keys(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 9, 8, dtype=torch.float64, generator=generator) for heads in (6, 2, 2))
    module, seen = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False), []

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        seen.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **given)

    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    monkeypatch.setattr(sft_core.model.segments, "sdpa_attention_forward", watched)
    monkeypatch.setattr(sft_core.model.segments, "_repeats_no_keys", lambda device: shares)
    found, _ = sft_core.model.segments._attend(module, query, key, value, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert [mask is None for mask in seen] == [shares]
    sft_core.model.segments._attend(module, query, key, value, None, is_causal=False)
    assert seen[1] is None  # both ways: nothing is hidden
