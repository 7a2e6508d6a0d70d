"""The completion browser: what is read of a run, what of it a browser shows, and that nothing of it is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browse import __main__ as browse
from benchmarks.browse.recorded import read_recorded, spaced
from tests.chromium import PROGRAM, Browser, browser

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs a Chromium: apt-get install chromium")

# Two problems a step; the first is drawn again in step 3. Each group: its problem, then each row's text, reward,
# advantage, and tokens on which the advantage acted.
APPLES, PEARS, PLUMS = ("How many apples?", "7"), ("How many pears?", "5"), ("How many plums?", "9")
GROUPS: list[tuple[int, int, tuple[str, str], list[tuple[str, float, float, str]]]] = [
    (1, 0, APPLES, [("3+4=7\n#### 7", 1.0, 0.7, "1111111111"), ("#### 3", 0.0, -0.7, "0100")]),
    (1, 1, PEARS, [("#### 4", 0.1, 0.0, "1111"), ("#### 6", 0.1, 0.0, "1111"), ("#### 8", 0.1, 0.0, "1111")]),
    (2, 0, PLUMS, [("#### 9", 1.0, 0.0, "1111"), ("#### 9", 1.0, 0.0, "1111")]),
    (3, 0, APPLES, [("#### 7", 1.0, 1.4, "1101"), ("#### 8 and", 0.25, -1.4, "000000")]),
]
ANSWERS = {0: ("#### 3", "#### 5"), 2: ("#### 3", "5"), 3: ("#### 7", "5")}


def jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def number_after(text: str) -> str:
    return text.partition("#### ")[2]


def run_folder(folder: Path) -> Path:
    """A run as `grpo_core.train` leaves it, in miniature."""
    completions, tokens = [], []
    for step, group, (question, expected), rows in GROUPS:
        for i, (text, reward, advantage, kept) in enumerate(rows):
            pieces = [*re.findall(r"####| |\d|\n|\W|\w+", text), "<|im_end|>"]
            assert len(pieces) == len(kept) and "".join(pieces) == text + "<|im_end|>"
            about = {"step": step, "row": 2 * group + i}
            parts = {"numeric_reward_func": float(reward == 1), "bonus": reward if reward < 1 else None}
            answer = {"question": question, "expected": expected, "response": text, "extracted": number_after(text)}
            earned = {"reward": reward, "rewards": parts, "advantage": advantage}
            size = {"tokens": len(pieces), "truncated": text.endswith("and")}
            completions.append({**about, "group": group, **answer, **earned, **size})
            ids = [len(piece) for piece in pieces]
            logps = [-0.5 * k for k in range(len(pieces))]
            tokens.append({**about, "ids": ids, "pieces": pieces, "logps": logps, "kept": kept})
    jsonl(folder / "completions.jsonl", completions)
    jsonl(folder / "tokens.jsonl", tokens)
    for step, texts in ANSWERS.items():
        problems = zip((APPLES, PEARS), texts, strict=True)
        jsonl(
            folder / "heldout" / f"step-{step:06d}.jsonl",
            [
                {"question": q, "expected": e, "response": text, "extracted": number_after(text), "strict": True}
                | {"lenient": True, "tokens": 4, "truncated": False}
                for (q, e), text in problems
            ],
        )
    (folder / "config.yaml").write_text("group_size: 2\nlr: 1.0e-6\nmodel: tiny\nrewards: [numeric_reward_func]\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "my-run")


def changed(run: Path, name: str, line: int, **fields: Any) -> None:
    """The same file with other fields in one line."""
    records = [json.loads(text) for text in (run / name).read_text().splitlines()]
    records[line] |= fields
    jsonl(run / name, records)


def refused(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        browse.main([str(run), *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# --- what is read


def test_a_problem_that_is_drawn_again_is_one_problem(run: Path) -> None:
    recorded = read_recorded(run)
    assert [(problem["question"], problem["expected"]) for problem in recorded["problems"]] == [APPLES, PEARS, PLUMS]
    assert [(group["step"], group["problem"]) for group in recorded["groups"]] == [(1, 0), (1, 1), (2, 2), (3, 0)]
    first = recorded["groups"][0]["rows"][0]
    assert (first["reward"], first["rewards"], first["advantage"], first["right"]) == (1.0, [1.0, None], 0.7, True)
    assert [recorded["pieces"][piece][1] for piece, _, _ in first["tokens"]] == [
        *("3", "+", "4", "=", "7", "\n", "####", " ", "7", "<|im_end|>")
    ]
    assert [logp for _, logp, _ in first["tokens"]][:3] == [0, -50, -100]


def test_a_held_out_problem_has_an_answer_of_each_evaluation(run: Path) -> None:
    apples, pears = read_recorded(run)["heldout"]
    assert [(answer["step"], answer["text"], answer["right"]) for answer in apples["answers"]] == [
        (0, "#### 3", False),
        (2, "#### 3", False),
        (3, "#### 7", True),
    ]
    assert [answer["right"] for answer in pears["answers"]] == [True, False, False]


def test_a_run_that_is_too_large_is_cut_to_every_kth_step_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spaced({step: 10 for step in range(1, 12)}, most=50) == (3, [1, 4, 7, 10, 11])
    assert spaced({1: 10, 2: 10, 3: 10}, most=5) == (2, [1, 3])
    assert spaced({1: 10, 2: 10}, most=0) == (1, [1, 2])
    assert spaced({}, most=5)[1] == []
    recorded = read_recorded(run, most_tokens=34)
    assert [group["step"] for group in recorded["groups"]] == [1, 1, 3]
    said = "Shown: one step in 2, and the last, 2 of 3, so that the page has at most 34 tokens (--max_tokens)."
    assert said in recorded["about"]
    browse.main([str(run), "--max_tokens", "34"])
    out = capsys.readouterr().out
    assert said in out and str(run / "completions.html") in out


def test_a_run_without_tokens_is_shown_as_text(run: Path) -> None:
    (run / "tokens.jsonl").unlink()
    recorded = read_recorded(run)
    assert recorded["pieces"] == [] and recorded["groups"][0]["rows"][0]["text"] == "3+4=7\n#### 7"
    assert any("no tokens.jsonl" in line for line in recorded["about"])


def test_a_run_that_is_killed_in_the_middle_of_a_line_can_be_looked_at(run: Path) -> None:
    for name in ("completions.jsonl", "tokens.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "ro')
    assert len(read_recorded(run)["groups"]) == 4


def test_tokens_that_are_on_file_twice_are_no_obstacle(run: Path) -> None:
    """After --resume of a checkpoint from before there was a tokens.jsonl."""
    tokens = (run / "tokens.jsonl").read_text()
    once = read_recorded(run)
    (run / "tokens.jsonl").write_text(2 * tokens)
    assert read_recorded(run) == once


@pytest.mark.parametrize(
    ("name", "line", "fields", "message"),
    [
        ("completions.jsonl", 2, {"step": "one"}, "line 3: expected step to be of type int; it is 'one'"),
        ("completions.jsonl", 0, {"response": None}, "line 1: expected response to be of type str; it is None"),
        ("completions.jsonl", 0, {"row": True}, "line 1: expected row to be of type int; it is True"),
        ("tokens.jsonl", 1, {"ids": [1]}, "line 2: expected ids, pieces, logps and kept of 4 tokens; there are 1, 4"),
        ("heldout/step-000002.jsonl", 1, {"tokens": {}}, "line 2: expected tokens to be of type int; it is {}"),
    ],
)
def test_a_malformed_record_is_one_line_with_its_file_and_line_number(
    run: Path, name: str, line: int, fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, name, line, **fields)
    assert f"{run / name}, {message}" in refused(run, capsys)


def test_what_holds_no_run_of_grpo_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}: expected a run folder" in refused(tmp_path, capsys)
    assert "--max_tokens -1: expected 0 or more" in refused(run, capsys, "--max_tokens", "-1")
    assert "expected a file in an existing folder" in refused(run, capsys, "--output", str(tmp_path / "no" / "a.html"))
    assert f"--output {run}: expected a file" in refused(run, capsys, "--output", str(run))
    assert "nowhere: expected a run folder" in refused(tmp_path / "nowhere", capsys)
    assert "--outptu: no such flag; did you mean --output?" in refused(run, capsys, "--outptu", "a.html")
    (run / "config.yaml").write_text("batch_size: 2\nlr: 1.0e-6\n")
    assert "expected a run of grpo_core.train" in refused(run, capsys)


# --- what is shown


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as driven:
        driven.screen(1280, 900)
        yield driven


def question(chromium: Browser) -> str:
    return chromium.text("main h2")
