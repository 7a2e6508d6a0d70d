"""The run around the step: prepare, measure, train, measure again, report. `python -m grpo_core.train`"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import set_seed

from eval.evaluate import Evaluation, evaluate, summary_table
from grpo_core.config import GRPOConfig
from grpo_core.memory import forecast
from grpo_core.metrics import extracted_and_expected, step_record
from grpo_core.reference import Reference
from grpo_core.rollout import REWARD_COLUMNS
from grpo_core.step import Learner, StepReport, grpo_step
from grpo_core.warmstart import tiny_sft
from rewards import Reward, RewardError, check_signatures, load_rewards
from sft_core.cli import interruptible, parse_config, user_errors
from sft_core.optim import Optimizer
from sft_core.policy import Policy, load_policy, load_tokenizer, without_dropout
from sft_core.prompts import drop_long_prompts
from sft_core.runlog import RunFolder, append_jsonl
from sft_core.source import Source, check_context, find_source
from sft_core.tasks import Example, Task, load_task

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class GRPOJob:
    """A checked configuration: everything that a user can get wrong has been looked at, no weight has been read."""

    config: GRPOConfig
    task: Task
    rewards: list[Reward]
    source: Source | None  # None: the built-in model

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        config = self.config
        return config.max_steps or math.ceil(config.epochs * (self.task.size or 0) / config.prompts_per_step)

    def learner(self, source: Source) -> Learner:
        """Seeded, with the policy at its start and the reference copied from it."""
        config = self.config
        set_seed(config.seed)
        policy = load_policy(config, source)
        reference = Reference(policy, config.ref_sync_every, config.ref_sync_mix) if config.beta else None
        without_dropout(policy.model)
        optimizer = Optimizer(policy, config, self.steps * config.mu)
        return Learner(config, policy, reference, self.rewards, optimizer)

    def run(self) -> Path:
        """Train; print the comparison of before and after; return the run folder."""
        config, task = self.config, self.task
        source = self.source or find_source(replace(config, model=str(tiny_sft(config))))
        folder = RunFolder(config, "grpo")
        print(forecast(config, source))
        learner = self.learner(source)
        policy = learner.policy

        before = held_out(policy, task, config, folder, step=0)
        train(learner, task, folder, self.steps)
        after = held_out(policy, task, config, folder, step=self.steps)

        final = folder.save_final(policy)
        folder.close()
        if before and after:
            print(comparison(before, after))
            summaries = {"before": before.summary(), "after": after.summary()}
            (folder.path / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
        print(f"run folder: {folder.path} (log.jsonl, completions.jsonl, tensorboard/)\nfinal model: {final}")
        return folder.path


class PromptSource:
    """The task's training problems one after the other, in the order of a seed."""

    def __init__(self, task: Task, seed: int, position: int = 0) -> None:
        self.task, self.seed, self.position = task, seed, position

    def __call__(self, count: int) -> list[Example]:
        drawn = self.task.draw(self.position, count, self.seed)
        self.position += count
        return drawn


def train(learner: Learner, task: Task, folder: RunFolder, steps: int) -> None:
    """`steps` steps of Algorithm 1 with what people want to see of them."""
    config, policy = learner.config, learner.policy
    policy.model.train()  # gradient checkpointing works in train mode only; dropout is off (`without_dropout`)
    source = PromptSource(task, config.seed)
    bar = tqdm(range(1, steps + 1), desc="GRPO", disable=not config.progress, unit="step")
    for step in bar:
        examples = source(config.prompts_per_step)
        try:
            report = grpo_step(learner, examples, more=source if config.dynamic_sampling else None)
        except RewardError:
            bar.close()
            saved = folder.save_checkpoint(policy, step - 1)  # rewards come before a step's first update
            folder.close()
            print(f"saved the weights after step {step - 1}: {saved}", file=sys.stderr)
            raise

        record = step_record(report, config)
        bar.set_postfix(
            reward=f"{record['reward_mean']:.2f}",
            accuracy=f"{record['accuracy']:.0%}",
            length=f"{record['length_mean']:.0f}",
        )
        if step % config.log_every == 0 or step == steps:
            epoch = source.position / task.size if task.size else 0.0
            about = {"epoch": epoch, "device": str(policy.device), "seed": config.seed}
            about["skipped_steps"] = learner.optimizer.skipped
            folder.log("train", step, {**about, **record})
        completions = completion_records(step, report, config)
        append_jsonl(folder.path / "completions.jsonl", completions)
        if config.show_every and step % config.show_every == 0:
            bar.write(shown(completions[0]))
        learner.optimizer.stop_if_lost()
        if config.eval_every and step % config.eval_every == 0 and step != steps:
            held_out(policy, task, config, folder, step)
        if config.save_every and step % config.save_every == 0 and step != steps:
            folder.save_checkpoint(policy, step)


def held_out(policy: Policy, task: Task, config: GRPOConfig, folder: RunFolder, step: int) -> Evaluation | None:
    """Greedy accuracy on the task's held-out problems, logged and shown; None where the task has none."""
    if not task.heldout:
        return None
    result = evaluate(
        policy, task.heldout, config, config.max_completion_tokens, config.eval_batch_size, config.progress
    )
    summary = result.summary()
    folder.log("eval", step, summary)
    tqdm.write(
        f"step {step:4}: held-out accuracy {summary['accuracy']:6.1%}, worked answers {summary['worked_share']:6.1%}, "
        f"mean length {summary['mean_length']:.1f} tokens"
    )
    return result


def completion_records(step: int, report: StepReport, config: GRPOConfig) -> list[dict[str, Any]]:
    """A record for each sampled completion."""
    extracted, expected = extracted_and_expected(report, config)
    rollout, samples = report.rollout, report.rollout.samples
    reward_N, advantage_N = rollout.reward_BG.flatten().tolist(), report.advantage_BG.flatten().tolist()
    lengths_N, truncated_N = samples.rows.completion_len_N.tolist(), samples.truncated_N.tolist()
    return [
        {
            "step": step,
            "group": row // config.group_size,
            "question": rollout.examples[row // config.group_size].question,
            "expected": expected[row],
            "response": samples.texts[row],
            "extracted": extracted[row],
            "reward": reward_N[row],
            "rewards": {name: values[row] for name, values in rollout.scores.by_function.items()},
            "advantage": advantage_N[row],
            "tokens": lengths_N[row],
            "truncated": truncated_N[row],
        }
        for row in range(len(expected))
    ]


def shown(completion: dict[str, Any]) -> str:
    """A completion record, for the person who watches."""
    return (
        f"--- step {completion['step']}, reward {completion['reward']:.2f}\n"
        f"Question:  {completion['question']}\nExpected:  {completion['expected']}\n"
        f"Response:  {indented(completion['response'])}\nExtracted: {completion['extracted'] or '(no answer found)'}"
    )


def indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 11)


def comparison(before: Evaluation, after: Evaluation) -> str:
    """The table of before and after, and three problems answered by both: those that changed for the better first."""
    first, last = before.summary(), after.summary()
    pairs = list(zip(before.answers, after.answers, strict=True))
    pairs.sort(key=lambda pair: pair[1].strict - pair[0].strict, reverse=True)
    lines = [
        "",
        "Held-out problems, greedy answers, 95% intervals:",
        "",
        summary_table({"before": first, "after": last}),
        "",
        f"accuracy gain: {100 * (last['accuracy'] - first['accuracy']):+.1f} points",
        "",
    ]
    for old, new in pairs[:3]:
        lines += [
            f"Question:  {old.question}",
            f"Expected:  {old.expected}",
            f"Before:    {indented(old.response)}",
            f"After:     {indented(new.response)}",
            "",
        ]
    return "\n".join(lines)


def prepare(config: GRPOConfig) -> GRPOJob:
    """Read the rewards, the task and the model's configuration, and refuse what cannot work.

    Raises:
        ValueError: as `load_rewards`, `load_task`, `find_source` and `check_context`.
    """
    rewards = load_rewards(config.rewards, config.reward_weights)
    check_signatures(rewards, REWARD_COLUMNS)
    source = None if config.model == "tiny" else find_source(config)
    check_context(source, config.max_prompt_tokens, config.max_completion_tokens)
    task, tokenizer = load_task(config, config.seed), load_tokenizer(source)
    task = task.filtered(lambda examples: drop_long_prompts(examples, tokenizer, config))
    return GRPOJob(config, task, rewards, source)


@contextmanager
def reward_errors() -> Iterator[None]:
    """Show where a reward function failed, then name it and the row in one line; exit code 1."""
    try:
        yield
    except RewardError as error:
        print(f"{error.traceback}error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors():
        job = prepare(parse_config(GRPOConfig, sys.argv[1:] if argv is None else argv, PRESETS, "tiny"))
    with interruptible(), reward_errors():
        job.run()


if __name__ == "__main__":
    main()
