"""What `sft_core.learn.rows` claims: lengths alone tell tokens from padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_core.learn.rows import Rows, Tokens, pack_rows, pad
from tests.helpers import attention_of, random_rows, tiny_policy, widened

EOS = PAD = 2

# Prompts and completions made of the very ids that stand for padding and for the end of a sequence.
TREACHEROUS = pack_rows([[PAD, 7, PAD], [5]], [[EOS], [6, PAD, EOS, PAD]], pad_id=PAD)


def test_padding_is_on_the_left_of_prompts_and_on_the_right_of_completions() -> None:
    rows = pack_rows([[5, 6], [7]], [[8], [9, 3]], pad_id=0)
    assert rows.ids_NL.tolist() == [[5, 6, 8, 0], [0, 7, 9, 3]]
    assert rows.completion_NT.tolist() == [[8, 0], [9, 3]]
    assert rows.ids_NL.dtype == torch.int64


def test_masks_come_from_lengths_and_not_from_token_values() -> None:
    assert TREACHEROUS.mask_NT.tolist() == [[True, False, False, False], [True, True, True, True]]
    assert attention_of(TREACHEROUS).tolist() == [[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]


def test_the_mask_counts_every_completion_token_and_its_stop_token() -> None:
    rows = random_rows(tiny_policy(), (4, 7, 2), (5, 1, 8))
    assert rows.mask_NT.sum(dim=1).tolist() == [5, 1, 8]
    assert attention_of(rows).sum(dim=1).tolist() == [4 + 5, 7 + 1, 2 + 8]
    last_N = rows.completion_len_N - 1
    assert rows.completion_NT[torch.arange(3), last_N].tolist() == [tiny_policy().eos_ids[0]] * 3
    assert rows.mask_NT[torch.arange(3), last_N].all()


def test_the_padding_id_changes_no_mask() -> None:
    for pad_id in (0, EOS, 7):
        rows = pack_rows([[PAD, 7, PAD], [5]], [[EOS], [6, PAD, EOS, PAD]], pad_id)
        assert torch.equal(rows.mask_NT, TREACHEROUS.mask_NT)
        assert torch.equal(attention_of(rows), attention_of(TREACHEROUS))


def test_more_padding_changes_no_token() -> None:
    assert own_tokens(widened(TREACHEROUS, left=3, right=2, filler=9)) == own_tokens(TREACHEROUS)


ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)
sizes = st.integers(1, 8) | st.builds(Tokens, st.integers(1, 40), st.booleans())


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=7), st.integers(0, 3), sizes)
def test_micro_batches_hold_every_row_once_whatever_their_size(
    pairs: list[tuple[list[int], list[int]]], pad_id: int, size: int | Tokens
) -> None:
    rows = pack_rows([p for p, _ in pairs], [c for _, c in pairs], pad_id)
    cut = list(rows.micro_batches(size))
    assert [i for at, _ in cut for i in range(at.start, at.stop)] == list(range(len(pairs)))
    assert [pair for _, micro in cut for pair in own_tokens(micro)] == pairs
    assert all(len(micro) == at.stop - at.start for at, micro in cut)
    assert isinstance(size, Tokens) or all(len(micro) <= size for _, micro in cut)


# Two prompts of 3 and one of 2 tokens; the first is shared.
GROUPS = pack_rows([[5, 6, 7]] * 3 + [[8, 9, 5]] + [[4, 4]], [[1], [1] * 4, [1] * 2, [1] * 5, [1] * 3], pad_id=0)


def parts(rows: Rows, size: Tokens) -> list[tuple[int, int]]:
    return [(at.start, at.stop) for at, _ in rows.micro_batches(size)]


def test_tokens_count_a_shared_prompt_once_and_padding_where_rows_lie_apart() -> None:
    shared, padded = GROUPS.tokens(padded=False), GROUPS.tokens(padded=True)
    assert shared(0, 3) == 3 + 1 + 4 + 2 and shared(1, 3) == 3 + 4 + 2 and shared(0, 5) == 10 + 8 + 5
    assert padded(0, 3) == 3 * (3 + 4) and padded(4, 5) == 5


def test_micro_batches_of_tokens_hold_no_more_than_that_and_are_about_equal() -> None:
    assert parts(GROUPS, Tokens(100)) == [(0, 5)]
    assert parts(GROUPS, Tokens(18)) == [(0, 3), (3, 5)]  # 10 and 13: filled to the brim the first would have 18
    assert parts(GROUPS, Tokens(9)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert parts(GROUPS, Tokens(1)) == [(n, n + 1) for n in range(5)]  # a row is never cut


def test_fullness_is_what_micro_batches_hold_of_what_they_may() -> None:
    assert GROUPS.fullness(2) == {"micro_batches": 3, "micro_batch_fill": 5 / 6}
    assert GROUPS.fullness(Tokens(18)) == {"micro_batches": 2, "micro_batch_fill": (10 + 13) / 36}
    assert GROUPS.fullness(Tokens(100)) == {"micro_batches": 1, "micro_batch_fill": 0.23}


def test_equal_ids_behind_unlike_padding_are_not_one_prompt() -> None:
    rows = pack_rows([[0, 7], [7]], [[1], [1]], pad_id=0)  # the second is padded with the first's own token
    assert rows.tokens(padded=False)(0, 2) == 2 + 1 + 1 + 1


def test_a_micro_batch_pays_for_no_other_rows_padding() -> None:
    (_, first), (_, second) = TREACHEROUS.micro_batches(1)
    assert first.ids_NL.tolist() == [[PAD, 7, PAD, EOS]]
    assert second.ids_NL.tolist() == [[5, 6, PAD, EOS, PAD]]
    assert (first.prompt_width, second.prompt_width) == (3, 1)


def test_cutting_and_masking_leave_the_rows_unchanged() -> None:
    before = TREACHEROUS.ids_NL.clone(), TREACHEROUS.prompt_len_N.clone(), TREACHEROUS.completion_len_N.clone()
    for _, micro in TREACHEROUS.micro_batches(1):
        micro.mask_NT.zero_()
        attention_of(micro).zero_()
    TREACHEROUS.mask_NT.zero_()
    after = TREACHEROUS.ids_NL, TREACHEROUS.prompt_len_N, TREACHEROUS.completion_len_N
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_leaving_completions_out_leaves_the_rows_themselves_unchanged() -> None:
    before = TREACHEROUS.completion_len_N.clone()
    left = TREACHEROUS.without_completions(torch.tensor([False, True]))
    assert left.mask_NT.tolist() == [[True, False, False, False], [False] * 4]
    assert torch.equal(TREACHEROUS.completion_len_N, before)


def test_padding_a_list_leaves_it_unchanged() -> None:
    sequences = [[1, 2, 3], [4]]
    assert pad(sequences, 0, "right").tolist() == [[1, 2, 3], [4, 0, 0]]
    assert sequences == [[1, 2, 3], [4]]


def own_tokens(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt and completion, by the masks."""
    P, pairs = rows.prompt_width, []
    for row, attended, trained in zip(rows.ids_NL, attention_of(rows).bool(), rows.mask_NT, strict=True):
        pairs.append((row[:P][attended[:P]].tolist(), row[P:][trained].tolist()))
    return pairs
