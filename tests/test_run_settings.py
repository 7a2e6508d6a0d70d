"""What settings do to a whole run, what repeats it, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo_core.job
import grpo_core.reference
import grpo_core.train
import grpo_core.warmstart
from grpo_core.reference import Reference
from sft_core.learn.optim import Optimizer
from tests.helpers import PEFT_IS_BEHIND
from tests.runs import (
    STEPS,
    G,
    Run,
    grpo,
    same,
    weights,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# --- repeating


def test_the_resolved_config_repeats_the_run_completion_for_completion_and_bit_for_bit(
    recorded: Run, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    grpo_core.train.main(["--config", str(recorded.path / "config.yaml"), "--output_dir", str(out)])
    again = Run(out, "")
    assert (out / "config.yaml").read_text() == (recorded.path / "config.yaml").read_text()
    assert again.completions == recorded.completions
    assert same(weights(out / "final"), weights(recorded.path / "final"))
    measured = {"timestamp_iso", *(name for name in recorded.train[0] if name.endswith("_s"))}
    for line, first in zip(again.train, recorded.train, strict=True):
        assert {k: v for k, v in line.items() if k not in measured} == {
            k: v for k, v in first.items() if k not in measured
        }


def test_another_seed_is_another_run(recorded: Run, start: list[str], tmp_path: Path) -> None:
    other = grpo(tmp_path / "run", *start, "--max_steps", "1", "--seed", "7")
    first = [row for row in recorded.completions if row["step"] == 1]
    assert [row["question"] for row in other.completions] != [row["question"] for row in first]
    assert [row["response"] for row in other.completions] != [row["response"] for row in first]
    assert other.train[0]["seed"] == 7


def test_evaluating_in_between_with_samples_or_without_does_not_change_what_is_learned(
    recorded: Run, start: list[str], tmp_path: Path
) -> None:
    plain = grpo(tmp_path / "run", *start, "--max_steps", str(STEPS), "--beta", "0.1", "--log_every", "4")
    assert plain.completions == recorded.completions
    assert same(weights(plain.path / "final"), weights(recorded.path / "final"))
    assert [line["step"] for line in plain.train] == [4, STEPS]  # every fourth one, and the last
    assert [line["step"] for line in plain.eval] == [0, STEPS]
    assert [path.name for path in (plain.path / "checkpoints").iterdir()] == [f"step-{STEPS:06d}"]


# --- settings


def test_epochs_give_the_steps_where_max_steps_does_not(start: list[str], tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--max_samples", "5", "--no_tensorboard"]
    run = grpo(tmp_path / "run", *start[:4], "--eval_problems", "0", *flags)
    assert [line["step"] for line in run.train] == [1, 2, 3]  # 5 problems, 2 a step
    asked = [row["question"] for row in run.completions[::G]]
    assert len(set(asked[:5])) == 5
    assert run.eval == [] and not (run.path / "summary.json").exists() and not (run.path / "tensorboard").exists()


def test_beta_0_holds_no_reference(start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Reference] = []

    class Counted(Reference):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(grpo_core.reference, "Reference", Counted)
    without = grpo(tmp_path / "without", *start, "--max_steps", "2", "--beta", "0")
    assert made == [] and [line["kl"] for line in without.train] == [0, 0]
    grpo(tmp_path / "with", *start, "--max_steps", "1", "--beta", "0.1")
    assert len(made) == 1


def test_the_kl_is_0_at_step_1_and_grows_when_the_weights_move(recorded: Run) -> None:
    assert recorded.train[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert recorded.train[-1]["kl"] > 1e-6


def test_fp16_runs_under_a_grad_scaler_over_float32_weights(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers: list[Optimizer] = []

    class Kept(Optimizer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            optimizers.append(self)

    monkeypatch.setattr(grpo_core.job, "Optimizer", Kept)
    run = grpo(tmp_path / "run", *start, "--eval_problems", "0", "--max_steps", "2", "--precision", "fp16")
    [optimizer] = optimizers
    assert optimizer.scaler.is_enabled()
    assert all(p.dtype == torch.float32 for p in optimizer.parameters)
    assert all(0 < line["grad_norm"] < 1e4 and line["skipped_steps"] == 0 for line in run.train)
    # Sampler and learner compute the same distribution in the same half precision: they differ by its rounding alone.
    assert all(line["sampler_gap_max"] < 0.05 for line in run.train)
    assert AutoModelForCausalLM.from_pretrained(run.path / "final").dtype == torch.float32


def test_five_gradients_in_a_row_that_are_not_finite_end_the_run_and_all_are_in_the_log(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(None)
        return torch.tensor(1.0 if len(calls) == 3 else float("nan"))  # a good one begins the count in a row anew

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    monkeypatch.setattr(Optimizer, "_rows_at_fault", lambda *_: [])  # tests/test_lost_numbers.py
    with pytest.raises(SystemExit) as caught:
        grpo(tmp_path / "run", *start, "--eval_problems", "0", "--max_steps", "20")
    assert caught.value.code == 1
    lines = Run(tmp_path / "run", "").train
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2, 3, 4, 5, 6, 7]
    assert [line["grad_norm"] for line in lines] == [None, None, 1.0] + [None] * 5
    saved = tmp_path / "run" / "checkpoints" / "step-000008"
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == f"saved: {saved}; go on with --resume {tmp_path / 'run'}"
    assert said[-1].startswith("error: 5 steps in a row had a loss or gradient that is not finite")
