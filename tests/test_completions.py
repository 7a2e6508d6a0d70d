"""tokens.jsonl: every sampled token, its text, its log-probability, and whether the advantage acted on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_core.completions import Pieces, completion_records, token_records
from grpo_core.step import StepReport
from tests.faulty import FORKS, command, ended
from tests.helpers import SHARED, ends_often, grpo_config, learner, step, tiny_policy, tokenizer

REAL_QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"


def text(tok: Any, ids: list[int]) -> str:
    return str(tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def words() -> Any:
    """A tokenizer whose words carry their space, and lose it at the start of a text."""
    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "</s>": 3}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="s"))
    built.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>")


@given(st.lists(st.integers(0, len(tokenizer()) - 1), max_size=40))
def test_pieces_join_to_the_text_of_any_ids_and_are_as_many(ids: list[int]) -> None:
    """Most lists of ids are no valid UTF-8: half characters, bytes that begin none."""
    pieces = Pieces(tokenizer())(ids)
    assert "".join(pieces) == text(tokenizer(), ids)
    assert len(pieces) == len(ids)


@pytest.mark.parametrize("which", ["built in", "real", "words"])
def test_the_token_that_completes_a_character_has_all_of_it(which: str) -> None:
    if which == "real" and not REAL_QWEN.is_dir():
        pytest.skip("needs a real tokenizer under $GRPO_SHARED")
    if which == "words":
        assert Pieces(words())([1, 2, 0, 1, 3]) == ["cat", "s", " the", " cat", "</s>"]
        return
    tok = tokenizer() if which == "built in" else AutoTokenizer.from_pretrained(REAL_QWEN)
    ids = tok("Tom: 3 € 𝛑 नमस्ते 👩‍👩‍👧\n<|im_end|>").input_ids
    pieces = Pieces(tok)(ids)
    assert "".join(pieces) == text(tok, ids) and pieces[-1] == "<|im_end|>"
    assert "" in pieces and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert [piece for piece in pieces if "𝛑" in piece] in (["𝛑"], [" 𝛑"])


def taken(**fields: Any) -> StepReport:
    return step(learner(ends_often(tiny_policy()), grpo_config(max_completion_tokens=6, **fields)))


def rows(report: StepReport) -> list[dict[str, Any]]:
    return token_records(7, report, Pieces(tokenizer()))


def test_a_record_holds_what_was_sampled_and_what_the_sampler_thought_of_it() -> None:
    report = taken()
    samples = report.rollout.samples
    assert len({len(row["ids"]) for row in rows(report)}) > 1
    for n, row in enumerate(rows(report)):
        assert (row["step"], row["row"]) == (7, n)
        assert row["ids"] == samples.rows.completion_ids()[n]
        assert "".join(row["pieces"]) == text(tokenizer(), row["ids"])
        logp_T = samples.logp_NT[n, : len(row["ids"])]
        assert torch.tensor(row["logps"]) == pytest.approx(logp_T, abs=6e-4) and min(row["logps"]) < -0.1
        assert row["kept"] == "1" * len(row["ids"])


def test_rows_that_the_mask_leaves_out_are_kept_nowhere() -> None:
    report = taken(mask_truncated=True)
    truncated = report.rollout.samples.truncated_N.tolist()
    assert 0 < sum(truncated) < len(truncated)
    for row, left_out in zip(rows(report), truncated, strict=True):
        assert row["kept"] == ("0" if left_out else "1") * len(row["ids"])


def test_tokens_outside_the_share_of_high_entropy_are_not_kept() -> None:
    report = taken(top_entropy=0.3)
    kept = "".join(row["kept"] for row in rows(report))
    assert 0.25 < kept.count("1") / len(kept) < 0.5
    flat = [bool(int(sign)) for row in rows(report) for sign in row["kept"]]
    assert flat == report.kept_NT[report.rollout.samples.rows.mask_NT].tolist()


def test_the_texts_of_both_files_are_of_the_same_ids() -> None:
    report, policy = taken(), tiny_policy()
    assert [row["response"] for row in completion_records(7, report)] == policy.tokenizer.batch_decode(
        report.rollout.samples.rows.completion_ids(), skip_special_tokens=True
    )


@FORKS
def test_a_run_records_the_tokens_of_every_completion_unless_told_not_to(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    def lines(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    completions, recorded = lines(whole / "completions.jsonl"), lines(whole / "tokens.jsonl")
    assert [(r["step"], r["row"], len(r["ids"])) for r in recorded] == [
        (c["step"], c["row"], c["tokens"]) for c in completions
    ]
    assert ended(command(model, tmp_path / "run", "--no_record_tokens")).code == 0
    assert not (tmp_path / "run" / "tokens.jsonl").exists()
    assert (tmp_path / "run" / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
