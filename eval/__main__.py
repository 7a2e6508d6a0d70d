"""Evaluate a model or adapter on a task's held-out problems. `python -m eval --model MODEL --task TASK`

Greedy answers, and with --samples several drawn ones of each problem for pass@k and maj@k. `python -m eval.compare`
compares what two evaluations leave behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from eval.config import EvalConfig
from eval.dryrun import eval_plan
from eval.evaluate import Evaluation, evaluate
from eval.report import method, summary_cells, summary_table
from eval.trust import trusted_sampler
from rewards.tables import markdown
from sft_core.cli import parse_config, run_ends, user_errors
from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.model.policy import Policy, load_policy, load_tokenizer
from sft_core.model.source import Source, check_context, find_source
from sft_core.run.following import run_folder
from sft_core.run.joined import joined, meet
from sft_core.run.plan_lines import UNTOUCHED
from sft_core.run.runlog import RunFolder
from sft_core.text.example import Example
from sft_core.text.prompts import drop_long_prompts
from sft_core.text.tasks import load_heldout

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class EvalJob:
    """A checked configuration; no weight has been read."""

    config: EvalConfig
    heldout: list[Example]
    source: Source

    def run(self) -> Path:
        """Ask; return the run folder."""
        ranks.check_rows("--eval_problems", len(self.heldout))
        return self.ask(trusted_sampler(load_policy(self.config, self.source)))

    def ask(self, policy: Policy) -> Path:
        """Print the summary, write it and `answers.jsonl` to the run folder."""
        config = self.config
        with closing(run_folder(config, "eval")) as folder:
            result = evaluate(
                policy,
                self.heldout,
                config,
                config.max_completion_tokens,
                config.batch_size,
                config.progress,
                config.samples,
                config.temperature,
                config.seed,
            )
            folder.note(checks=policy.checks)
            folder.append("answers.jsonl", (dataclasses.asdict(answer) for answer in result.answers))
            ranks.by_first(lambda: self.report(result, folder), "summary")
        return folder.path

    def report(self, result: Evaluation, folder: RunFolder) -> None:
        """The summary: in the log, as summary.json, as a table in summary.md and in the terminal."""
        config, summary = self.config, result.summary()
        columns = {config.adapter_path or config.model: summary}
        how = f"Task {config.task}, {config.prompt_format} format, at most {config.max_completion_tokens} tokens"
        if config.samples:
            how += f"; {config.samples} samples a problem at temperature {config.temperature:g}, seed {config.seed}"
        folder.log("eval", 0, summary)
        folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        table = markdown(summary_cells(columns))
        folder.write("summary.md", f"# Evaluation\n\n{table}\n\n{how}. {method([summary])}\n")
        print(f"{summary_table(columns)}\n\n{how}.\n{method([summary])}")


def prepare(config: EvalConfig) -> EvalJob:
    """Read the task and the model's configuration, and refuse what cannot work.

    Raises:
        ValueError: as `load_heldout`, `find_source` and `check_context`.
    """
    source = find_source(config)
    check_context(source, config.max_prompt_tokens, config.max_completion_tokens)
    examples = drop_long_prompts(load_heldout(config), load_tokenizer(source), config)
    return EvalJob(config, examples, source)


def main(argv: Sequence[str] | None = None) -> None:
    with joined(), run_ends():
        with user_errors():
            given = sys.argv[1:] if argv is None else argv
            job = prepare(parse_config(EvalConfig, given, PRESETS, environ=os.environ))
        with user_errors(Refused):
            if job.config.dry_run:
                return print(eval_plan(job.config, job.source, job.heldout), UNTOUCHED, sep="\n")
            meet(job.config.rank_timeout)
            path = job.run()
        print(f"answers and summary: {path}")


if __name__ == "__main__":
    main()
