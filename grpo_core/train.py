"""The run around the step: prepare, measure, train, measure again, report. `python -m grpo_core.train`"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from eval.compare import paired, sampled, sampled_lines, verdict
from eval.evaluate import Evaluation, evaluate, read_answers
from eval.report import side_by_side, summary_table
from eval.statistics import sizes
from grpo_core.completions import Pieces, completion_records, token_records
from grpo_core.config import GRPOConfig
from grpo_core.doctor.watch import Watch
from grpo_core.dryrun import grpo_plan
from grpo_core.forecast.memory import fitted
from grpo_core.job import GRPOJob, prepare
from grpo_core.metrics import step_record
from grpo_core.scoring import unearned
from grpo_core.step import Learner, grpo_step
from grpo_core.warmstart import tiny_sft
from grpo_core.ways import ways, ways_line
from rewards import RewardError
from sft_core.cli import parse_config, run_ends, user_errors
from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.learn.clock import step_bar
from sft_core.learn.shards import whole_policy
from sft_core.learn.trust import refuse_gap
from sft_core.model.policy import is_adapted
from sft_core.model.source import find_source
from sft_core.run.following import run_folder
from sft_core.run.hub import push_run
from sft_core.run.joined import joined, meet
from sft_core.run.plan_lines import UNTOUCHED
from sft_core.run.progress import Part, Progress, weights_identity
from sft_core.run.runlog import RunFolder
from sft_core.run.trackers import shown
from sft_core.text.example import Example
from sft_core.text.tasks import Task

PRESETS = Path(__file__).parent / "presets"


class PromptSource:
    """The task's training problems one after the other, in the order of a seed."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed, self.position = task, seed, 0

    def __call__(self, count: int) -> list[Example]:
        drawn = self.task.draw(self.position, count, self.seed)
        self.position += count
        return drawn

    def numbers(self) -> dict[str, Any]:
        return {"position": self.position}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.position = numbers["position"]


@dataclass(frozen=True)
class GRPORun:
    """A run with its weights loaded: at its start, or at the checkpoint that it resumes from."""

    job: GRPOJob
    folder: RunFolder
    learner: Learner
    prompts: PromptSource
    progress: Progress

    def finish(self) -> Path:
        """Train, print the comparison of before and after, upload under --push_to_hub; return the run folder."""
        folder = self.folder
        with closing(folder), self.progress.kept():
            before = self.held_out(0)
            self.train()
            after = self.held_out(self.job.steps)
            if before and after:
                ranks.by_first(lambda: self.compare(before, after), "summary")
            policy = whole_policy(self.learner.policy)
            final = ranks.by_first(lambda: folder.save_final(policy), "final model")
        print(f"run folder: {folder.path} (log.jsonl, completions.jsonl, tensorboard/)\nfinal model: {final}")
        programs = ("benchmarks.plots", "benchmarks.browse", "grpo_core.doctor")
        print(f"curves, texts, advice: {'; '.join(f'python -m {name} {folder.path}' for name in programs)}")
        ranks.by_first(lambda: push_run(folder.path, self.job.config), "upload")
        return folder.path

    def compare(self, before: Evaluation, after: Evaluation) -> None:
        """Print the comparison, and keep its figures."""
        print(comparison(before, after))
        summaries: dict[str, Any] = {"before": before.summary(), "after": after.summary()}
        if found := ways(self.folder.path / "completions.jsonl", self.job.steps):
            print(ways_line(found, self.job.steps))
            summaries["ways"] = found
        summaries["paired"] = paired(before.answers, after.answers).summary()
        summaries["paired"] |= sampled(before.answers, after.answers)
        self.folder.write("summary.json", json.dumps(summaries, indent=2) + "\n")

    def train(self) -> None:
        """The remaining steps of Algorithm 1, with their logs, samples, evaluations and checkpoints."""
        config, policy, optimizer = self.job.config, self.learner.policy, self.learner.optimizer
        task, steps, done = self.job.task, self.job.steps, self.progress.step
        pieces, watch = Pieces(policy.tokenizer), Watch(config, str(self.folder.path))
        policy.model.train()  # gradient checkpointing works in train mode only; dropout is off (`without_dropout`)
        self.look(done)  # a run that stopped during an evaluation repeats it
        bar = step_bar("GRPO", done, steps, config.progress)
        for step in bar:
            skipped, optimizer.skipped_rows = optimizer.skipped, []
            examples = self.prompts(config.prompts_per_step)
            report = grpo_step(self.learner, examples)

            record = step_record(report)
            if step == done + 1:
                refuse_gap(record["sampler_gap_mean"], policy)
            bar.set_postfix(
                reward=f"{record['reward_mean']:.2f}",
                accuracy=f"{record['accuracy']:.0%}",
                length=f"{record['length_mean']:.0f}",
                refresh=False,
            )
            if step % config.log_every == 0 or step == steps or optimizer.skipped > skipped:
                epoch = self.prompts.position / task.size if task.size else 0.0
                about = {"epoch": epoch, "device": str(policy.device), "seed": config.seed}
                about |= {"skipped_steps": optimizer.skipped, "skipped_rows": optimizer.skipped_rows}
                about |= report.rows.fullness(optimizer.micro_batch)
                about |= ranks.times(report.clock.total, report.clock.waited)
                self.folder.log("train", step, {**about, **record})
            completions = completion_records(step, report)
            self.folder.append("completions.jsonl", completions)
            if config.record_tokens:
                self.folder.append("tokens.jsonl", token_records(step, report, pieces))
            if warning := watch.of(step, record):
                bar.write(warning)
            if config.show_every and step % config.show_every == 0:
                bar.write(shown(completions[0]))
                self.folder.show(completions[0])
            self.progress.completed(step, steps)
            optimizer.stop_if_lost(step, "completions.jsonl holds their texts")
            self.look(step)

    def look(self, step: int) -> None:
        """Evaluate where --eval_every asks for it."""
        every = self.job.config.eval_every
        if every and step % every == 0 and step != self.job.steps:
            self.held_out(step)

    def held_out(self, step: int) -> Evaluation | None:
        """Accuracy on the task's held-out problems, logged and shown, or read from the log; None where the task has
        none. The training's random states stay as they are."""
        task, config, folder = self.job.task, self.job.config, self.folder
        if not task.heldout:
            return None
        if step in folder.evaluations:  # before the run was resumed
            return answered(folder, step)
        if step != self.progress.step:  # the log has lost it, and the weights of that step are gone
            return None
        result = evaluate(
            self.learner.policy,
            task.heldout,
            config,
            config.max_completion_tokens,
            config.eval_batch_size,
            config.progress,
            config.eval_samples,
            config.temperature,
            config.seed,
        )
        summary = result.summary()
        folder.save_answers(step, map(asdict, result.answers))
        folder.log("eval", step, summary)
        sampled = [
            f", {kind}@{k} {summary[f'{kind}_at_{k}']:.1%}"
            for k in sizes(config.eval_samples)[-1:]
            for kind in ("pass", "maj")
        ]
        tqdm.write(
            f"step {step:4}: held-out accuracy {summary['accuracy']:6.1%}, worked answers "
            f"{summary['worked_share']:6.1%}, mean length {summary['mean_length']:.1f} tokens{''.join(sampled)}"
        )
        return result


def begin(job: GRPOJob) -> GRPORun | None:
    """Open the run folder and read the weights, of the start or of the checkpoint to resume from. None: under --resume
    the run turns out to be finished.

    Raises:
        Refused: as `RunFolder`, `Optimizer` and `Progress`.
    """
    folder = run_folder(job.config, "grpo")
    with folder.closed_on_error():
        if folder.finished:
            print(f"this run is finished: {folder.path / 'final'}")
            return None
        return _begin(job, folder)


def _begin(job: GRPOJob, folder: RunFolder) -> GRPORun:
    config = job.config
    ranks.check_rows("--prompts_per_step", config.prompts_per_step * config.group_size)
    source = job.source or find_source(replace(config, model=str(tiny_sft(config, folder.path))))
    fit = fitted(config, source)
    print(fit.line)
    for line in unearned(job.rewards, job.task.train[0], config):
        print(f"note: {line}")
    prompts = PromptSource(job.task, config.seed)
    learner = replace(job, config=fit.config).learner(source, prompts, fit.micro_batch)
    parts: dict[str, Part] = {"prompts": prompts}
    if learner.reference:
        parts["reference"] = learner.reference
    # Weights that no checkpoint holds: those of the reference, and those below an adapter.
    held = learner.reference is not None or is_adapted(learner.policy.model)
    identity = {"task": job.task.identity, "model": weights_identity(learner.policy) if held else ""}
    progress = Progress(folder, config, learner.policy, learner.optimizer, parts, identity)
    folder.note(checks=learner.policy.checks)
    return GRPORun(job, folder, learner, prompts, progress)


def run(job: GRPOJob) -> Path:
    """Train, or continue training; return the run folder."""
    begun = begin(job)
    return begun.finish() if begun else Path(job.config.output_dir)


def answered(folder: RunFolder, step: int) -> Evaluation | None:
    """An evaluation in the run folder; None where its answers have been deleted or damaged."""
    record, path = folder.evaluations[step], folder.answers_path(step)
    try:
        answers = read_answers(path)
    except ValueError:
        answers = []
    if len(answers) != record["problems"]:
        print(f"no comparison with step {step}: {path} is damaged or gone", file=sys.stderr)
        return None
    return Evaluation(answers, record["seconds"])


def comparison(before: Evaluation, after: Evaluation) -> str:
    """The table of before and after, and three problems with both answers: improved ones first."""
    first, last = before.summary(), after.summary()
    pairs = list(zip(before.answers, after.answers, strict=True))
    pairs.sort(key=lambda pair: pair[1].strict - pair[0].strict, reverse=True)
    lines = [
        "",
        "Held-out problems, greedy answers, 95% intervals:",
        "",
        summary_table({"before": first, "after": last}),
        "",
        f"accuracy gain: {verdict(paired(before.answers, after.answers))}",
        *sampled_lines(sampled(before.answers, after.answers)),
        "",
    ]
    for old, new in pairs[:3]:
        lines += [side_by_side(old, new, ("Before", "After")), ""]
    return "\n".join(lines)


@contextmanager
def reward_errors() -> Iterator[None]:
    """Show where a reward function failed, then name it and the row in one line; exit code 1."""
    try:
        yield
    except RewardError as error:
        print(f"{error.traceback}error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def main(argv: Sequence[str] | None = None) -> None:
    with joined(), run_ends(), reward_errors():
        with user_errors():
            given = sys.argv[1:] if argv is None else argv
            job = prepare(parse_config(GRPOConfig, given, PRESETS, "tiny", os.environ))
        with user_errors(Refused):
            if job.config.dry_run:
                return print(grpo_plan(job), UNTOUCHED, sep="\n")
            meet(job.config.rank_timeout)
            run = begin(job)
            if run:
                run.finish()


if __name__ == "__main__":
    main()
