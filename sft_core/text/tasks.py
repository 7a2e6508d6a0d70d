"""Tasks: where problems come from. Each has a training side, finite or endless, and held-out problems."""

from __future__ import annotations

import json
import random
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards import extract_hash_answer, parse_number
from sft_core.config import TaskConfig
from sft_core.text.arithmetic import ArithmeticStream

GSM8K = (
    "openai/gsm8k"  # the hub's name for Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168
)

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A problem. `solution` is the worked answer, in GSM8K's form; `answer` the final number in it."""

    question: str
    solution: str
    answer: str


class Endless:
    """A training side without an end: problem i of the arithmetic stream."""

    def __init__(self, stream: ArithmeticStream) -> None:
        self.stream = stream

    def __getitem__(self, index: int) -> Example:
        return as_example(self.stream[index], f"arithmetic problem {index}")


@dataclass(frozen=True)
class Task:
    name: str
    train: Sequence[Example] | Endless
    heldout: Sequence[Example]

    @property
    def size(self) -> int | None:
        """Training problems; None: endless."""
        return None if isinstance(self.train, Endless) else len(self.train)

    @property
    def identity(self) -> str:
        """A CRC of all problems, which shows a changed file. An endless side follows from the seed and is left out."""
        known = [] if isinstance(self.train, Endless) else self.train
        crc = 0
        for example in (*known, *self.heldout):
            crc = zlib.crc32(f"{example.question}\0{example.solution}\0".encode("utf-8", "surrogatepass"), crc)
        return f"{crc:08x}"

    def filtered(self, keep: Callable[[list[Example]], list[Example]]) -> Task:
        """Both sides filtered by `keep`, but not an endless one: its problems are all of one kind and length."""
        train = self.train if isinstance(self.train, Endless) else keep(list(self.train))
        return replace(self, train=train, heldout=keep(list(self.heldout)))

    def draw(self, first: int, count: int, seed: int) -> list[Example]:
        """Training problems at positions first .. first + count of an endless walk: a fresh shuffle for each epoch.

        Depends on its arguments alone, so training can resume at any position.
        """
        return [self._at(position, seed) for position in range(first, first + count)]

    def _at(self, position: int, seed: int) -> Example:
        if isinstance(self.train, Endless):
            return self.train[position]
        epoch, place = divmod(position, len(self.train))
        return self.train[_shuffled(len(self.train), seed, epoch)[place]]


@lru_cache(maxsize=2)  # the same epoch's order is needed for each of its steps
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def load_task(config: TaskConfig, seed: int) -> Task:
    """The training and held-out problems that --task and --eval_file name.

    Raises:
        ValueError: an unreachable hub, a malformed line (with its number), an empty file.
    """
    if config.task == "arithmetic":
        train: Sequence[Example] | Endless = Endless(ArithmeticStream("train", seed, config.difficulty))
        return Task("arithmetic", train, _arithmetic_heldout(config))
    if config.task == "gsm8k":
        return Task("gsm8k", _limited(_from_hub("train"), config.max_samples), load_heldout(config))
    examples = read_problems(Path(config.task))
    if config.eval_file:
        heldout = load_heldout(config)
    else:
        count = min(config.eval_problems, len(examples) // 2)  # never more than half: a small file must still train
        examples, heldout = examples[: len(examples) - count], examples[len(examples) - count :]
    return Task(Path(config.task).stem, _limited(examples, config.max_samples), heldout)


def load_heldout(config: TaskConfig) -> list[Example]:
    """The first --eval_problems (0: all) problems to evaluate on: GSM8K's test split, --eval_file, or the --task
    file."""
    if config.task == "arithmetic":
        return _arithmetic_heldout(config)
    if config.task == "gsm8k" and not config.eval_file:
        return _limited(_from_hub("test"), config.eval_problems)
    return _limited(read_problems(Path(config.eval_file or config.task)), config.eval_problems)


def _arithmetic_heldout(config: TaskConfig) -> list[Example]:
    # Independent of the run's seed: all runs of a difficulty are evaluated on the same problems.
    stream = Endless(ArithmeticStream("heldout", seed=0, difficulty=config.difficulty))
    return [stream[i] for i in range(config.eval_problems)]


def _limited(examples: list[Example], limit: int) -> list[Example]:
    return examples[:limit] if limit else examples


def _from_hub(split: str) -> list[Example]:
    from datasets import load_dataset  # seconds to import, and a local task does not need it

    try:
        rows = load_dataset(GSM8K, "main", split=split)
    except (OSError, ValueError) as error:  # datasets raises either where the hub cannot be reached
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--task gsm8k: cannot load {GSM8K} ({reason}); --task also takes a local JSONL file"
        ) from error
    return [as_example(dict(row), f"{GSM8K} {split} row {i}") for i, row in enumerate(rows)]


def read_problems(path: Path) -> list[Example]:
    """A file of one JSON object per line with GSM8K's columns, `question` and `answer` (worked, ending in `#### N`).

    Further columns may hold whatever Python takes for JSON, NaN included.

    Raises:
        ValueError: no file that can be read, no problem in it, or a malformed line, with its number.
    """
    if not path.is_file():  # a pipe would be read once, and a task is read twice
        raise ValueError(f"{path}: is not a file")
    examples = []
    try:
        with path.open("rb") as lines:  # decoded line by line, so that the error can name the line
            for number, line in enumerate(lines, start=1):
                text, where = line.removeprefix(BOM_UTF8 if number == 1 else b""), f"{path}, line {number}"
                if text.strip():
                    examples.append(as_example(_row(text, where), where))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not examples:
        raise ValueError(f"{path}: holds no problems")
    return examples


def _row(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # of the decoding or of the JSON
        raise ValueError(f"{where}: not JSON ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which `json` itself would silently keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return row


def as_example(row: Any, where: str) -> Example:
    """Check one row of GSM8K's schema; `where` names it in the error."""
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected an object with the columns question and answer, found {type(row).__name__}"
        )
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(f"{where}: column {column} is missing, empty or not a string")
        if LONE_SURROGATE.search(row[column]):  # tokenizers and logs would fail on it
            raise ValueError(
                f"{where}: column {column} holds half of a surrogate pair (\\ud800 to \\udfff), no character"
            )
    gold = extract_hash_answer(row["answer"])
    if not gold:
        raise ValueError(f"{where}: the answer has no `#### N` with the final answer")
    if parse_number(gold) is None:
        raise ValueError(f"{where}: the answer ends in `#### {gold[:40]!r}`, which is not a number")
    return Example(row["question"], row["answer"], gold)
