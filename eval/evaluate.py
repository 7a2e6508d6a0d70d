"""Accuracy on held-out problems: strict and lenient, of greedy answers and of samples, with every answer kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.samples import Completion, Sampling
from eval.sampling import sample
from eval.statistics import agreeing, maj_at_k, mean_interval, pass_at_k, sizes, wilson_interval
from rewards import last_number, parse_number, same_answer, same_number, words
from rewards.jsonl import read_jsonl
from sft_core.learn import ranks
from sft_core.learn.clock import bar_seconds
from sft_core.model.policy import Policy
from sft_core.run.randomness import random_state, set_random_state
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.prompts import FORMATS, prompt_ids

PORTION = 2**12  # answers whose tokens are in memory at a time


@dataclass(frozen=True)
class Reply:
    """A response to a problem, and its score."""

    response: str
    extracted: str | None  # by the prompt format's own rule; None or '' where the format was not kept
    strict: bool  # the extracted answer equals the expected one
    lenient: bool  # the last number anywhere in the response does
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Answered:
    """One problem and the policy's answers: the greedy response, and the samples if any were drawn."""

    question: str
    expected: str
    response: str
    extracted: str | None
    strict: bool
    lenient: bool
    tokens: int
    truncated: bool
    steps: int | None = None  # of the gold's worked solution; None: a record from before they were counted
    samples: list[Reply] = field(default_factory=list)

    @staticmethod
    def of(row: dict[str, Any]) -> Answered:
        """A record, read back.

        Raises:
            ValueError: a field is missing.
        """
        answer: Answered = _read(Answered, row)
        return replace(answer, samples=[_read(Reply, reply) for reply in answer.samples])


def _read(kind: Any, row: Any) -> Any:
    """The fields that this version knows; those without a default must be present."""
    for f in fields(kind):
        needed = f.default is MISSING and f.default_factory is MISSING
        if needed and f.name not in row:
            raise ValueError(f"expected an answer of an evaluation; there is no {f.name!r} in it")
    return kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row})


def read_answers(path: Path) -> list[Answered]:
    """The records of an evaluation.

    Raises:
        ValueError: there is none, or a line is not such a record, with its number.
    """
    answers = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            answers.append(Answered.of(row))
        except (ValueError, TypeError) as error:  # the latter: of samples that are none
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not answers:
        raise ValueError(f"{path}: holds no answers")
    return answers


@dataclass(frozen=True)
class Evaluation:
    """The answers to a set of problems and their summary. Shares are in 0..1, lengths in tokens, times in seconds."""

    answers: list[Answered]
    seconds: float

    def summary(self) -> dict[str, float]:
        """Shares are of the greedy answers. `..._low` and `..._high` are 95% intervals: Wilson's for shares of
        problems, `mean_interval` for pass@k and maj@k."""
        answers, n = self.answers, len(self.answers)
        return {
            "problems": n,
            **_share("accuracy", [a.strict for a in answers]),
            **_share("lenient_accuracy", [a.lenient for a in answers]),
            "format_rate": sum(bool(a.extracted) for a in answers) / n,
            "mean_length": sum(a.tokens for a in answers) / n,
            "max_length": max(a.tokens for a in answers),
            "truncated_share": sum(a.truncated for a in answers) / n,
            "worked_share": sum(is_worked(a.response) for a in answers) / n,
            "seconds": self.seconds,
            **_of_samples(answers),
            **_by_steps(answers),
        }


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(right), len(right))
    return {name: sum(right) / len(right), f"{name}_low": low, f"{name}_high": high}


def _of_samples(answers: Sequence[Answered]) -> dict[str, float]:
    """pass@k and maj@k by the strict rule, for the k of `sizes`; nothing where no samples were drawn."""
    n = min(len(answer.samples) for answer in answers)
    figures: dict[str, float] = {"samples": n} if n else {}
    counts = []
    for answer in answers:
        wrong = agreeing([s.extracted for s in answer.samples if not s.strict])
        counts.append((len(answer.samples), sum(s.strict for s in answer.samples), [len(group) for group in wrong]))
    for k in sizes(n):
        passed = [pass_at_k(drawn, right, k) for drawn, right, _ in counts]
        won = [maj_at_k(drawn, right, wrong, k) for drawn, right, wrong in counts]
        for name, values in ((f"pass_at_{k}", passed), (f"maj_at_{k}", won)):
            low, high = mean_interval(values)
            figures |= {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}
    return figures


def _by_steps(answers: Sequence[Answered]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for steps in sorted({a.steps for a in answers if a.steps}):
        right = [a.strict for a in answers if a.steps == steps]
        figures |= {f"steps/{steps}/problems": len(right), **_share(f"steps/{steps}/accuracy", right)}
    return figures


def is_worked(response: str) -> bool:
    """Whether a response calculates anything before its answer: it holds an equals sign.

    >>> is_worked("3+4=7\\n#### 7"), is_worked("#### 7")
    (True, False)
    """
    return "=" in response


def solution_steps(solution: str) -> int:
    """The steps of a worked solution: its calculations, which GSM8K marks with `<<...>>`, or where nothing is marked
    its lines before the final answer. 0: it only states the answer.

    >>> solution_steps("3+5=<<3+5=8>>8, and 8-1=<<8-1=7>>7\\n#### 7"), solution_steps("Add.\\nTake one.\\n#### 7")
    (2, 2)
    >>> solution_steps("#### 7")
    0
    """
    working = solution.partition("####")[0]
    return working.count("<<") or sum(bool(line.strip()) for line in working.splitlines())


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    task: TaskConfig,
    max_completion_tokens: int,
    batch_size: int,
    progress: bool = False,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Answer every problem greedily, and draw so many samples for each. Answers are in the order of the problems.

    `batch_size` rows are drawn at a time, the next problem taking the place of one that is answered; problems of
    similar length stand one behind the other, and so do the samples of a problem. The samples depend on `seed` alone,
    and the caller's random state (that of training) is restored afterwards.
    """
    prompts = [prompt_ids(policy.tokenizer, example, task) for example in examples]
    # Longest first: memory runs out in the first batch or never.
    by_length = sorted(range(len(examples)), key=lambda i: len(prompts[i]), reverse=True)
    replies: dict[int, list[Reply]] = {i: [] for i in by_length}
    start = time.perf_counter()
    with tqdm(
        total=len(examples) * (1 + samples),
        desc="evaluate",
        unit="answer",
        disable=not (progress and ranks.first()),
        leave=not sys.stderr.isatty(),  # in a file nothing can be taken back
        mininterval=bar_seconds(),
    ) as bar:

        def ask(rows: list[int], sampling: Sampling) -> None:
            for first in range(0, len(rows), PORTION):
                ask_portion(rows[first : first + PORTION], sampling)

        def ask_portion(rows: list[int], sampling: Sampling) -> None:
            marked: dict[int, Reply] = {}  # by its place among the rows

            def ended(places: list[int], completions: list[Completion]) -> None:
                for place, completion in zip(places, completions, strict=True):
                    marked[place] = _mark(completion, examples[rows[place]].answer, task)
                right = [reply.strict for reply in marked.values()]
                bar.set_postfix(accuracy=f"{sum(right) / len(right):.1%}", refresh=False)
                bar.update(len(places))

            sample(policy, [prompts[i] for i in rows], sampling, batch_size, ended=ended)
            for place, i in enumerate(rows):
                replies[i].append(marked[place])

        ask(by_length, Sampling(max_completion_tokens, temperature=0))
        if samples:
            with _own_randomness(seed):
                ask([i for i in by_length for _ in range(samples)], Sampling(max_completion_tokens, temperature))
    answers = []
    for i, example in enumerate(examples):
        greedy, *drawn = replies[i]
        steps = solution_steps(example.solution)
        answers.append(Answered(example.question, example.answer, **vars(greedy), steps=steps, samples=drawn))
    return Evaluation(answers, time.perf_counter() - start)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """A block whose draws follow from the seed and leave all other random states as they were."""
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


def _ends_in(text: str, expected: str) -> bool:
    """Whether a text's last words are an expected answer of words."""
    gold = [] if parse_number(expected) is not None else words(expected)
    return bool(gold) and words(text)[-len(gold) :] == gold


def _mark(completion: Completion, expected: str, task: TaskConfig) -> Reply:
    text, tokens, truncated = completion
    extracted, number = FORMATS[task.prompt_format].extract(text), last_number(text)
    return Reply(
        response=text,
        extracted=extracted,
        strict=bool(extracted) and same_answer(extracted or "", expected),
        lenient=number is not None and same_number(number, expected) or _ends_in(text, expected),
        tokens=tokens,
        truncated=truncated,
    )
