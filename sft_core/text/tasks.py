"""Tasks: where problems come from. Each has a training side, finite or endless, and held-out problems."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from sft_core.text.arithmetic import ArithmeticStream
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example, as_example
from sft_core.text.ordering import OrderingStream
from sft_core.text.read import data_set_rows, file_rows


class Endless:
    """A training side without an end: problem i of a built-in stream."""

    def __init__(self, stream: ArithmeticStream | OrderingStream, config: TaskConfig | None = None) -> None:
        self.stream, self.config = stream, config

    def __getitem__(self, index: int) -> Example:
        return as_example(self.stream[index], f"built-in problem {index}", self.config)


def endless(config: TaskConfig, split: Literal["train", "heldout"], seed: int) -> Endless:
    """The problems of a task that is made by code."""
    stream = OrderingStream if config.task == "ordering" else ArithmeticStream
    return Endless(stream(split, seed, config.difficulty), config)


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
            more = [example.earlier, example.columns] if example.earlier or example.columns else []
            text = f"{example.question}\0{example.solution}\0" + (json.dumps(more, default=str) if more else "")
            crc = zlib.crc32(text.encode("utf-8", "surrogatepass"), crc)
        return f"{crc:08x}"

    @property
    def columns(self) -> list[str]:
        """What the data has for reward functions besides questions and answers."""
        known = [] if isinstance(self.train, Endless) else self.train
        return sorted({name for example in (*known, *self.heldout) for name in example.columns})

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
        ValueError: an unreachable hub, a malformed row (with its place), an empty file.
    """
    if config.endless:
        return Task(config.task, endless(config, "train", seed), load_heldout(config))
    path = Path(config.task)
    if not path.is_file() and config.eval_split:
        train = _read(config, config.train_split)
        return Task(config.task, _limited(train, config.max_samples), load_heldout(config))
    examples = read_problems(path, config) if path.is_file() else _read(config, config.train_split)
    name = path.stem if path.is_file() else config.task
    if config.eval_file:
        heldout = load_heldout(config)
    else:
        count = min(config.eval_problems, len(examples) // 2)  # never more than half: a small file must still train
        examples, heldout = examples[: len(examples) - count], examples[len(examples) - count :]
    heldout = [] if config.answers == "none" else heldout
    return Task(name, _limited(examples, config.max_samples), heldout)


def load_heldout(config: TaskConfig) -> list[Example]:
    """The first --eval_problems (0: all) problems to evaluate on: a data set's --eval_split, --eval_file, or the --task
    file. None where the answers are of type none: there is nothing to compare with."""
    if config.answers == "none":
        return []
    if config.endless:
        # Independent of the run's seed: all runs of a difficulty are evaluated on the same problems.
        stream = endless(config, "heldout", seed=0)
        return [stream[i] for i in range(config.eval_problems)]
    if config.eval_file or Path(config.task).is_file():
        return _limited(read_problems(Path(config.eval_file or config.task), config), config.eval_problems)
    return _limited(_read(config, config.eval_split or config.train_split), config.eval_problems)


def _limited(examples: list[Example], limit: int) -> list[Example]:
    return examples[:limit] if limit else examples


def _read(config: TaskConfig, split: str) -> list[Example]:
    return [as_example(row, where, config) for where, row in data_set_rows(config, split)]


def read_problems(path: Path, config: TaskConfig | None = None) -> list[Example]:
    """The problems of a file.

    Raises:
        ValueError: no file that can be read, no problem in it, or a malformed row, with its number.
    """
    examples = [as_example(row, where, config) for where, row in file_rows(path)]
    if not examples:
        raise ValueError(f"{path}: holds no problems")
    return examples
