"""Supervised fine-tuning: teach a language model to answer as the demonstrations do. `python -m sft_core.train`

The loss is the mean negative log-probability of the demonstration's tokens, its end-of-sequence token included; prompts
are input only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from sft_core.cli import parse_config, run_ends, user_errors
from sft_core.dryrun import sft_plan
from sft_core.errors import Refused
from sft_core.job import SFTConfig, SFTJob, plan, prepare
from sft_core.learn import ranks
from sft_core.learn.clock import Stopwatch, step_bar
from sft_core.learn.fit import fitted
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows, Tokens, pack_rows
from sft_core.learn.shards import in_parts, passes, whole_policy
from sft_core.learn.trust import trusted_learner
from sft_core.model.policy import Policy, is_adapted, load_policy
from sft_core.model.source import find_source
from sft_core.model.tiny import build_tiny
from sft_core.run.checkpoint import not_saved
from sft_core.run.following import run_folder
from sft_core.run.hub import push_run
from sft_core.run.joined import joined, meet
from sft_core.run.plan_lines import UNTOUCHED
from sft_core.run.progress import Progress, weights_identity
from sft_core.run.randomness import deterministic
from sft_core.run.runlog import RunFolder
from sft_core.text.arithmetic import with_slips
from sft_core.text.example import Example
from sft_core.text.prompts import (
    FORMATS,
    demonstration,
    encode_completion,
    is_terse,
    prompt_ids,
)

PRESETS = Path(__file__).parent / "presets"


def encode_demonstrations(policy: Policy, examples: Sequence[Example], config: SFTConfig) -> Rows:
    """Prompts and demonstrations as token rows on the policy's device."""
    fmt = FORMATS[config.prompt_format]
    prompts, completions = [], []
    for example in careless(examples, config.slips) if config.slips else examples:
        prompts.append(prompt_ids(policy.tokenizer, example, config))
        text = demonstration(example, fmt, is_terse(example, config.worked_share))
        ids = encode_completion(policy.tokenizer, text, policy.eos_ids[0])
        completions.append(ids[: config.max_completion_tokens])
    return pack_rows(prompts, completions, policy.pad_id).to(policy.device)


def careless(examples: Sequence[Example], share: float) -> Iterator[Example]:
    """The same problems with solutions and answers of a teacher who slips."""
    for example in examples:
        solution = with_slips(example.solution, share)
        yield replace(example, solution=solution, answer=solution.rpartition("#### ")[2])


def sft_step(policy: Policy, optimizer: Optimizer, rows: Rows) -> dict[str, float]:
    """One optimizer step on a batch. The weight of a token is 1 / (tokens in the batch), so micro-batches simply
    add up."""
    weight = 1.0 / float(rows.completion_len_N.sum())

    def learn(at: slice, micro: Rows) -> Tensor:
        logp_NT, _ = token_logprobs(policy, micro, entropy="none")
        loss = -(weight * logp_NT).sum()
        optimizer.backward(loss)
        return loss.detach()

    again = True
    while again:  # once; under fp16 until no gradient overflows
        losses = optimizer.accumulate(rows, learn)
        grad_norm, again = optimizer.clip_and_step()
    return {"loss": float(sum(losses)), "grad_norm": grad_norm}


@torch.no_grad()
def heldout_loss(policy: Policy, examples: Sequence[Example], config: SFTConfig, size: int | Tokens) -> float:
    """Mean negative log-probability per demonstration token on held-out problems."""
    rows = encode_demonstrations(policy, examples, config)
    policy.model.eval()
    totals = [
        counts * float(token_logprobs(policy, micro, entropy="none")[0].sum())
        for _, micro, counts in passes(rows, size, policy.model)
    ]
    policy.model.train()
    return -sum(ranks.gathered(sum(totals), "held-out loss")) / float(rows.completion_len_N.sum())


@dataclass(frozen=True)
class SFTRun:
    """A run with its weights loaded: at its start, or at the checkpoint that it resumes from."""

    job: SFTJob
    folder: RunFolder
    policy: Policy
    optimizer: Optimizer
    progress: Progress

    def finish(self) -> Path:
        """Train, and upload under --push_to_hub; return the folder of the final model."""
        with closing(self.folder), self.progress.kept():
            self.train()
            policy = whole_policy(self.policy)
            final = ranks.by_first(lambda: self.folder.save_final(policy), "final model")
        ranks.by_first(lambda: push_run(self.folder.path, self.job.config), "upload")
        return final

    def train(self) -> None:
        """Take the remaining steps."""
        config, task, policy, optimizer = self.job.config, self.job.task, self.policy, self.optimizer
        steps, done = self.job.steps, self.progress.step
        policy.model.train()
        self.look(done)  # a run that stopped during an evaluation repeats it
        bar = step_bar("SFT", done, steps, config.progress)
        for step in bar:
            clock = Stopwatch(policy.device)
            lr = optimizer.lr
            skipped, optimizer.skipped_rows = optimizer.skipped, []
            examples = task.draw((step - 1) * config.batch_size, config.batch_size, config.seed)
            rows = encode_demonstrations(policy, examples, config)
            record: dict[str, Any] = sft_step(policy, optimizer, rows)
            clock.lap("step")
            if step % config.log_every == 0 or step == steps or optimizer.skipped > skipped:
                tokens = int(rows.completion_len_N.sum())
                record |= {"learning_rate": lr, "tokens": tokens, "time_per_step_s": clock.total}
                record |= {"skipped_steps": optimizer.skipped, "skipped_rows": optimizer.skipped_rows}
                record |= ranks.times(clock.total, clock.waited)
                self.folder.log("train", step, record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            self.progress.completed(step, steps)
            at_fault = [examples[row].question for row in optimizer.skipped_rows]
            optimizer.stop_if_lost(step, "; ".join(repr(question[:60]) for question in at_fault[:3]))
            self.look(step)

    def look(self, step: int) -> None:
        """Log the held-out loss where it is due and was not logged before the run was resumed."""
        config, heldout = self.job.config, self.job.task.heldout
        due = step == self.job.steps or (step and config.eval_every and step % config.eval_every == 0)
        if heldout and due and step not in self.folder.evaluations:
            self.folder.log(
                "eval", step, {"heldout_loss": heldout_loss(self.policy, heldout, config, self.optimizer.micro_batch)}
            )


def begin(job: SFTJob) -> SFTRun | None:
    """Open the run folder and read the weights, of the start or of the checkpoint to resume from. None: under --resume
    the run is found finished.

    Raises:
        Refused: as `RunFolder`, `Optimizer` and `Progress`.
    """
    deterministic(job.config.deterministic)
    set_seed(job.config.seed)
    folder = run_folder(job.config, "sft")
    with folder.closed_on_error():
        return None if folder.finished else _begin(job, folder)


def _begin(job: SFTJob, folder: RunFolder) -> SFTRun:
    config, base = job.config, ""
    ranks.check_rows("--batch_size", config.batch_size)
    if not job.source:
        with not_saved(folder.path / "base"):
            base = str(ranks.by_first(lambda: build_tiny(folder.path / "base", config.seed), "built-in model"))
    source = job.source or find_source(replace(config, model=base))
    fit = fitted(config, source, plan)
    print(fit.line)
    policy = in_parts(trusted_learner(load_policy(fit.config, source)), fit.config)
    # Weights that no checkpoint holds: those below an adapter.
    identity = {"task": job.task.identity, "model": weights_identity(policy) if is_adapted(policy.model) else ""}
    optimizer = Optimizer(policy, fit.config, job.steps, fit.micro_batch)
    progress = Progress(folder, config, policy, optimizer, {}, identity)
    folder.note(checks=policy.checks)
    return SFTRun(job, folder, policy, optimizer, progress)


def run(job: SFTJob) -> Path:
    """Train, or continue training; return the folder of the final model."""
    begun = begin(job)
    return begun.finish() if begun else Path(job.config.output_dir) / "final"


def main(argv: Sequence[str] | None = None) -> None:
    with joined(), run_ends():
        with user_errors():
            given = sys.argv[1:] if argv is None else argv
            job = prepare(parse_config(SFTConfig, given, PRESETS, "tiny", os.environ))
        with user_errors(Refused):
            if job.config.dry_run:
                return print(sft_plan(job), UNTOUCHED, sep="\n")
            meet(job.config.rank_timeout)
            run = begin(job)
        print(f"final model: {run.finish()}" if run else f"this run is finished: {job.config.output_dir}/final")


if __name__ == "__main__":
    main()
