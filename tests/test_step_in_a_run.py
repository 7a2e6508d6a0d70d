"""The run around the step: dropout, the reference, the schedule, further prompts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import grpo_core.job
import grpo_core.reference
import grpo_core.train
from grpo_core.step import grpo_step
from sft_core.model.policy import Policy
from sft_core.text.tasks import load_task
from tests.helpers import (
    PEFT_IS_BEHIND,
    grpo_config,
    tiny_policy,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# --- the run around the step ---


def train_lines(tmp_path: Path, **fields: Any) -> list[dict[str, Any]]:
    """The log of a run, of one step unless `fields` say otherwise, on a GPT-2 with dropout."""
    tiny_policy("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).save(tmp_path / "model")
    arithmetic = {"task": "arithmetic", "difficulty": 1, "eval_problems": 2, "max_steps": 1, "max_prompt_tokens": 64}
    quiet = {"progress": False, "tensorboard": False, "show_every": 0, "output_dir": str(tmp_path / "run")}
    config = grpo_config(model=str(tmp_path / "model"), **(arithmetic | quiet | fields))
    config.check()
    folder = grpo_core.train.run(grpo_core.job.prepare(config))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_run_turns_dropout_off_in_policy_and_reference(tmp_path: Path) -> None:
    (line,) = train_lines(tmp_path, beta=0.1, gradient_checkpointing=True)
    assert line["sampler_gap_max"] < 1e-5
    assert line["kl"] == 0


def test_a_run_holds_no_reference_at_beta_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self, policy: Policy) -> None:
            raise AssertionError("a reference was made")

    monkeypatch.setattr(grpo_core.reference, "Reference", Refused)
    assert train_lines(tmp_path, beta=0.0)[0]["kl"] == 0


@pytest.mark.parametrize("mu", [1, 2])
def test_the_schedule_spans_the_run_however_many_updates_a_step_takes(mu: int, tmp_path: Path) -> None:
    lines = train_lines(tmp_path, mu=mu, max_steps=4, lr=1e-3, lr_schedule="linear", eval_problems=0)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize(("attempts", "replaced"), [(0, 0), (2, 4)])
def test_a_run_draws_further_prompts_where_dynamic_sampling_asks_for_them(
    attempts: int, replaced: int, tmp_path: Path
) -> None:
    """An untrained model is never right: both groups of a step are equal, and so are all that replace them."""
    lines = train_lines(tmp_path, dynamic_sampling=attempts, max_steps=2)
    assert [line["replaced_groups"] for line in lines] == [replaced] * 2
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    questions = list(dict.fromkeys(record["question"] for record in records))
    task = load_task(grpo_config(task="arithmetic", difficulty=1, eval_problems=2), seed=42)
    walk = [example.question for example in task.draw(0, 4 + 2 * replaced, 42)]
    # Each step's last two draws are what it learns.
    assert questions == [*walk[replaced : replaced + 2], *walk[2 * replaced + 2 : 2 * replaced + 4]]


@pytest.mark.parametrize("every", [0, 1])
def test_a_runs_reference_follows_where_asked(every: int, tmp_path: Path) -> None:
    moving = {"lr": 1e-2, "entropy_coef": 1.0, "max_steps": 3}  # an untrained model earns nothing
    lines = train_lines(tmp_path, beta=0.1, ref_sync_every=every, ref_sync_mix=1.0, **moving)
    assert lines[0]["kl"] == 0
    assert all((line["kl"] == 0) == (every == 1) for line in lines[1:])


def test_the_training_step_fits_on_a_screen() -> None:
    """60 lines of at most 120 characters, its docstring within: what an editor shows at once."""
    lines = inspect.getsource(grpo_step).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
