"""A prompt is read once, ended rows leave, and nobody can tell by the completions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.samples import Completion, Ended, Samples, Sampling
from eval.sampling import LEAVING, sample
from sft_core.config import ModelConfig
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import pack_rows
from sft_core.model.policy import Policy, load_policy
from tests.helpers import FAMILIES, Family, completions, ends_often, forward_calls, tiny_policy

families = pytest.mark.parametrize("family", FAMILIES)
# (share_prompts, rows_leave); without both it is one plain call of `model.generate`.
quicker = pytest.mark.parametrize(("share", "leave"), [(True, True), (True, False), (False, True)])

Prompts = list[list[int]]
A, B, C, D = [9, 40, 77], [51], [8, 30, 31, 32, 33, 90, 91], [60, 61]
PROMPTS: dict[str, Prompts] = {
    "groups": [p for p in (A, B, C, D) for _ in range(3)],
    "all different": [A, B, C, D, [200], [17, 18, 19], [33, 201], [99, 98, 97, 96]],
    "one that comes back": [A, A, B, A, C, C, A],
    "a single group": [C] * 4,
    "a single row": [C],
    "one token each": [[9], [9], [51], [60], [51]],
}
ENDINGS = ("often", "at once", "never")


def quick(policy: Policy, share: bool, leave: bool) -> Policy:
    return replace(policy, layout="sequence" if share else "rows", prefill=share, rows_leave=leave)


def ending(policy: Policy, how: str) -> Policy:
    size = len(policy.tokenizer)
    if how == "often":
        return replace(policy, eos_ids=(*policy.eos_ids, *range(5, size, 3)))
    return replace(policy, eos_ids=tuple(range(size)) if how == "at once" else (size,))  # an id that nobody draws


def drawn(
    policy: Policy, prompts: Prompts, sampling: Sampling, at_once: int | None = None, ended: Ended | None = None
) -> Samples:
    torch.manual_seed(0)
    return sample(policy, prompts, sampling, at_once, ended=ended)


@families
@quicker
@pytest.mark.parametrize("ends", ENDINGS)
def test_greedy_completions_are_the_plain_calls_token_by_token(
    family: Family, share: bool, leave: bool, ends: str
) -> None:
    policy = ending(tiny_policy(family), ends)
    lengths = set()
    for prompts, budget in itertools.product(PROMPTS.values(), (9, 1)):
        greedy = Sampling(budget, temperature=0)
        expected = sample(quick(policy, False, False), prompts, greedy)
        found = sample(quick(policy, share, leave), prompts, greedy)
        assert completions(found) == completions(expected)
        assert found.truncated_N.tolist() == expected.truncated_N.tolist()
        assert found.texts == expected.texts
        assert found.rows.ids_NL.shape == expected.rows.ids_NL.shape and found.logp_NT.numel() == 0
        lengths |= set(expected.rows.completion_len_N.tolist())
    assert {"often": len(lengths) > 3, "at once": lengths == {1}, "never": lengths == {1, 9}}[ends]


@families
@quicker
@pytest.mark.parametrize("prompts", PROMPTS)
def test_every_way_to_sample_records_the_learners_logprobs(
    family: Family, share: bool, leave: bool, prompts: str
) -> None:
    policy = ends_often(tiny_policy(family))
    samples = drawn(quick(policy, share, leave), PROMPTS[prompts], Sampling(8, temperature=0.7))
    assert [prompt for prompt, _ in completions(samples)] == PROMPTS[prompts]
    with torch.no_grad():
        learned_NT, _ = token_logprobs(replace(policy, layout="rows"), samples.rows, 0.7)
    torch.testing.assert_close(samples.logp_NT, learned_NT, rtol=0, atol=1e-5)
    assert (samples.logp_NT[~samples.rows.mask_NT] == 0).all()


@families
def test_a_completion_is_the_same_whichever_rows_are_sampled_beside_it(family: Family) -> None:
    """A row has its own random numbers, so nothing but rounding could make it another."""
    policy = ends_often(tiny_policy(family))
    ways = itertools.product((True, False), (True, False))
    found = [completions(drawn(quick(policy, *way), PROMPTS["groups"], Sampling(9))) for way in ways]
    assert found[1:] == found[:1] * 3 and len({len(tokens) for _, tokens in found[0]}) > 3


# --- the distribution, against every completion that there is ---

FEW, END = 5, 4  # five tokens, the last of which ends a completion


def every_completion(budget: int) -> list[tuple[int, ...]]:
    going = itertools.chain(*(itertools.product(range(END), repeat=length) for length in range(budget)))
    cut_off = itertools.product(range(END), repeat=budget)
    return [*((*tokens, END) for tokens in going), *cut_off]


def frequency_gaps(policy: Policy, prompts: Prompts, draws: int, budget: int) -> Tensor:
    """How far each completion's count is from its expectation, in standard deviations; one row for each prompt."""
    possible = every_completion(budget)
    place = {tokens: number for number, tokens in enumerate(possible)}
    samples = drawn(policy, [p for p in prompts for _ in range(draws)], Sampling(budget, temperature=0.9))
    counts = torch.zeros(len(prompts), len(possible))
    for row, (_, tokens) in enumerate(completions(samples)):
        counts[row // draws, place[tuple(tokens)]] += 1
    gaps = []
    for prompt, count in zip(prompts, counts, strict=True):
        rows = pack_rows([prompt] * len(possible), possible, policy.pad_id)
        with torch.no_grad():
            p = token_logprobs(replace(policy, layout="rows"), rows, 0.9)[0].sum(dim=1).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-5)
        gaps.append((count - draws * p) / (draws * p * (1 - p) + 1).sqrt())
    return torch.stack(gaps)


@families
@quicker
def test_whole_completions_are_drawn_as_often_as_their_probability_says(
    family: Family, share: bool, leave: bool
) -> None:
    policy = tiny_policy(family, vocab_size=FEW, initializer_range=0.5, pad_token_id=0, eos_token_id=END)
    policy = quick(replace(policy, eos_ids=(END,), pad_id=0), share, leave)
    gaps = frequency_gaps(policy, [[0, 1, 2, 3], [2], [3, 3]], draws=1500, budget=3)
    assert gaps.shape == (3, 1 + 4 + 16 + 64)
    assert gaps.abs().max() < 4
    assert 0.5 < float(gaps.square().mean().sqrt()) < 1.2  # counts that are nothing but chance


# --- what the model is asked to compute ---


def shapes(calls: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [tuple(call["input_ids"].shape) for call in calls]


@families
def test_the_prompt_is_read_once_for_its_whole_group(family: Family) -> None:
    policy = ending(tiny_policy(family), "never")
    with forward_calls(policy.model) as calls:
        sample(policy, PROMPTS["groups"], Sampling(5))
    # Four prompts of at most seven tokens, without their last; then a token a row and no prompt again.
    assert shapes(calls) == [(4, 6), *[(12, 1)] * 5]
    with forward_calls(policy.model) as calls:
        sample(quick(policy, False, True), PROMPTS["groups"], Sampling(5))
    assert shapes(calls) == [(12, 7), *[(12, 1)] * 4]


def test_prompts_of_one_token_have_nothing_to_be_read_before() -> None:
    policy = ending(tiny_policy(), "never")
    with forward_calls(policy.model) as calls:
        sample(policy, PROMPTS["one token each"], Sampling(3))
    assert shapes(calls) == [(5, 1)] * 3


@families
@pytest.mark.parametrize("share", [True, False])
def test_rows_that_have_ended_leave(family: Family, share: bool) -> None:
    policy = quick(ends_often(tiny_policy(family)), share, leave=True)
    with forward_calls(policy.model) as calls:
        samples = drawn(policy, [C] * 40, Sampling(10))
    lengths_N = samples.rows.completion_len_N
    batches = [rows for rows, _ in shapes(calls)[int(share) :]]
    assert len(batches) == int(lengths_N.max()) > 4 and len(set(batches)) > 3
    for t, batch in enumerate(batches):
        going = int((lengths_N > t).sum())
        assert going <= batch and (batch - going) * LEAVING < batch
    assert all(width == 1 for _, width in shapes(calls)[1:])  # and no prompt is read again


def test_no_row_leaves_where_none_is_to() -> None:
    policy = quick(ends_often(tiny_policy()), True, leave=False)
    with forward_calls(policy.model) as calls:
        samples = drawn(policy, [C] * 40, Sampling(10))
    assert samples.rows.completion_len_N.unique().numel() > 3
    assert {rows for rows, _ in shapes(calls)[1:]} == {40}


@pytest.mark.parametrize("windows", [True, False])
def test_a_model_that_does_not_attend_to_everything_is_sampled_in_one_plain_call(windows: bool, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0} if windows else {}
    tiny_policy(**window).save(tmp_path)
    policy = ends_often(load_policy(ModelConfig(model=str(tmp_path), device="cpu", precision="float32")))
    assert policy.layout == "sequence" and policy.prefill == policy.rows_leave == (not windows)
    with forward_calls(policy.model) as calls:
        samples = drawn(policy, PROMPTS["groups"], Sampling(8))
    plain = [(12, 7), *[(12, 1)] * (samples.rows.completion_NT.shape[1] - 1)]
    assert (shapes(calls) == plain) == windows
    learned_NT, _ = token_logprobs(policy, samples.rows)
    torch.testing.assert_close(samples.logp_NT, learned_NT, rtol=0, atol=1e-5)


# --- prompts that wait for a place

MANY: Prompts = [prompt for prompt in (C, A, D, B, [17, 18, 19], [200]) for _ in range(4)]


@families
@pytest.mark.parametrize("at_once", [1, 3, 8, 24])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_completion_is_the_same_however_many_are_drawn_at_a_time(
    family: Family, at_once: int, temperature: float
) -> None:
    policy, sampling = ends_often(tiny_policy(family)), Sampling(9, temperature)
    expected = drawn(policy, MANY, sampling)
    found = drawn(policy, MANY, sampling, at_once)
    assert completions(found) == completions(expected) and found.texts == expected.texts
    assert torch.equal(found.truncated_N, expected.truncated_N)
    torch.testing.assert_close(found.logp_NT, expected.logp_NT, rtol=0, atol=1e-5)
    assert len(set(found.rows.completion_len_N.tolist())) > 2 or not temperature


@families
def test_a_place_that_is_free_is_taken_by_the_next_prompt(family: Family) -> None:
    policy, places, budget = ends_often(tiny_policy(family)), 8, 9
    with forward_calls(policy.model) as calls:
        drawn(policy, [C] * 40, Sampling(budget), places)
    rows_of_each = [rows for rows, width in shapes(calls) if width == 1]
    assert set(rows_of_each[:-budget]) == {places}  # behind it are those that came last, with nobody waiting
    assert len(rows_of_each) > budget


def test_the_caller_is_told_of_each_completion_once_as_soon_as_it_has_ended() -> None:
    policy, told = ends_often(tiny_policy()), list[tuple[int, Completion]]()
    samples = drawn(policy, MANY, Sampling(9), 8, lambda *ended: told.extend(zip(*ended, strict=True)))
    lengths, truncated = samples.rows.completion_len_N.tolist(), samples.truncated_N.tolist()
    assert [each for _, each in sorted(told)] == [*map(Completion, samples.texts, lengths, truncated)]
    places = [place for place, _ in told]
    assert places != sorted(places) == list(range(len(MANY)))


def test_columns_that_are_padding_in_all_rows_go() -> None:
    """Else a long evaluation would read an ever longer cache."""
    policy = ends_often(tiny_policy())
    with forward_calls(policy.model) as calls:
        sample(policy, [C, *([B] * 60)], Sampling(5), 4)
    assert max(call["attention_mask"].shape[1] for call in calls) <= len(C) + 5
    assert min(call["attention_mask"].shape[1] for call in calls[-20:]) <= len(B) + 5


@pytest.mark.parametrize("lacking", ["pads", "prefill", "rows_leave", "rows_join"])
def test_a_policy_that_cannot_take_them_in_draws_one_batch_after_the_other(lacking: str) -> None:
    policy = replace(ends_often(tiny_policy()), **{lacking: False})
    found, expected = (drawn(policy, MANY, Sampling(9), at_once) for at_once in (8, None))
    assert completions(found) == completions(expected)
