"""--resume RUN --max_steps MORE: a run that gets another end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

import grpo_core.train
import sft_core.run.longer
import sft_core.train
from sft_core.run.checkpoint import NotSaved, checkpoints
from sft_core.run.progress import Progress
from tests.faulty import FORKS, GRPO, SFT, STEPS, command, dies, ended, on_call, save_start
from tests.helpers import PEFT_IS_BEHIND
from tests.killing import Program, differences, log
from tests.test_run_folder import assert_refused, contents

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), FORKS]

MORE = 2 * STEPS
TWICE = ["--no_progress", "--max_steps", str(MORE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start"))


def answered(run: Path) -> list[str]:
    """The evaluations whose answers are there."""
    return sorted(path.name for path in run.glob("heldout/*"))


def rates(run: Path) -> dict[int, float]:
    """The learning rate of each step."""
    return {line["step"]: line["learning_rate"] for line in log(run) if line["kind"] == "train"}


@pytest.mark.parametrize("program", [grpo_core.train.main, sft_core.train.main])
def test_a_finished_run_made_longer_is_the_longer_run_to_the_bit(program: Program, model: Path, tmp_path: Path) -> None:
    own = SFT if program is sft_core.train.main else GRPO

    def argv(name: str, *more: str) -> list[str]:
        return command(model, tmp_path / name, "--eval_every", "2", "--lr_schedule", "constant", *more, own=own)

    whole = ended(argv("whole", "--max_steps", str(MORE)), program=program)
    short = ended(argv("short", "--save_every", "5m"), program=program)
    assert whole.code == short.code == 0, short.text
    longer = ended(["--resume", str(tmp_path / "short"), *TWICE], program=program)
    assert longer.code == 0 and "learning rate" not in longer.text, longer.text
    assert differences(tmp_path / "whole", tmp_path / "short") == []
    assert answered(tmp_path / "short") == answered(tmp_path / "whole")
    again = ended(["--resume", str(tmp_path / "short"), "--no_progress"], program=program)
    assert again.code == 0 and "this run is finished" in again.text
    assert yaml.safe_load((tmp_path / "short" / "config.yaml").read_text())["max_steps"] == MORE


def test_a_schedule_that_falls_goes_on_as_the_longer_run_and_the_jump_is_told(model: Path, tmp_path: Path) -> None:
    for name, steps in (("whole", MORE), ("short", STEPS)):
        assert ended(command(model, tmp_path / name, "--lr_schedule", "linear", "--max_steps", str(steps))).code == 0
    end = ended(["--resume", str(tmp_path / "short"), *TWICE])
    assert "the learning rate jumps from 0 to 0.005" in end.text, end.text
    assert {step: rates(tmp_path / "short")[step] for step in range(STEPS + 1, MORE + 1)} == {
        step: rates(tmp_path / "whole")[step] for step in range(STEPS + 1, MORE + 1)
    }


def test_a_run_counted_in_epochs_takes_more_of_them(model: Path, tmp_path: Path) -> None:
    task, run = tmp_path / "task.jsonl", tmp_path / "run"
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--task", str(task), "--eval_problems", "0", "--max_steps", "0", "--epochs", "1"]
    assert ended(command(model, run, *given)).code == 0
    end = ended(["--resume", str(run), "--no_progress", "--epochs", "2"])
    assert end.code == 0 and max(rates(run)) == 4, end.text


def test_a_finished_run_without_a_checkpoint_is_refused_and_left_as_it_is(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(command(model, run, "--save_every", "0")).code == 0 and not checkpoints(run)
    before = contents(run)
    end = ended(["--resume", str(run), *TWICE])
    assert_refused(end, f"{run} is finished and holds no checkpoint to go on from", f"--model {run / 'final'}")
    assert contents(run) == before


def test_fewer_steps_than_are_done_are_refused(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(command(model, run)).code == 0
    before = contents(run)
    end = ended(["--resume", str(run), "--no_progress", "--max_steps", "1"])
    assert_refused(end, f"step-{STEPS:06d} is past the 1 steps that are asked for")
    assert contents(run) == before


@pytest.mark.parametrize(("after", "steps"), [(False, STEPS), (True, MORE)], ids=["before", "after"])
def test_a_kill_when_the_new_end_is_written_leaves_the_old_run_or_the_longer_one(
    after: bool, steps: int, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert ended(command(model, run)).code == 0
    weights = (run / "final" / "model.safetensors").read_bytes()
    killed = ended(["--resume", str(run), *TWICE], partial(on_call, sft_core.run.longer, "write_text", 1, dies, after))
    assert killed.code == 9, killed.text
    assert ended(["--resume", str(run), "--no_progress"]).code == 0
    assert max(rates(run)) == steps
    assert ((run / "final" / "model.safetensors").read_bytes() == weights) == (steps == STEPS)


def full() -> None:
    raise NotSaved("no space left")


def test_where_only_the_last_checkpoint_finds_no_room_the_final_model_is_saved(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    end = ended(command(model, run, "--save_every", "5m"), partial(on_call, Progress, "save", 1, full))
    assert end.code == 0 and "no checkpoint of the last step" in end.text, end.text
    assert (run / "final" / "model.safetensors").is_file() and not checkpoints(run)
