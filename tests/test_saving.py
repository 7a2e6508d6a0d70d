"""When a run is saved, what is kept, and what is written down of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

import sft_core.train
from grpo_core.config import GRPOConfig
from sft_core.config import PASSING
from sft_core.run.checkpoint import checkpoints, step_of
from sft_core.run.progress import Progress
from tests.faulty import FORKS, SFT, command, dies, ended, on_call
from tests.helpers import PEFT_IS_BEHIND, message_of
from tests.killing import differences, log, shown
from tests.test_run_folder import assert_refused

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), FORKS]


# --- when is saved, what is kept


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--save_every", "1"], [2, 3]),
        (["--save_every", "1", "--keep_last", "1"], [3]),
        (["--save_every", "1", "--keep_last", "0"], [1, 2, 3]),
        (["--save_every", "2"], [2, 3]),
        (["--save_every", "0"], []),
        (["--save_every", "10m"], [3]),
        (["--save_every", "0.0001m", "--keep_last", "0"], [1, 2, 3]),  # 6 milliseconds, less than a step
    ],
)
def test_checkpoints_are_written_and_kept_as_asked(
    flags: list[str], kept: list[int], model: Path, whole: Path, tmp_path: Path
) -> None:
    assert ended(command(model, tmp_path / "run", *flags)).code == 0
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == kept
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.parametrize("value", ["-1", "1.5", "10s", "m", "", "1e3", "10 m", "nanm", "٣"])
def test_a_malformed_interval_is_refused_in_one_line(value: str, model: Path, tmp_path: Path) -> None:
    message = message_of(command(model, tmp_path / "run", f"--save_every={value}"))
    assert message == f"--save_every {value}: expected a number of steps (100) or of minutes (10m)"


def test_what_a_kill_has_left_unfinished_is_deleted_when_the_next_checkpoint_is_written(model: Path, run: Path) -> None:
    left = run / "checkpoints" / "step-000099.unfinished"
    left.mkdir()
    assert ended(command(model, run, "--resume")).code == 0
    assert not left.exists()


# --- what is written down


def test_provenance_lists_every_resume(model: Path, begun: dict[int, Path], run: Path) -> None:
    first = json.loads((begun[2] / "provenance.json").read_text())
    argv = command(model, run, "--resume", "--keep_last", "0")
    assert ended(argv, partial(on_call, Progress, "save", 1, dies, True)).code == 9
    assert ended(argv).code == 0
    now = json.loads((run / "provenance.json").read_text())
    resumed = now.pop("resumed")
    assert now == first
    assert [each["after_step"] for each in resumed] == [2, 3]
    assert all(each.keys() == {"after_step", *first} for each in resumed)


def test_the_config_is_the_runs_and_not_the_commands(begun: dict[int, Path]) -> None:
    text = (begun[2] / "config.yaml").read_text()
    values = yaml.safe_load(text)
    assert set(PASSING).isdisjoint(values)
    assert {*values, *PASSING} == set(GRPOConfig.__dataclass_fields__)


def test_log_and_tensorboard_show_no_step_twice(model: Path, whole: Path, run: Path) -> None:
    for _ in range(2):  # in the third step, its log line written and no checkpoint
        ends = partial(on_call, Progress, "completed", 1, dies)
        assert ended(command(model, run, "--resume"), ends).code == 9
        assert [line["step"] for line in log(run) if line["kind"] == "train"] == [1, 2, 3]
    assert ended(command(model, run, "--resume")).code == 0
    assert [line["step"] for line in log(run) if line["kind"] == "train"] == [1, 2, 3]
    curves = shown(run)
    assert [step for step, _ in curves["train/reward_mean"]] == [1, 2, 3]
    assert curves == shown(whole)


@pytest.mark.parametrize("places", [["", "cpu", "HERE"], ["HERE", "", "cpu"], ["cpu", "HERE", ""]])
def test_the_optimizers_moments_may_move_between_resumes(
    places: list[str], model: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for count, place in enumerate(places):
        where = ["--offload_optimizer", str(tmp_path) if place == "HERE" else place] if place else []
        stops = partial(on_call, Progress, "save", 1, dies, True) if count < 2 else None
        end = ended(command(model, run, *where, "--resume"), stops)
        assert end.code == (9 if stops else 0), end.text
    assert differences(whole, run) == []


def test_grpo_does_not_resume_an_sft_run(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends = partial(on_call, Progress, "save", 1, dies, True)
    assert ended(command(model, run, own=SFT), ends, sft_core.train.main).code == 9
    assert_refused(ended(["--resume", str(run)]), f"--config {run}/config.yaml: unknown key ")
