"""Settings of the problems: where they come from, what their answers are, how a question becomes a prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_core.config import flag
from sft_core.errors import require
from sft_core.pairs import read_pairs

AnswerType = Literal["number", "text", "multiple_choice", "none"]
BUILT_IN = ("gsm8k", "arithmetic", "ordering")
GENERATED = ("arithmetic", "ordering")  # made by code, without an end
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class PromptConfig:
    """How a question becomes a prompt."""

    prompt_format: Literal["xml", "hash"] = flag("xml", "answers in <reasoning>/<answer> tags, or ending in #### N")
    answer_type: AnswerType | None = flag(
        None,
        "what answers are: a number; text, compared without case, punctuation and articles; the letter of a choice; "
        "none: rewards judge alone. Default: number, text for the task ordering",
    )
    shots: int = flag(0, "worked examples shown in the prompt: 0 or 1")
    system_prompt: str | None = flag(
        None, "replaces the format's system prompt; '' sends none (chat templates may add their own)"
    )
    chat_template_kwargs: list[str] = flag([], "name=value pairs for the chat template, such as enable_thinking=true")
    max_prompt_tokens: int = flag(256, "the longest prompt, in tokens")

    @property
    def answers(self) -> AnswerType:
        """The answer type in force."""
        return self.answer_type or "number"

    def check(self) -> None:
        read_pairs("--chat_template_kwargs", self.chat_template_kwargs)
        require(self.shots in (0, 1), "shots", self.shots, "0 or 1")
        require(
            not self.shots or self.answers == "number",
            "shots",
            self.shots,
            f"0 with answers of type {self.answers}: the worked example answers with a number",
        )
        require(self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, "1 or more")


@dataclass(frozen=True)
class TaskConfig(PromptConfig):
    """The problems to train or evaluate on."""

    task: str = flag(
        "gsm8k",
        "gsm8k (from the hub); arithmetic or ordering (built in); a JSONL, JSON, CSV, TSV or Parquet file; a data set "
        "of the hub (OWNER/NAME) or a folder of one",
    )
    config_name: str = flag("", "a hub data set's configuration, where it has several")
    train_split: str = flag("train", "a data set's split to train on")
    eval_split: str = flag("test", "a data set's split to evaluate on; '': hold out the last rows of --train_split")
    question_column: str = flag(
        "", "the column of questions: texts, or conversations as lists of messages; default: question, prompt, messages"
    )
    answer_column: str = flag(
        "", "the column of answers, bare or worked and ending in #### N; default: answer, solution, answerKey"
    )
    eval_file: str | None = flag(
        None,
        "held-out problems for a task that is a file; without it, training holds out the task's last rows, and eval "
        "takes its first ones",
    )
    difficulty: int = flag(
        3, "arithmetic: the largest number of operations in a problem (the smallest is one less); ordering: of words"
    )
    max_samples: int = flag(0, "use only the first N training problems; 0: all")
    eval_problems: int = flag(
        200, "number of held-out problems in an evaluation; 0: all of a test split or --eval_file, otherwise none"
    )
    long_prompts: Literal["drop", "refuse"] = flag(
        "drop",
        "prompts longer than --max_prompt_tokens: drop and count them before training starts, or refuse to start",
    )

    @property
    def answers(self) -> AnswerType:
        return self.answer_type or ("text" if self.task == "ordering" else "number")

    @property
    def endless(self) -> bool:
        """Whether the training problems have no end."""
        return self.task in GENERATED

    def check(self) -> None:
        PromptConfig.check(self)
        require(
            self.task in BUILT_IN or Path(self.task).is_file() or Path(self.task).is_dir() or is_hub_name(self.task),
            "task",
            self.task,
            f"{', '.join(BUILT_IN)}, the path of an existing file or folder, or OWNER/NAME of a data set on the hub",
        )
        require(
            self.eval_file is None or Path(self.eval_file).is_file(), "eval_file", self.eval_file, "an existing file"
        )
        require(1 <= self.difficulty <= 8, "difficulty", self.difficulty, "1 to 8")
        for name in ("max_samples", "eval_problems"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


def is_hub_name(task: str) -> bool:
    """Whether a task is named as a data set of the hub is.

    >>> is_hub_name("openai/gsm8k"), is_hub_name("gsm8k"), is_hub_name("data/train.csv")
    (True, False, False)
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", task, re.ASCII) is not None and not task.endswith(FILES)
