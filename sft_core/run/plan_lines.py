"""--dry_run: task, tokenizer and weights are loaded and checked, and what the run would do is printed. No optimizer
step is taken, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft_core.config import FolderConfig, ModelConfig, OptimConfig, RunConfig
from sft_core.model.policy import Policy, load_policy
from sft_core.model.source import Source, find_source
from sft_core.model.tiny import build_tiny
from sft_core.run.checkpoint import checkpoints, step_of
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_ids
from sft_core.text.tasks import Task

LOOKED_AT = 500  # problems of an endless task whose lengths stand for all
UNTOUCHED = "dry run: all of this was loaded and checked; no step was taken, nothing was written"
Lines = dict[str, str]  # text by subject


def plan_text(lines: Lines) -> str:
    """A plan's lines, aligned, as one text."""
    width = max(map(len, lines)) + 2
    return "\n".join(f"{subject.ljust(width)}{text}" for subject, text in lines.items())


@contextmanager
def loaded(config: Any, source: Source | None, built_in: Source | None = None) -> Iterator[tuple[Policy, Source]]:
    """The policy with its weights. `source` None: the built-in model as `built_in`, or where that is not trained yet,
    untrained, in a temporary folder."""
    source = source or built_in
    if source:
        yield load_policy(config, source), source
        return
    with TemporaryDirectory() as folder:
        found = find_source(replace(config, model=str(build_tiny(Path(folder), getattr(config, "seed", 0)))))
        yield load_policy(config, found), found


def some(task: Task) -> Sequence[Example]:
    """All training problems, or the first of an endless task."""
    return [task.train[i] for i in range(task.size or LOOKED_AT)]


def prompt_lengths(policy: Policy, task: Task, config: TaskConfig) -> list[int]:
    """Tokens of each training prompt."""
    return [len(prompt_ids(policy.tokenizer, example, config)) for example in some(task)]


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def lengths_text(lengths: Sequence[int], limit: int) -> str:
    over = sum(length > limit for length in lengths)
    cut = f", {over} over it are cut" if over else ""
    return f"of {mean(lengths):.0f} on average, {max(lengths)} at most (limit {limit}{cut})"


def task_line(task: Task, config: TaskConfig) -> str:
    size = "endless" if task.size is None else f"{task.size:,} training problems"
    return f"{task.name}: {size}, {len(task.heldout):,} held out; {config.prompt_format} answers, {config.shots} shots"


def first_line(policy: Policy, examples: Sequence[Example], config: TaskConfig) -> str:
    """The first problem as the model will see it, on one line, and the answer that is expected of it."""
    prompt = policy.tokenizer.decode(prompt_ids(policy.tokenizer, examples[0], config))
    answer = f"{examples[0].answer!r} is expected" if examples[0].answer else "no answer is expected: rewards judge"
    return f"{prompt!r}; {answer}"


def model_line(config: ModelConfig, policy: Policy, name: str = "") -> str:
    total = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for _, p in policy.trainable())
    adapter = f" with the adapter {config.adapter_path}" if config.adapter_path else ""
    return (
        f"{name or config.model}{adapter}: {total / 1e6:,.2f} million weights, {trained / 1e6:,.2f} million of them "
        f"trained; {policy.precision.name} on {policy.device}"
    )


def passes(task: Task, drawn: int, steps: int) -> str:
    return f" ({steps * drawn / task.size:.2f} epochs)" if task.size else ""


def rate_text(config: OptimConfig, steps: int) -> str:
    warm_up = f" after {round(config.warmup_ratio * steps)} steps of warm-up" if config.warmup_ratio else ""
    return f"learning rate {config.lr:g}, {config.lr_schedule}{warm_up}"


def evaluations_at(every: int, steps: int, first: bool) -> list[int]:
    """The steps after which an evaluation is due: always the last one, and step 0 where `first`."""
    between = range(every, steps, every) if every else []
    return [*([0] if first else []), *between, steps]


def steps_text(steps: Sequence[int]) -> str:
    """
    >>> steps_text([0, 10, 20, 30, 40]), steps_text([0, 80]), steps_text([])
    ('5 times: at steps 0, 10, 20, ..., 40', '2 times: at steps 0, 80', 'never')
    """
    if not steps:
        return "never"
    shown = [*map(str, steps[:3]), "...", str(steps[-1])] if len(steps) > 4 else list(map(str, steps))
    times = "once: at step" if len(steps) == 1 else f"{len(steps)} times: at steps"
    return f"{times} {', '.join(shown)}"


def answers_text(samples: int) -> str:
    """How many answers an evaluation samples for each problem."""
    return f"a greedy answer and {samples} samples of each" if samples else "a greedy answer to each"


def folder_line(config: FolderConfig, kind: str, steps: int = 0) -> str:
    """Where the run would write, whether it resumes, and its checkpoints."""
    folder = Path(config.output_dir) if config.output_dir else Path("runs") / f"{kind}-(time of the start)"
    there = checkpoints(folder)
    if isinstance(config, RunConfig) and config.resume and (folder / "final").is_dir():
        state = "holds this run, finished: nothing is left to do"
    elif isinstance(config, RunConfig) and config.resume and there:
        state = f"goes on after step {step_of(there[-1])} of {steps}"
    else:
        state = "holds a run, which is deleted" if (folder / "config.yaml").exists() else "new"
    if not isinstance(config, RunConfig):
        return f"{folder} ({state})"
    every = config.save_every
    often = "when interrupted only" if every == "0" else f"every {every}{'' if every.endswith('m') else ' steps'}"
    kept = f"the last {config.keep_last} kept" if config.keep_last else "all kept"
    return f"{folder} ({state}); a checkpoint {often}, {kept}; the final model in {folder / 'final'}"
