"""Greedy accuracy on held-out problems, strict and lenient, with the figures needed to understand it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from eval.sampling import Sampling, sample
from rewards import last_number, same_number
from sft_core.config import TaskConfig
from sft_core.policy import Policy
from sft_core.prompts import FORMATS, encode_prompt, prompt_messages
from sft_core.tasks import Example


@dataclass(frozen=True)
class Answered:
    """One problem and what the policy made of it."""

    question: str
    expected: str
    response: str
    extracted: str | None  # by the prompt format's own rule; None or '' where the format was not kept
    strict: bool  # the extracted answer equals the expected one
    lenient: bool  # the last number anywhere in the response does
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Evaluation:
    """The answers to a set of problems and their summary. Shares are in 0..1, lengths in tokens, times in seconds."""

    answers: list[Answered]
    seconds: float

    def summary(self) -> dict[str, float]:
        n = len(self.answers)
        correct = sum(a.strict for a in self.answers)
        low, high = wilson_interval(correct, n)
        return {
            "problems": n,
            "accuracy": correct / n,
            "accuracy_low": low,
            "accuracy_high": high,
            "lenient_accuracy": sum(a.lenient for a in self.answers) / n,
            "format_rate": sum(bool(a.extracted) for a in self.answers) / n,
            "mean_length": sum(a.tokens for a in self.answers) / n,
            "max_length": max(a.tokens for a in self.answers),
            "truncated_share": sum(a.truncated for a in self.answers) / n,
            "worked_share": sum(is_worked(a.response) for a in self.answers) / n,
            "seconds": self.seconds,
        }


def is_worked(response: str) -> bool:
    """Whether a response calculates anything before its answer: it holds an equals sign.

    >>> is_worked("3+4=7\\n#### 7"), is_worked("#### 7")
    (True, False)
    """
    return "=" in response


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): unlike the normal one it stays within 0..1 and is not empty at 0 or n.

    >>> [round(bound, 4) for bound in wilson_interval(0, 10)]
    [0.0, 0.2775]
    >>> [round(bound, 4) for bound in wilson_interval(50, 100)]
    [0.4038, 0.5962]
    """
    z = 1.959963984540054
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    task: TaskConfig,
    max_completion_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> Evaluation:
    """Ask every problem once, greedily. Problems of like length share a batch; answers come back in the given order."""
    fmt = FORMATS[task.prompt_format]
    sampling = Sampling(max_completion_tokens, temperature=0)
    prompts = [encode_prompt(policy.tokenizer, prompt_messages(example, task)) for example in examples]
    # Longest first: memory runs out at once or never.
    by_length = sorted(range(len(examples)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, Answered] = {}
    start = time.perf_counter()
    with tqdm(total=len(examples), desc="evaluate", unit="problem", disable=not progress, leave=False) as bar:
        for first in range(0, len(examples), batch_size):
            batch = by_length[first : first + batch_size]
            samples = sample(policy, [prompts[i] for i in batch], sampling)
            lengths, truncated = samples.rows.completion_len_N.tolist(), samples.truncated_N.tolist()
            for place, i in enumerate(batch):
                answers[i] = _mark(
                    examples[i],
                    samples.texts[place],
                    fmt.extract(samples.texts[place]),
                    lengths[place],
                    truncated[place],
                )
            bar.update(len(batch))
            bar.set_postfix(accuracy=f"{sum(a.strict for a in answers.values()) / len(answers):.1%}")
    return Evaluation([answers[i] for i in range(len(examples))], time.perf_counter() - start)


def _mark(example: Example, text: str, extracted: str | None, tokens: int, truncated: bool) -> Answered:
    number = last_number(text)
    return Answered(
        question=example.question,
        expected=example.answer,
        response=text,
        extracted=extracted,
        strict=bool(extracted) and same_number(extracted or "", example.answer),
        lenient=number is not None and same_number(number, example.answer),
        tokens=tokens,
        truncated=truncated,
    )


def summary_table(columns: dict[str, dict[str, Any]]) -> str:
    """Summaries side by side, one column each, as aligned text."""
    rows = {
        "accuracy": lambda s: f"{s['accuracy']:.1%} [{s['accuracy_low']:.1%}, {s['accuracy_high']:.1%}]",
        "lenient accuracy": lambda s: f"{s['lenient_accuracy']:.1%}",
        "format kept": lambda s: f"{s['format_rate']:.1%}",
        "worked answers": lambda s: f"{s['worked_share']:.1%}",
        "mean length": lambda s: f"{s['mean_length']:.1f} tokens",
        "truncated": lambda s: f"{s['truncated_share']:.1%}",
        "problems": lambda s: f"{s['problems']}",
    }
    cells = [["", *columns]] + [[name, *(show(s) for s in columns.values())] for name, show in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
