"""Where the questions of `python -m eval.ask` come from: pipes, files, a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.ask
from tests.faulty import FORKS
from tests.test_ask import HERE, answering, pipe, rows

# --- where questions come from


def test_lines_that_are_piped_in_are_asked_and_empty_or_long_ones_are_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"a?\r\n\n   \n" + b"x " * 300 + b"\nno \xff utf-8?\nlast, without an end of line?")
    answering(monkeypatch, "#### 1", "#### 2", "#### 3")
    file = tmp_path / "kept.jsonl"
    eval.ask.main([str(whole), "--append_to", str(file), *HERE])
    out, err = capsys.readouterr()
    assert [row["question"] for row in rows(file)] == ["a?", "no \ufffd utf-8?", "last, without an end of line?"]
    assert "question>" not in out and out.count("Question: ") == 4
    [line] = [line for line in err.splitlines() if line.startswith("not asked")]
    assert "over --max_prompt_tokens 90: 'x x" in line


def test_a_file_of_questions_says_how_many_answers_are_right(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"question": "a?", "answer": "1+1=2\n#### 2"},
        {"question": "b?", "answer": "#### 1,000"},
        {"question": "c?"},
        {"question": "half of a pair: \ud800"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    answering(monkeypatch, "#### 2", "#### 7", "#### 3", "#### 4")
    file = tmp_path / "kept.jsonl"
    eval.ask.main([str(whole), "--questions", str(tmp_path / "q.jsonl"), "--append_to", str(file), *HERE])
    out = capsys.readouterr().out
    marks = [(row["expected"], row["correct"]) for row in rows(file)]
    assert marks == [("2", True), ("1,000", False), (None, None), (None, None)]
    assert rows(file)[3]["question"] == "half of a pair: \ufffd"
    assert "Answer: 7   (expected 1,000, 5 tokens" in out
    assert out.splitlines()[-1] == "1 of 2 answers are correct, of 4 in all"


def test_ctrl_c_ends_the_wait_for_a_question(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(eval.ask, "sample", interrupted)
    with pytest.raises(SystemExit) as end:
        eval.ask.main([str(whole), "--question", "a?", "b?", "--append_to", "", *HERE])
    assert end.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


class Terminal:
    """The program at a real pseudo-terminal, in a child; the first answer takes half a minute."""

    def __init__(self, argv: list[str]) -> None:
        self.text = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            code = 99
            torch.set_num_threads(1)  # as in tests/killing.py: a fork has none of its parent's other threads
            try:
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                real, slow = eval.ask.sample, [True]

                def first_slow(*args: Any, **given: Any) -> Any:
                    if slow and slow.pop():
                        print("thinking", flush=True)
                        time.sleep(30)
                    return real(*args, **given)

                eval.ask.sample = first_slow  # type: ignore[attr-defined]
                eval.ask.main(argv)
                code = 0
            except SystemExit as end:
                code = int(str(end.code))
            finally:
                os._exit(code)

    def until(self, text: bytes, seconds: float = 20) -> str:
        """What is printed from here on until this comes; the other side may also hang up, where `text` is empty."""
        begun, end = len(self.text), time.monotonic() + seconds
        while text == b"" or text not in self.text[begun:]:
            assert time.monotonic() < end, self.text
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    read = os.read(self.fd, 65536)
                except OSError:  # Linux's word for a terminal whose other side is closed
                    read = b""
                if not read:
                    break
                self.text += read
        return self.text[begun:].decode()

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def leave(self, key: bytes) -> int:
        """Press the key until the program ends (readline sees a Ctrl-C that came just before it waits at the next one);
        its exit code."""
        for _ in range(20):
            self.type(key)
            with suppress(AssertionError):
                self.until(b"", seconds=1)
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@FORKS
@pytest.mark.parametrize("leaving", [b"\x04", b"\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_at_a_terminal_ctrl_c_stops_an_answer_and_at_the_prompt_it_leaves(
    leaving: bytes, whole: Path, tmp_path: Path
) -> None:
    file = tmp_path / "kept.jsonl"
    terminal = Terminal([str(whole), "--append_to", str(file), *HERE])
    assert f"answers are appended to {file}" in terminal.until(b"question> ")
    terminal.type(b"\n")
    terminal.until(b"question> ")
    terminal.type(b"What is stopped?\n")
    terminal.until(b"thinking")
    terminal.type(b"\x03")
    assert "(stopped, and not kept)" in terminal.until(b"question> ")
    terminal.type(b"What is answered?\n")
    assert "Answer: " in terminal.until(b"question> ")
    assert terminal.leave(leaving) == 0
    kept = [row for path in tmp_path.glob("*.jsonl") for row in rows(path)]
    assert [row["question"] for row in kept] == ["What is answered?"]
    assert "Traceback" not in terminal.text.decode()
