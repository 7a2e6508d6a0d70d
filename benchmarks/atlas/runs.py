"""One run of the atlas: `grpo_core.train` with an experiment's flags, and what is kept of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.atlas.evaluated import answered_before, evaluated, is_right
from benchmarks.atlas.experiments import Cell
from benchmarks.atlas.records import TRL
from benchmarks.atlas.starts import start_of
from benchmarks.fp16_on_cpu import FP16Products
from eval.evaluate import Answered, read_answers
from grpo_core.config import GRPOConfig
from grpo_core.job import prepare
from grpo_core.train import PRESETS, begin
from rewards.jsonl import read_jsonl
from sft_core.cli import parse_config
from sft_core.run.provenance import provenance
from sft_core.run.runlog import answers_of

TOGETHER = 5  # steps whose means are one point of a curve
# Means over the steps of a point: the name in the record, and the log's.
LOGGED = {
    "accuracy": "accuracy",
    "reward": "reward_mean",
    "entropy": "entropy",
    "length": "length_mean",
    "truncated": "truncated_share",
    "flat": "zero_variance_share",
    "kl": "kl",
    "gradient": "grad_norm",
}

Record = dict[str, Any]


def flags_of(cell: Cell, starts: Path, folder: Path) -> list[str]:
    """Of `python -m grpo_core.train`, for this run in `folder`."""
    start = start_of(cell.experiment.start, cell.seed, starts)
    return [*cell.experiment.flags, "--model", str(start), "--seed", str(cell.seed), "--output_dir", str(folder)]


def record_of(cell: Cell, work: Path) -> Record:
    """Take the run, keep its figures, delete its folder."""
    experiment, folder = cell.experiment, work / "running" / f"{cell.experiment.label}-{cell.seed}".replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flags = flags_of(cell, work / "starts", folder)
        config = parse_config(GRPOConfig, flags, PRESETS)
        began = time.process_time()
        # fp16's roundings at a bearable speed, on a CPU that lacks fp16 products.
        with FP16Products() if config.precision == "fp16" else contextlib.nullcontext():
            log, completions = trained_by_trl(config) if experiment.name == TRL else trained(config)
    about = provenance(cell.seed)
    record = {
        "task": experiment.task,
        "experiment": experiment.name,
        "seed": cell.seed,
        "question": experiment.question,
        "flags": experiment.flags,
        "change": list(experiment.change),
        "commit": about["commit"],
        "versions": ", ".join(f"{package} {number}" for package, number in about["versions"].items()),
        "processor": about["hardware"][0],
        "seconds": round(time.process_time() - began, 1),
        "before": held_out(folder, 0),
        "after": held_out(folder, config.max_steps),
        "curve": curve(log, completions),
    }
    shutil.rmtree(folder)
    return record


def trained(config: GRPOConfig) -> tuple[list[Record], list[Record]]:
    """This project's run: its log and its completions."""
    begun = begin(prepare(config))
    assert begun, "a run in a new folder is not finished"
    begun.folder.evaluations[0] = {"problems": answered_before(config), "seconds": 0.0}
    folder = begun.finish()
    if config.temperature != 1 or config.top_p < 1:  # by which the run has drawn its held-out answers, too
        evaluated(config, str(folder / "final"), config.max_steps)
    return read_jsonl(folder / "log.jsonl"), read_jsonl(folder / "completions.jsonl")


def trained_by_trl(config: GRPOConfig) -> tuple[list[Record], list[Record]]:
    from benchmarks.atlas.theirs import train_theirs  # TRL is an extra

    return train_theirs(config)


def held_out(folder: Path, step: int) -> Record:
    """The answers of an evaluation: a digit for each problem, and the samples' lengths."""
    answers = read_answers(answers_of(folder, step))
    samples = [sample for answer in answers for sample in answer.samples]
    return {
        "greedy": "".join(str(int(answer.strict)) for answer in answers),
        "sampled": "".join(str(_right(answer)) for answer in answers),
        "samples": len(answers[0].samples),
        "length": _mean(sample.tokens for sample in samples),
        "right_length": _mean(sample.tokens for sample in samples if sample.strict),
        "wrong_length": _mean(sample.tokens for sample in samples if not sample.strict),
        "truncated": _mean(sample.truncated for sample in samples),
    }


def _right(answer: Answered) -> int:
    return sum(sample.strict for sample in answer.samples)


def curve(log: Sequence[Record], completions: Sequence[Record]) -> Record:
    """What was logged and sampled in training, a point for each TOGETHER steps."""
    lines = [line for line in log if line["kind"] == "train"]
    ends = range(TOGETHER, lines[-1]["step"] + 1, TOGETHER)
    found: Record = {"step": list(ends)}
    for end in ends:
        of_point = [line for line in lines if end - TOGETHER < line["step"] <= end]
        rows = [row for row in completions if end - TOGETHER < row["step"] <= end]
        values = {name: _mean(line[logged] for line in of_point) for name, logged in LOGGED.items()}
        clipped = [line["clip_ratio_low"] + line["clip_ratio_high"] for line in of_point]
        values |= {"clipped": _mean(clipped), **lengths(rows)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        for name in rows[0]["rewards"]:
            found.setdefault("rewards", {}).setdefault(name, []).append(_mean(row["rewards"][name] for row in rows))
    return found


def lengths(rows: Sequence[Record]) -> Record:
    """Mean tokens of the right and of the wrong completions."""
    right = [row["tokens"] for row in rows if is_right(row)]
    wrong = [row["tokens"] for row in rows if not is_right(row)]
    return {"right_length": _mean(right), "wrong_length": _mean(wrong)}


def _mean(values: Iterable[float | None]) -> float | None:
    """To five digits; None where there is nothing, or something that is not finite."""
    known = [float(value) for value in values if value is not None]
    if not known or not all(map(math.isfinite, known)):
        return None
    return float(f"{math.fsum(known) / len(known):.5g}")


def append_record(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
