"""Ask a trained model: questions typed or piped in, one a line, or from a file; every answer is kept.

python -m eval.ask RUN_OR_MODEL [--question "..."] [--questions FILE.jsonl] [--append_to FILE.jsonl]

A run folder's model is prompted as in training: its prompt format, system prompt, shots and budgets. The reasoning is
shown while it is written. A line of the file that answers are appended to is a problem of GSM8K's form (`question`, and
`answer` ending in `#### N`) with the model's own reasoning as its solution, so that the file can be given to --task.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transformers
from transformers import TextStreamer, set_seed

from eval.questions import Question, piped, read_questions, typed, whole
from eval.samples import Sampling
from eval.sampling import sample
from eval.statistics import agreeing
from eval.trust import trusted_sampler
from rewards import last_number, parse_number, same_number
from sft_core.cli import parse_config, run_ends, user_errors
from sft_core.config import ModelConfig, flag
from sft_core.errors import Refused, require
from sft_core.model.policy import Policy, load_policy
from sft_core.model.source import Source, check_context, find_source
from sft_core.run.lines import append_jsonl
from sft_core.run.trained import find_both, model_first
from sft_core.text.config import PromptConfig
from sft_core.text.example import Example
from sft_core.text.prompts import FORMATS, prompt_ids

KEPT = "asked.jsonl"


@dataclass(frozen=True)
class AskConfig(ModelConfig, PromptConfig):
    """Questions to one model."""

    model: str = flag("", "a run folder, its final/ or a checkpoint, a model or adapter folder, a hub name")
    question: list[str] = flag([], "ask these and exit; default: --questions, else what is typed or piped in")
    questions: str = flag(
        "", "a JSONL file of questions: a column question, and answer (ending in #### N) if it is known"
    )
    max_completion_tokens: int = flag(256, "longest answer in tokens")
    temperature: float = flag(0.0, "0: greedy; above 0: sampled at this temperature")
    samples: int = flag(1, "answers sampled for each question; the most frequent number is taken (maj@k)")
    seed: int = flag(42, "random seed of the sampling")
    append_to: str | None = flag(
        None, f"JSONL file to append answers to; default: {KEPT} in the run folder, else here; '': none"
    )

    def check(self) -> None:
        for part in (PromptConfig, ModelConfig):
            part.check(self)
        require(self.model not in ("", "tiny"), "model", self.model or "''", "a run folder, a model or a hub name")
        require(not (self.question and self.questions), "questions", self.questions, "either --question or --questions")
        require(not self.questions or Path(self.questions).is_file(), "questions", self.questions, "an existing file")
        require(self.max_completion_tokens >= 1, "max_completion_tokens", self.max_completion_tokens, "1 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        require(
            self.samples == 1 or self.temperature > 0,
            "samples",
            self.samples,
            "1 at --temperature 0: all would be the same",
        )
        folder = Path(self.append_to or ".").parent
        free = folder.is_dir() and not (self.append_to and Path(self.append_to).is_dir())
        require(free, "append_to", self.append_to, "a file in an existing folder")


@dataclass(frozen=True)
class Reply:
    """What the model made of a question. `extracted`: by the prompt format's own rule; None or '' where the format was
    not kept. `votes`: so many of the samples gave this answer. `seconds`: of all samples together."""

    response: str
    extracted: str | None
    votes: int
    tokens: int
    truncated: bool
    seconds: float


def reply(policy: Policy, prompt: Sequence[int], config: AskConfig) -> Reply:
    """Answer a prompt; a single answer is shown while it is written."""
    streamer = None
    if config.samples == 1:
        streamer = TextStreamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    try:
        sampling = Sampling(config.max_completion_tokens, config.temperature)
        samples = sample(policy, [prompt] * config.samples, sampling, streamer=streamer)
    except KeyboardInterrupt:
        if streamer:
            streamer.end()  # it holds the last word back until the next one begins
        raise
    extracted = [FORMATS[config.prompt_format].extract(text) for text in samples.texts]
    most = next(iter(agreeing(extracted)), [])
    row = most[0] if most else 0
    if streamer is None:
        print(samples.texts[row])
    return Reply(
        samples.texts[row],
        extracted[row],
        len(most),
        int(samples.rows.completion_len_N[row]),
        bool(samples.truncated_N[row]),
        time.perf_counter() - start,
    )


def as_problem(reply: Reply) -> str | None:
    """The reply as GSM8K writes a solution: the reasoning without the format's tags, then `#### N`. None where its
    answer is no number, so that it is no problem that could be trained on.

    >>> as_problem(Reply("<reasoning>\\n3+4=7\\n</reasoning>\\n<answer>\\n7\\n</answer>", "7", 1, 9, False, 0.1))
    '3+4=7\\n#### 7'
    """
    if not reply.extracted or parse_number(reply.extracted) is None:
        return None
    working = reply.response.partition("####")[0].partition("<answer>")[0]
    working = working.replace("<reasoning>", "").replace("</reasoning>", "").strip()
    return f"{working}\n#### {reply.extracted}" if working else f"#### {reply.extracted}"


@dataclass(frozen=True)
class AskJob:
    """A checked configuration; no weight has been read."""

    config: AskConfig
    source: Source
    kept: Path | None
    questions: list[Question] | None  # None: they are typed or piped in

    @property
    def unanswered(self) -> Path:
        """The file next to `kept` for answers that cannot be trained on."""
        return (self.kept or Path(KEPT)).with_suffix(".unanswered.jsonl")

    def ask(self, policy: Policy) -> None:
        """Ask everything; Ctrl-C at a terminal ends one answer, and otherwise the program."""
        typing = self.questions is None and sys.stdin.isatty()
        if self.kept:
            print(f"answers are appended to {self.kept}, those without a number to {self.unanswered.name}")
        if typing:
            print("one question per line; Ctrl-C stops an answer, Ctrl-D exits")
        set_seed(self.config.seed)
        asked = correct = known = 0
        for question in self.questions or (typed() if typing else piped()):
            if not question.text.strip():
                continue
            if not typing:
                print(f"Question: {question.text}")
            try:
                record = self._answer(policy, question)
            except KeyboardInterrupt:
                if not typing:
                    raise
                print("(stopped, and not kept)\n")
                continue
            if record:
                asked += 1
                known += record["correct"] is not None
                correct += bool(record["correct"])
        if known:
            print(f"{correct} of {known} answers are correct, of {asked} in all")

    def _answer(self, policy: Policy, question: Question) -> dict[str, Any] | None:
        """Ask one question, show the answer and keep it; None if it cannot be asked."""
        config = self.config
        prompt = prompt_ids(policy.tokenizer, Example(question.text, "", ""), config)
        if len(prompt) > config.max_prompt_tokens:
            limit = f"--max_prompt_tokens {config.max_prompt_tokens}"
            print(
                f"not asked: its prompt has {len(prompt)} tokens, over {limit}: {question.text[:60]!r}", file=sys.stderr
            )
            return None
        answer = reply(policy, prompt, config)
        print(shown(answer, question, config) + "\n")
        record = self._record(question, answer)
        if self.kept:
            # A line without a number would make the file unusable as a task.
            usable = record["answer"] is not None
            append_jsonl(self.kept if usable else self.unanswered, [record])
        return record

    def _record(self, question: Question, answer: Reply) -> dict[str, Any]:
        config = self.config
        expected = question.expected
        correct = None if expected is None else same_number(answer.extracted or "", expected)
        settings = (
            "prompt_format",
            "shots",
            "system_prompt",
            "chat_template_kwargs",
            "max_completion_tokens",
            "temperature",
            "samples",
            "seed",
        )
        return {
            "question": question.text,
            "answer": as_problem(answer),
            **asdict(answer),
            "expected": expected,
            "correct": correct,
            "model": config.model,
            "adapter": config.adapter_path,
            "settings": {name: getattr(config, name) for name in settings},
            "timestamp_iso": datetime.now(timezone.utc).isoformat(),
        }


def shown(answer: Reply, question: Question, config: AskConfig) -> str:
    """The lines printed after an answer."""
    if answer.extracted:
        found = f"Answer: {answer.extracted}"
    else:
        number = last_number(answer.response)
        found = f"Answer: none in the format {config.prompt_format}" + (
            f"; the last number is {number}" if number else ""
        )
    notes = [f"{answer.tokens} tokens", f"{answer.seconds:.1f} s"]
    if config.samples > 1:
        notes.insert(0, f"{answer.votes} of {config.samples} samples")
    if question.expected is not None:
        right = bool(answer.extracted) and same_number(answer.extracted or "", question.expected)
        notes.insert(0, "correct" if right else f"expected {question.expected}")
    if answer.truncated:
        notes.append(f"cut off by --max_completion_tokens {config.max_completion_tokens}")
    return f"{found}   ({', '.join(notes)})"


def prepare(argv: Sequence[str]) -> AskJob:
    """Read the command line, the run's settings and the questions, and refuse what cannot work.

    Raises:
        ValueError: as `parse_config`, `find_both`, `read_questions`, `find_source` and `check_context`.
    """
    config = parse_config(AskConfig, model_first(argv))
    trained, names = find_both(config.model, config.adapter_path)
    if trained.run:
        config = parse_config(AskConfig, model_first(argv), settings=trained.prompt_settings())
    config = replace(config, **names)
    questions = [Question(whole(text)) for text in config.question] or None
    if config.questions:
        questions = read_questions(Path(config.questions))
    source = find_source(config)
    check_context(source, config.max_prompt_tokens, config.max_completion_tokens)
    kept = (trained.run or Path()) / KEPT if config.append_to is None else Path(config.append_to)
    return AskJob(config, source, None if config.append_to == "" else kept, questions)


def main(argv: Sequence[str] | None = None) -> None:
    with run_ends():
        with user_errors():
            job = prepare(sys.argv[1:] if argv is None else argv)
        with user_errors(Refused):
            policy = trusted_sampler(load_policy(job.config, job.source))
            transformers.logging.set_verbosity_error()  # its advice would appear between question and answer
            job.ask(policy)


if __name__ == "__main__":
    main()
