"""One problem, and how a row of data becomes one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewards import choice_letter, extract_hash_answer, parse_number
from sft_core.text.config import TaskConfig

Message = dict[str, str]

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
QUESTIONS, ANSWERS = ("question", "prompt", "messages"), ("answer", "solution", "answerKey")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    """A problem. `solution` is the answer as the data has it, often worked; `answer` the final one in it: a number,
    words or a letter, '' where only rewards judge."""

    question: str  # with a conversation, its last message
    solution: str
    answer: str
    earlier: tuple[Message, ...] = ()  # the conversation before the question
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # for reward functions, by their names

    @property
    def working(self) -> str:
        """The solution without its final answer; '' where it only states that."""
        before, mark, _ = self.solution.partition("####")
        return before.strip() if mark or self.solution.strip() != self.answer else ""


def as_example(row: Any, where: str, config: TaskConfig | None = None) -> Example:
    """Check one row of a task; `where` names it in the error.

    >>> as_example({"prompt": "6 x 7?", "answer": 42, "level": 1}, "row 0")
    Example(question='6 x 7?', solution='42', answer='42', earlier=(), columns={'prompt': '6 x 7?', 'level': 1})
    """
    config = config or TaskConfig()
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected an object with the columns question and answer, found {type(row).__name__}"
        )
    asked = config.question_column or next((name for name in QUESTIONS if row.get(name)), QUESTIONS[0])
    told = config.answer_column or next((n for n in ANSWERS if n != asked and row.get(n) is not None), ANSWERS[0])
    if isinstance(row.get(asked), list):
        question, earlier, reply = _conversation(row[asked], f"{where}: column {asked}")
    else:
        question, earlier, reply = _text(row, asked, "--question_column", where), (), None
    if config.answers == "multiple_choice" and "choices" in row:
        question, row = _with_choices(question, row, told, where)
    others = {name: value for name, value in row.items() if name not in ("question", "answer", "solution")}
    if config.answers == "none":
        known = {told: row[told]} if told in row else {}
        return Example(question, str(row.get(told, reply) or ""), "", earlier, {**others, **known})
    solution = reply if reply is not None and told not in row else _text(row, told, "--answer_column", where)
    answer = _final(solution, config, where)
    if told != "solution" and isinstance(row.get("solution"), str) and "####" not in solution:
        solution = f"{row['solution']}\n#### {answer}"  # the worked answer has a column of its own
    return Example(question, solution, answer, earlier, others)


def _text(row: dict[str, Any], name: str, flag: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(repr(str(other)) for other in row) or "none"
        raise ValueError(
            f"{where}: column {name} is missing, empty or not a string; {flag} names another one, of {there[:100]}"
        )
    return _of_characters(value, f"{where}: column {name}")


def _of_characters(text: str, where: str) -> str:
    if LONE_SURROGATE.search(text):  # tokenizers and logs would fail on it
        raise ValueError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), no character")
    return text


def _conversation(messages: list[Any], where: str) -> tuple[str, tuple[Message, ...], str | None]:
    """The last message before the assistant's turn, those before it, and the assistant's reply where there is one."""
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(value, str) and value for value in fields):
            raise ValueError(f"{where}: a message is an object with a role and a content, both texts")
        _of_characters(message["content"], where)
    turns: list[Message] = [{"role": m["role"], "content": m["content"]} for m in messages]
    reply = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"{where}: the message before the answer must be the user's")
    return turns[-1]["content"], tuple(turns[:-1]), reply


def _with_choices(question: str, row: dict[str, Any], told: str, where: str) -> tuple[str, dict[str, Any]]:
    """The question with its choices below it, and the row with the right one's letter. Choices are a list of texts, or
    ARC's two lists `text` and `label`; the answer is a letter or label, a text, or a place counted from 0 (MMLU)."""
    choices = row["choices"]
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (choices, None)
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{where}: column choices must be a list of 2 to {len(LETTERS)} texts")
    answer = row.get(told)
    for known in ([str(label) for label in labels or ()], [str(text) for text in texts], [*LETTERS[: len(texts)]]):
        if str(answer) in known:
            answer = known.index(str(answer))
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise ValueError(f"{where}: the answer {str(answer)[:40]!r} is none of the {len(texts)} choices")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return f"{question}\n{listed}", {**row, told: LETTERS[answer]}


def _final(solution: str, config: TaskConfig, where: str) -> str:
    """The final answer of a solution, worked or bare."""
    marked = extract_hash_answer(solution)
    final = solution.strip() if marked is None else marked
    if config.answers == "multiple_choice":
        final = choice_letter(final)
        if not final:
            raise ValueError(f"{where}: the answer is not the letter of a choice, like B or (B)")
    elif not final:
        raise ValueError(f"{where}: the answer ends in `####` and nothing after it")
    elif config.answers == "number" and parse_number(final) is None:
        said = f"ends in `#### {final[:40]!r}`, which" if marked is not None else f"{final[:40]!r} has no `#### N`, and"
        raise ValueError(f"{where}: the answer {said} is not a number; --answer_type text compares words")
    return final
