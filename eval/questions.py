"""Where the questions that a model is asked come from: a terminal, a pipe, a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rewards import extract_hash_answer
from rewards.jsonl import read_jsonl
from sft_core.text.example import LONE_SURROGATE


@dataclass(frozen=True)
class Question:
    """What is asked, and the final answer where it is known."""

    text: str
    expected: str | None = None


def typed() -> Iterator[Question]:
    """Lines from a terminal until Ctrl-D, or Ctrl-C, at the prompt."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and the lines before)
    while True:
        try:
            line = input("question> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"not asked: {error}")
            continue
        yield Question(whole(line))


def piped() -> Iterator[Question]:
    """Lines from standard input until its end."""
    for line in sys.stdin.buffer:
        yield Question(line.decode(errors="replace").rstrip("\r\n"))


def whole(text: str) -> str:
    """With a replacement character for each half of a surrogate pair, as bytes that are no UTF-8 leave them behind:
    tokenizers and files take none."""
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def read_questions(path: Path) -> list[Question]:
    """
    Raises:
        ValueError: no file of JSON objects; a line without a question, with its number; no questions.
    """
    rows, questions = read_jsonl(path), []
    for number, row in enumerate(rows, 1):
        text, answer = row.get("question"), str(row.get("answer"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, line {number}: column question is missing, empty or not a string")
        questions.append(Question(whole(text), extract_hash_answer(answer)))
    if not questions:
        raise ValueError(f"--questions {path}: holds no questions")
    return questions
