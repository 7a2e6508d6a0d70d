"""`python -m rewards`: what reward functions say of recorded completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import __main__ as program
from rewards import load_rewards
from rewards.audit import Recorded, audit, correlated, grouped, read_recorded

XML = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"


def file(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    program.main(list(argv))
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as caught:
        program.main(list(argv))
    assert caught.value.code == code
    return capsys.readouterr().err


def hash_rows(*texts: str, gold: str = "7") -> list[Recorded]:
    return [Recorded("How many?", text, gold) for text in texts]


def loud_reward(completions: list[str], **columns: Any) -> list[float | None]:
    """1, 2, 3 by length; no opinion on the empty text."""
    return [float(len(text)) if text else None for text in completions]


def picky_reward(completions: list[str], difficulty: list[int], **columns: Any) -> list[float]:
    """Wants a column of the file; cannot count above 2."""
    return [[0.0, 0.5, 1.0][level] for level in difficulty]


def constant_reward(completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * len(completions)


def silent_reward(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


OWN = [f"tests.test_audit:{name}_reward" for name in ("loud", "constant", "silent")]


# --- what is computed


def test_each_column_says_how_often_a_reward_fires_and_what_it_goes_with() -> None:
    rows = hash_rows("#### 7", "#### 8", "", "7")
    found = audit(rows, load_rewards(["numeric_reward_func", *OWN], [1.0, 1.0, 2.0, 1.0]))
    numeric, loud, constant, silent, total = found.columns
    assert (found.rows, found.groups, found.accuracy) == (4, 1, 0.25)
    assert (numeric.fires, numeric.full, numeric.mean, numeric.with_correct, numeric.verdict) == (
        *(0.25, 0.25, 0.25, pytest.approx(1), ""),
    )
    assert (loud.given, loud.fires, loud.full, loud.low, loud.high) == (3, 1.0, pytest.approx(2 / 3), 1.0, 6.0)
    assert loud.std == pytest.approx(numpy.std([6, 6, 1]))
    assert (constant.verdict, constant.full, constant.with_correct, constant.equal_groups) == (
        "saturated",
        1.0,
        None,
        1,
    )
    assert (silent.verdict, silent.given, silent.mean, silent.fires) == ("silent", 0, None, None)
    assert total.mean == pytest.approx(((1 + 6 + 1) + (6 + 1) + 1 + (1 + 1)) / 4)
    assert found.correlations["loud_reward"]["numeric_reward_func"] == pytest.approx(0.5)
    assert found.correlations["total"]["total"] == pytest.approx(1)
    dead = audit(hash_rows("#### 8", "8"), load_rewards(["numeric_reward_func"])).columns[0]
    assert (dead.verdict, dead.fires, dead.full) == ("dead", 0, None)


@given(st.lists(st.tuples(st.integers(-5, 5), st.one_of(st.none(), st.integers(-5, 5))), max_size=12))
def test_correlations_are_numpys_over_the_rows_that_have_both(pairs: list[tuple[int, int | None]]) -> None:
    first, second = [float(a) for a, _ in pairs], [None if b is None else float(b) for _, b in pairs]
    both = [(a, b) for a, b in pairs if b is not None]
    found = correlated(first, second)
    varies = len(both) > 1 and all(len({pair[i] for pair in both}) > 1 for i in (0, 1))
    assert (found is not None) == varies
    if varies:
        assert found == pytest.approx(numpy.corrcoef(*zip(*both, strict=True))[0, 1])


def test_what_never_varies_is_correlated_with_nothing() -> None:
    assert correlated([0.1, 0.1, 0.1], [0.0, 1.0, 3.0]) is None  # whose computed mean is not 0.1
    assert correlated([0.0, 1e-170], [0.0, 1.0]) is None
    assert correlated([1.0], [2.0]) is None and correlated([None, 1.0], [2.0, None]) is None


def test_groups_are_the_runs_or_those_of_one_question() -> None:
    def row(question: str, **fields: Any) -> Recorded:
        return Recorded(question, "7", "7", fields)

    assert grouped([row("a", step=s, group=g) for s, g in ((1, 0), (1, 0), (2, 0), (2, 0))]) == [[0, 1], [2, 3]]
    assert grouped([row("a"), row("b"), row("a")]) == [[0, 2]]
    assert grouped([row("a"), row("b")]) == []
    assert grouped([row(""), row("")]) == []  # a file without questions
    found = audit([*hash_rows("#### 7", "#### 7"), *(row(q) for q in "bb")], load_rewards(["numeric_reward_func"]))
    assert found.columns[0].equal_groups == 1


def test_extractors_that_disagree_are_shown_starting_with_a_row_that_one_gets_right() -> None:
    texts = ["7 or 8\n#### 9", "#### 7", "so it is 7", "#### 7 apples, or 8", "#### 7.", "nothing"]
    found = audit(hash_rows(*texts), load_rewards(["numeric_reward_func"]))
    assert found.extractors == ("hash", "last_number")
    assert [(row.line, row.found, row.right) for row in found.disagreements] == [
        (3, (None, "7"), (False, True)),
        (4, ("7 apples, or 8", "8"), (False, False)),
    ]
    xml = audit(hash_rows(XML.format("4", "7")), load_rewards(["int_reward_func"]), ["xml", "hash"])
    assert [row.right for row in xml.disagreements] == [(True, False)]
    assert audit(hash_rows(XML.format("4", "7")), load_rewards(["int_reward_func"])).extractors[0] == "xml"


def test_what_is_customary_misses_what_ours_see(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Reasoning of two lines, a gold with a comma, a sign."""
    texts = [
        (XML.format("2+2=4\n4+3=7", "7"), "7"),
        (XML.format("a\nb", "1072"), "1,072"),
        (XML.format("a\nb", "-5"), "-5"),
    ]
    path = file(tmp_path, [{"completion": text, "answer": gold} for text, gold in texts])
    names = [f"rewards.customary:customary_{name}" for name in ("strict_format", "soft_format", "correctness", "int")]
    ours = ["strict_format_reward_func", "soft_format_reward_func", "correctness_reward_func", "int_reward_func"]
    found = json.loads(said(capsys, str(path), "--json", "--rewards", *ours, *names))
    fires = [column["fires"] for column in found["columns"]][:8]
    assert fires == [1, 1, 1, 1, 0, 0, pytest.approx(2 / 3), pytest.approx(2 / 3)]


# --- what is read


def test_records_of_runs_evaluations_and_strangers_are_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "#### 7"}]
    rows = read_recorded(
        file(
            tmp_path,
            [
                {"question": "a", "response": "#### 7", "expected": "7"},
                {"prompt": "a", "completion": "#### 7", "answer": "6+1\n#### 7"},
                {"prompts": chat[:1], "completion": chat[1:], "answer": 7},
                {"completion": "#### 7", "answer": 7.0},
            ],
        )
    )
    assert audit(rows, load_rewards(["numeric_reward_func"])).columns[0].mean == 1
    assert [row.text for row in rows] == ["#### 7"] * 4


def test_other_columns_of_the_file_reach_the_rewards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    records = [{"response": "7", "expected": "7", "difficulty": level} for level in (0, 1, 2)]
    flags = ["--rewards", "tests.test_audit:picky_reward"]
    path = str(file(tmp_path, records))
    assert json.loads(said(capsys, path, "--json", *flags))["columns"][0]["mean"] == 0.5
    del records[1]["difficulty"]
    assert "missing a required argument: 'difficulty'" in refused(capsys, str(file(tmp_path, records)), *flags)
    records[1]["difficulty"] = 3
    error = refused(capsys, str(file(tmp_path, records)), *flags, code=1)
    assert f"error: {path}, line 2: reward function picky_reward: raised IndexError" in error
    assert "Traceback" in error  # the function's own


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: expected a JSON object"),
        ('{"expected": "7"}', "line 2: expected one of the fields response, completion"),
        ('{"response": "7"}', "line 2: expected one of the fields expected, answer"),
        ('{"response": 7, "expected": "7"}', "line 2: expected response or completion to be a text or a chat; it is 7"),
        (
            '{"response": [], "expected": "7"}',
            "line 2: expected response or completion to be a text or a chat; it is []",
        ),
        (
            '{"response": "7", "expected": null}',
            "line 2: expected expected or answer to be a text or a number; it is None",
        ),
    ],
)
def test_a_line_that_is_no_completion_is_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"response": "7", "expected": "7"}\n'
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}{line}\n{good}")
    assert refused(capsys, str(path)) == f"error: {path}, {message}\n"


def test_what_is_typed_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(file(tmp_path, [{"response": "7", "expected": "7"}]))
    (tmp_path / "empty.jsonl").touch()
    for argv, message in {
        (): "expected either a FILE of completions or one text as --response",
        (path, "--response", "7", "--expected", "7"): "expected either a FILE",
        ("--response", "7"): "--expected: expected together with --response",
        (path, "--row", "1"): "--row: no such flag; did you mean --rows?",
        (path, "--rows", "few"): "--rows: invalid int value: 'few'",
        (path, "--rows", "-1"): "--rows -1: expected 0 or more",
        (str(tmp_path),): f"{tmp_path / 'completions.jsonl'}: expected a JSONL file, or a run folder",
        (str(tmp_path / "empty.jsonl"),): "holds no completion",
        (path, "--rewards", "numeric"): "the nearest known name is numeric_reward_func",
        (path, "--rewards", "int_reward_func", "--reward_weights", "1", "2"): "--reward_weights: 2 weights",
        (path, "--rewards", "soft_overlong_reward_func"): "missing a required argument: 'completion_ids'",
    }.items():
        error = refused(capsys, *argv)
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
