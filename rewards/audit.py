"""Reward functions on recorded completions: which ones fire, which never do, which agree, and where two ways to extract
the answer from a text differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, pstdev
from typing import Any

from rewards.combine import Reward, Scores, score
from rewards.customary import customary_xml_answer
from rewards.extract import extract_hash_answer, extract_xml_answer, gold_answer, last_number, same_number
from rewards.functions import Completion, completion_text
from rewards.jsonl import each_jsonl

# The names that a field goes by: in a run's completions.jsonl, in an evaluation's answers, in other people's files.
QUESTIONS, RESPONSES, GOLDS = ("question", "prompt", "prompts"), ("response", "completion"), ("expected", "answer")
# Fields that a run or an evaluation adds to its records; all others are columns for the reward functions.
OWN = {
    "step",
    "row",
    "group",
    "extracted",
    "reward",
    "rewards",
    "advantage",
    "tokens",
    "truncated",
    "strict",
    "lenient",
    "steps",
    "samples",
}

Extractor = Callable[[str], str | None]
EXTRACTORS: dict[str, Extractor] = {
    "xml": extract_xml_answer,
    "hash": extract_hash_answer,
    "last_number": last_number,
    "customary_xml": customary_xml_answer,
}


@dataclass(frozen=True)
class Recorded:
    """One recorded completion, with its question and gold answer."""

    question: Completion
    response: Completion
    gold: str
    fields: dict[str, Any] = field(default_factory=dict)  # the whole record

    @property
    def text(self) -> str:
        return completion_text(self.response)

    def right(self, found: str | None) -> bool:
        """Whether this is the gold answer, as a number or to the letter."""
        gold = gold_answer(self.gold)
        return bool(found) and (found == gold or same_number(found or "", gold))


def read_recorded(path: Path) -> list[Recorded]:
    """The completions of a file; row i is line i + 1.

    Raises:
        ValueError: a line is no JSON object, or has no response or no gold answer; or there is no line.
    """
    rows = []
    for number, record in enumerate(each_jsonl(path, torn_end=True), 1):
        try:
            question = _completion(record, QUESTIONS) if set(QUESTIONS) & record.keys() else ""
            rows.append(Recorded(question, _completion(record, RESPONSES), _gold(record), record))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no completion")
    return rows


def _named(record: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"expected one of the fields {', '.join(names)}")


def _completion(record: dict[str, Any], names: Sequence[str]) -> Completion:
    value: Any = _named(record, names)
    chat = isinstance(value, list) and value and isinstance(value[-1], dict)
    if isinstance(value, str) or (chat and isinstance(value[-1].get("content"), str)):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"expected {' or '.join(names)} to be a text or a chat; it is {value!r:.40}")


def _gold(record: dict[str, Any]) -> str:
    value = _named(record, GOLDS)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected {' or '.join(GOLDS)} to be a text or a number; it is {value!r:.40}")
    return str(value)


@dataclass(frozen=True)
class Column:
    """Statistics of one reward function, or of the weighted sum, over all rows. Shares are of rows with an opinion."""

    name: str
    weight: float | None  # None: the sum
    given: int  # rows that it has an opinion on
    fires: float | None  # share of values other than 0
    full: float | None  # share of values that are its highest here; None where it never fires
    mean: float | None
    std: float | None  # standard deviation
    low: float | None
    high: float | None
    with_correct: float | None  # correlation with being right; None where one of them never varies
    equal_groups: float | None  # share of groups in which all rows get the same; None: no groups are known
    verdict: str  # silent, dead, saturated, or nothing

    @staticmethod
    def of(
        name: str,
        weight: float | None,
        values: Sequence[float | None],
        correct: Sequence[bool],
        groups: list[list[int]],
    ) -> Column:
        given = [value for value in values if value is not None]
        low, high = (min(given), max(given)) if given else (None, None)
        verdict = "silent" if not given else "" if low != high else "saturated" if high else "dead"
        equal = [len({values[row] for row in group}) == 1 for group in groups]
        return Column(
            name=name,
            weight=weight,
            given=len(given),
            fires=_share([value != 0 for value in given]),
            full=None if verdict == "dead" else _share([value == high for value in given]),
            mean=fmean(given) if given else None,
            std=pstdev(given) if given else None,
            low=low,
            high=high,
            with_correct=correlated(values, [float(right) for right in correct]),
            equal_groups=_share(equal),
            verdict=verdict,
        )


@dataclass(frozen=True)
class Disagreement:
    """A row on which two extractors find different answers."""

    line: int
    gold: str
    found: tuple[str | None, str | None]
    right: tuple[bool, bool]
    end: str  # of the response


@dataclass(frozen=True)
class Audit:
    """The whole report; `as_dict` in `rewards.__main__` makes it JSON."""

    rows: int
    groups: int
    accuracy: float  # share of the rows whose answer is right
    judged_by: str  # what found the answer
    columns: list[Column]  # one for each function, then the total
    correlations: dict[str, dict[str, float | None]]
    extractors: tuple[str, str]
    disagreements: list[Disagreement]  # those in which one of both is right come first
    changed: dict[str, list[int]]  # function -> lines whose recorded value is another than the one it gives now


def audit(rows: list[Recorded], rewards: list[Reward], extractors: Sequence[str] = (), timeout: float = 0.0) -> Audit:
    """Score the rows with the rewards and compare the values.

    Args:
        extractors: two names of `EXTRACTORS`; none: the strict one that finds more answers, and `last_number`.

    Raises:
        ValueError: a reward function wants a column that the records do not have.
        RewardError: as `score`.
    """
    first, second = extractors or (strict_extractor(rows), "last_number")
    recorded = all("extracted" in row.fields for row in rows)
    answers = [row.fields["extracted"] if recorded else EXTRACTORS[first](row.text) for row in rows]
    correct = [row.right(found if isinstance(found, str) else None) for row, found in zip(rows, answers, strict=True)]
    scores, groups = scored(rows, rewards, timeout), grouped(rows)
    total = [None if math.isnan(value) else value for value in scores.total]
    columns = [
        Column.of(reward.name, reward.weight, scores.by_function[reward.name], correct, groups) for reward in rewards
    ]
    columns.append(Column.of("total", None, total, correct, groups))
    values = {**scores.by_function, "total": total}
    return Audit(
        rows=len(rows),
        groups=len(groups),
        accuracy=fmean(correct),
        judged_by="the recorded `extracted`" if recorded else f"the extractor {first}",
        columns=columns,
        correlations={a: {b: correlated(values[a], values[b]) for b in values} for a in values},
        extractors=(first, second),
        disagreements=disagreements(rows, first, second),
        changed={reward.name: _changed(rows, reward.name, scores) for reward in rewards},
    )


def scored(rows: Sequence[Recorded], rewards: list[Reward], timeout: float = 0.0) -> Scores:
    """Call the rewards as a run does, with those of its columns that the records have."""
    known = set.intersection(*(set(row.fields) for row in rows)) - OWN - {*QUESTIONS, *RESPONSES, *GOLDS, "completions"}
    questions = [row.question for row in rows]
    columns = {name: [row.fields[name] for row in rows] for name in sorted(known)}
    columns |= {"question": questions, "answer": [row.gold for row in rows]}
    return score(rewards, questions, [row.response for row in rows], columns, timeout)


def strict_extractor(rows: Sequence[Recorded]) -> str:
    """xml or hash: the format in which more of the responses answer."""
    count = {name: sum(bool(EXTRACTORS[name](row.text)) for row in rows) for name in ("xml", "hash")}
    return "xml" if count["xml"] > count["hash"] else "hash"


def grouped(rows: Sequence[Recorded]) -> list[list[int]]:
    """The rows of each group of two or more: of one step and group of a run, else of one question."""
    of_run = all({"step", "group"} <= row.fields.keys() for row in rows)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        key = (row.fields["step"], row.fields["group"]) if of_run else row.question
        groups.setdefault(repr(key), []).append(i)
    return [group for group in groups.values() if len(group) > 1 and rows[group[0]].question != ""]


def correlated(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Pearson's correlation over the rows on which both have an opinion; None where one of them never varies.

    >>> correlated([0.0, 1.0, 2.0, None], [5.0, 4.0, 3.0, 9.0]), correlated([1.0, 1.0], [0.0, 1.0])
    (-1.0, None)
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    columns = [a for a, _ in pairs], [b for _, b in pairs]
    if any(len(set(column)) < 2 for column in columns):  # else a constant's rounding errors would be correlated
        return None
    try:
        return correlation(*columns)
    except StatisticsError:  # the squares of its differences are 0: they are below 1e-160
        return None


def disagreements(rows: Sequence[Recorded], first: str, second: str) -> list[Disagreement]:
    """The rows on which two extractors find different answers; equal numbers are no difference."""
    found = []
    for line, row in enumerate(rows, 1):
        pair = EXTRACTORS[first](row.text), EXTRACTORS[second](row.text)
        a, b = (answer or "" for answer in pair)
        if a != b and not same_number(a, b):
            end = row.text[-60:]
            found.append(Disagreement(line, gold_answer(row.gold), pair, (row.right(a), row.right(b)), end))
    return sorted(found, key=lambda each: each.right == (False, False))


def _share(flags: Sequence[bool]) -> float | None:
    return fmean(flags) if flags else None


def _changed(rows: Sequence[Recorded], name: str, scores: Scores) -> list[int]:
    lines = []
    for line, (row, now) in enumerate(zip(rows, scores.by_function[name], strict=True), 1):
        then = row.fields.get("rewards")
        if isinstance(then, dict) and name in then and then[name] != now:
            lines.append(line)
    return lines
