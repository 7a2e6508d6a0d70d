"""What `python -m rewards` prints, of runs, evaluations and single texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pytest

from eval.evaluate import Answered
from rewards import __main__ as program
from rewards.audit import audit, read_recorded
from rewards.combine import Reward
from tests.faulty import FORKS
from tests.helpers import length_reward
from tests.test_audit import XML, file, said

# --- what is printed


def test_an_evaluations_own_folder_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file(tmp_path, [{"response": "#### 7", "expected": "7"}]).rename(tmp_path / "answers.jsonl")
    program.main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("1 completions; 100.0% are right")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`python -m rewards FILE | true`; the pipe's other end is closed before anything is written to it."""
    reading, writing = os.pipe()
    os.close(reading)
    path = file(tmp_path, [{"response": "7", "expected": "7"}])
    done = subprocess.run([sys.executable, "-m", "rewards", path], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_one_text_is_scored_on_the_command_line() -> None:
    """As people type it, in a process that never loads torch."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "rewards",
        "--response",
        "6*7 #### 42.0000001",
        "--expected",
        "42",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["numeric_reward_func", "1"] in lines and ["correctness_reward_func", "0"] in lines
    assert ["answer", "found", "by", "hash", "'42.0000001'", "right"] in lines
    assert "torch" not in done.stderr and "numpy" not in done.stderr


def test_one_text_is_scored_as_json_and_from_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(XML.format("3+4", "$7")))
    found = json.loads(said(capsys, "--response", "-", "--expected", "7", "--json"))
    assert found["extracted"] == {"xml": "$7", "hash": None, "last_number": "$7", "customary_xml": "$7"}
    assert found["rewards"]["correctness_reward_func"] == 2 and found["total"] == 2 + 0.5 + 0.5 + 0.5
    assert found["right"]["xml"] and not found["right"]["hash"]


@FORKS
def test_a_runs_own_folder_is_audited(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "tests.helpers:length_reward"
    out = said(capsys, str(whole), "--rewards", "numeric_reward_func", own)
    assert out.startswith("12 completions in 6 groups; 0.0% are right, judged by the recorded `extracted`\n")
    assert "numeric_reward_func is dead: it never fires, so it teaches nothing" in out
    assert "is not what the run recorded" not in out
    assert "hash and last_number find different answers in " in out
    found = json.loads(said(capsys, str(whole), "--rewards", own, "--json"))
    texts = [json.loads(line)["response"] for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert found["columns"][0]["mean"] == pytest.approx(numpy.mean(length_reward([], texts)))
    for path in sorted((whole / "heldout").iterdir()):
        assert said(capsys, str(path)).startswith("2 completions; ")


def test_values_that_are_not_what_was_recorded_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = {"response": "#### 7", "expected": "7", "rewards": {"numeric_reward_func": 1.0, "mine": 3.0}}
    path = file(tmp_path, [record, record | {"rewards": {"numeric_reward_func": 0.0}}])
    out = said(capsys, str(path))
    assert "numeric_reward_func is not what the run recorded on 1 lines, the first 2" in out
    assert "int_reward_func" not in out  # the run was not paid by it


def test_hostile_texts_stay_on_their_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    texts = ["#### \x1b[31m7\r\n\u202e 8", "\ud83d #### half", "#### " + "9" * 2**20, "9" * 2**20]
    path = file(tmp_path, [{"response": text, "expected": "7"} for text in texts])
    out = said(capsys, str(path), "--rows", "9")
    assert out.isprintable() or set(out) - {"\n"} == {sign for sign in out if sign.isprintable()}
    assert len(out) < 10_000 and "line 1: expected '7'" in out


def test_what_an_evaluation_records_is_no_column_of_a_reward(tmp_path: Path) -> None:
    record = asdict(Answered("How many?", "7", "#### 7", "7", True, True, tokens=3, truncated=False, steps=2))
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({**record, "difficulty": 1}) + "\n")
    seen: list[set[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.append(set(columns) - {"prompts"})
        return [0.0]

    audit(read_recorded(path), [Reward("its", reward, 1.0)])
    assert seen == [{"question", "answer", "difficulty"}]
