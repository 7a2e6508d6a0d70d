"""Evaluation, SFT and GRPO in one command. `python -m grpo_core.pipeline --mode all`

All stages leave their run folders in one folder:

pipeline.yaml                             the settings of all stages; --config takes it back
start/                                    the built-in model, untrained, where the pipeline starts from it
zero-shot/, sft/, sft-eval/, grpo/, grpo-eval/     a run folder each, as the stage's own program leaves it
summary.json, summary.md                  the evaluations' figures by stage, side by side as they are printed at the end

Everything is checked before the first stage starts: tasks, prompts, rewards, budgets, with the start's configuration
and tokenizer in place of a model that an earlier stage has yet to write. What flags mean: `stageflags`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

import eval.__main__
import grpo_core.job
import grpo_core.train
import sft_core.job
import sft_core.train
from eval.compare import paired, verdict
from eval.dryrun import eval_plan
from eval.evaluate import read_answers
from eval.report import method, summary_cells, summary_table
from grpo_core.dryrun import grpo_plan
from grpo_core.pipeline.stages import SETTINGS, Settings, Stage, Weights, every_stage_name, understood
from grpo_core.train import reward_errors
from rewards.jsonl import read_jsonl
from rewards.tables import markdown
from sft_core.cli import read_yaml, run_ends, same_run, user_errors
from sft_core.config import NEWEST
from sft_core.dryrun import sft_plan
from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.model.source import find_source
from sft_core.model.tiny import build_tiny
from sft_core.run.checkpoint import UNFINISHED, not_saved, write_text, write_whole
from sft_core.run.joined import joined, meet
from sft_core.run.plan_lines import UNTOUCHED

PREPARE: dict[str, Any] = {
    "sft": sft_core.job.prepare,
    "grpo": grpo_core.job.prepare,
    "eval": eval.__main__.prepare,
}
BEGIN: dict[str, Any] = {"sft": sft_core.train.begin, "grpo": grpo_core.train.begin}
BUILT_IN = "the built-in model"
SUMMARIES = ("summary.json", "summary.md")


@dataclass(frozen=True)
class Pipeline:
    """Checked settings; no weight has been read. `jobs`: by stage, prepared with the start's model."""

    settings: Settings
    jobs: dict[str, Any]
    start: Weights  # that the jobs were prepared with

    def run(self) -> None:
        """All stages that are not finished, and the table of the evaluations."""
        settings = self.settings
        ranks.by_first(self._begin, "folder")
        for number, stage in enumerate(settings.stages, start=1):
            print(f"\n== stage {number} of {len(settings.stages)}: {stage.name}, in {settings.folder / stage.name}")
            if ranks.by_first(lambda stage=stage: finished(settings, stage), "stage"):  # type: ignore[misc]
                print("finished before")
                continue
            self._take(stage)
            gc.collect()  # the stage's model, before the next one comes
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        with user_errors():
            ranks.by_first(self._compare, "comparison")

    def _begin(self) -> None:
        settings, folder = self.settings, self.settings.folder
        with not_saved(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if settings.overwrite:  # all of them: a stage that starts again must not be followed by an older one
            for name in ("start", *every_stage_name()):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in SUMMARIES:
                (folder / name).unlink(missing_ok=True)
        before = read_yaml(folder / SETTINGS) if settings.resume and (folder / SETTINGS).is_file() else {}
        write_text(folder / SETTINGS, yaml.safe_dump({**before, **settings.as_values()}, sort_keys=False))
        start = folder / "start"
        if settings.start.model == str(start) and not start.is_dir():
            seed = settings.configs[settings.starter.name].seed

            def write(unfinished: Path) -> None:
                build_tiny(unfinished, seed)

            write_whole(start, write)

    def _take(self, stage: Stage) -> None:
        config = configured(self.settings, stage)
        source = None if config.model == "tiny" else find_source(config)
        job = replace(self.jobs[stage.name], config=config, source=source)
        ranks.gathered(None, "the stage's checks")  # which what another rank begins to write would fail
        with user_errors(Refused):
            if stage.kind == "eval":
                job.run()
                return
            run = BEGIN[stage.kind](job)
            if run:
                run.progress.again = self.settings.folder
                run.finish()

    def _compare(self) -> None:
        """Print the evaluations side by side, and keep their figures.

        Raises:
            ValueError: somebody has damaged the answers of one.
        """
        settings = self.settings
        figures = {s.name: figures_of(settings.folder / s.name) for s in settings.stages if s.kind == "eval"}
        found = {name: values for name, values in figures.items() if values}
        if found:
            table = markdown(summary_cells(found))
            how = "\n".join([method(list(found.values())), "", *self._gains(list(found))])
            write_text(settings.folder / "summary.json", json.dumps(found, indent=2) + "\n")
            write_text(settings.folder / "summary.md", f"# {settings.folder.name}\n\n{table}\n\n{how}\n")
            print(f"\nHeld-out problems:\n\n{summary_table(found)}\n\n{how}")
        print(f"\nall stages are finished: {settings.folder}")

    def _gains(self, names: Sequence[str]) -> Iterator[str]:
        """Each evaluation compared with the previous one, problem by problem."""
        answers = {name: read_answers(self.settings.folder / name / "answers.jsonl") for name in names}
        for before, after in zip(names, names[1:], strict=False):
            yield f"- {before} to {after}: {verdict(paired(answers[before], answers[after]))}"

    def plan(self) -> Iterator[str]:
        """What each stage would do; the weights of a stage that is to come are the start's, or new ones like them."""
        yield f"settings: {self.settings.layers}"
        plans: dict[str, Any] = {"sft": sft_plan, "grpo": grpo_plan}
        for number, stage in enumerate(self.settings.stages, start=1):
            job = self.jobs[stage.name]
            yield f"== stage {number} of {len(self.settings.stages)}: {stage.name}"
            if finished(self.settings, stage):
                yield f"finished before: {self.settings.folder / stage.name}"
                continue
            if stage.origin and job.config != configured(self.settings, stage):
                yield f"starts from {self.settings.folder / stage.origin / 'final'}; the model below stands in for it"
            text = eval_plan(job.config, job.source, job.heldout) if stage.kind == "eval" else plans[stage.kind](job)
            yield text.replace(self.start.model, BUILT_IN) if self.start != self.settings.start else text


def configured(settings: Settings, stage: Stage) -> Any:
    """The stage's config as its own program would have it."""
    config, run = settings.configs[stage.name], settings.folder / stage.name
    if stage == settings.starter and config.model == "tiny":
        config = replace(config, model=settings.start.model)
    if stage.kind == "eval":  # a few minutes, and started again after an interruption
        config = replace(config, output_dir=str(run), overwrite=settings.overwrite or settings.resume)
    else:
        resume = NEWEST if settings.resume else None
        config = replace(config, output_dir=str(run), overwrite=settings.overwrite, resume=resume)
    config.check()
    return config


def finished(settings: Settings, stage: Stage) -> bool:
    """Whether this stage of a resumed pipeline is complete."""
    run = settings.folder / stage.name
    if not settings.resume:
        return False
    return bool(figures_of(run)) if stage.kind == "eval" else (run / "final").is_dir()


def figures_of(run: Path) -> dict[str, Any] | None:
    """What an evaluation's log says; None: it has not come to its end."""
    try:
        return next((record for record in read_jsonl(run / "log.jsonl") if record["kind"] == "eval"), None)
    except ValueError:
        return None


@contextmanager
def prepared(settings: Settings) -> Iterator[Pipeline]:
    """The pipeline, each stage checked as far as it can be now.

    Raises:
        ValueError: as each program's own `prepare`; a folder that holds something else; a pipeline that was begun with
            other settings.
    """
    _check_folder(settings)
    with TemporaryDirectory() as scratch:
        start = settings.start
        if start.model == str(settings.folder / "start"):  # the built-in model, which is not there yet
            start = Weights(str(build_tiny(Path(scratch), 0)), None)
        jobs = {s.name: PREPARE[s.kind](_standing_in(settings, s, start)) for s in settings.stages}
        yield Pipeline(settings, jobs, start)


def _check_folder(settings: Settings) -> None:
    folder, file = settings.folder, settings.folder / SETTINGS
    if file.is_file() and not (settings.resume or settings.overwrite):
        raise ValueError(
            f"--output_dir {folder}: holds a pipeline; --resume continues it, --overwrite deletes its stages"
        )
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found - {SETTINGS + UNFINISHED} and not file.is_file():  # that one is left by a kill in the first moments
        raise ValueError(f"--output_dir {folder}: expected a folder that is new or empty, or holds a pipeline")
    if file.is_file() and settings.resume:
        begun = understood(["--config", str(file), "--output_dir", str(folder), "--resume"], {})
        for stage in settings.stages:
            if stage in begun.stages:
                same_run(settings.configs[stage.name], begun.configs[stage.name], folder / stage.name)


def _standing_in(settings: Settings, stage: Stage, start: Weights) -> Any:
    """The stage's config with a model that is there: its own, or for one that is yet to be written the start, with a
    new adapter where an adapter is to come."""
    config, starter = configured(settings, stage), settings.configs[settings.starter.name]
    if not stage.origin:
        return replace(config, model=start.model) if config.model == settings.start.model else config
    if settings.resume and (settings.folder / stage.origin / "final").is_dir():
        return config
    like_start = {"model": start.model, "adapter_path": start.adapter}
    like_start |= {name: getattr(starter, name) for name in ("from_scratch", "config_overrides")}
    if config.adapter_path and not start.adapter:
        like_start |= {name: getattr(starter, name) for name in ("lora", "lora_r", "lora_alpha", "lora_targets")}
    return replace(config, **like_start)


def main(argv: Sequence[str] | None = None) -> None:
    with joined(), run_ends(), reward_errors(), ExitStack() as stack:
        with user_errors():
            settings = understood(sys.argv[1:] if argv is None else argv, os.environ)
            pipeline = stack.enter_context(prepared(settings))
        if settings.dry_run:
            for text in pipeline.plan():
                print(text)
            print(UNTOUCHED)
            return
        meet(pipeline.settings.configs[pipeline.settings.starter.name].rank_timeout)
        pipeline.run()


if __name__ == "__main__":
    main()
