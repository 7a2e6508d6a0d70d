"""Who may write to a run folder, what is deleted there, and what --resume takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import grpo_core.step
import grpo_core.train
import sft_core.run.checkpoint
from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.config import FREE_ON_RESUME
from sft_core.run.checkpoint import checkpoints, step_of
from sft_core.run.progress import Progress
from tests.faulty import FORKS, STEPS, Ended, command, dies, ended, fails, on_call
from tests.helpers import PEFT_IS_BEHIND, message_of, tiny_model
from tests.killing import child, differences

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), FORKS]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_refused(end: Ended, *parts: str) -> None:
    assert end.code == 2, end.text
    assert len(end.errors) == 1 and "Traceback" not in end.text, end.text
    for part in parts:
        assert part in end.errors[0], end.errors[0]


# --- one process, one run


@pytest.fixture
def at_work(model: Path, tmp_path: Path) -> Iterator[Path]:
    """A run folder that a process is at work in: it waits in its third step."""
    run = tmp_path / "busy"
    before = partial(on_call, grpo_core.step, "score_groups", 3, lambda: time.sleep(100))

    def program(argv: Any) -> None:
        before()
        grpo_core.train.main(argv)

    pid = child(program, command(model, run), tmp_path / "out.txt")
    end = time.monotonic() + 60
    while len(checkpoints(run)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    yield run
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_process_is_refused_and_touches_nothing(at_work: Path, model: Path) -> None:
    before = contents(at_work)
    for flag in ("--resume", "--overwrite"):
        assert_refused(
            ended(command(model, at_work, flag)),
            f"--output_dir {at_work}: another process is writing to this run folder",
        )
        assert contents(at_work) == before


def test_after_kill_9_the_lock_is_free(model: Path, whole: Path, run: Path) -> None:
    assert ended(command(model, run, "--resume")).code == 0
    assert differences(whole, run) == []


def test_a_file_system_without_locks_gets_a_message_and_the_run_continues(model: Path, whole: Path, run: Path) -> None:
    end = ended(command(model, run, "--resume"), lambda: on_call(__import__("fcntl"), "flock", 1, fails()))
    assert end.code == 0 and f"{run} cannot be locked on this file system" in end.text
    assert differences(whole, run) == []


# --- a folder that holds something


def test_a_run_is_neither_resumed_nor_deleted_without_its_flag(model: Path, run: Path) -> None:
    before = contents(run)
    end = ended(command(model, run))
    assert_refused(end, f"--output_dir {run}: ", "which --overwrite deletes and --resume goes on with")
    assert contents(run) == before


def test_overwrite_deletes_the_run_and_no_file_of_anybody_else(model: Path, whole: Path, run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "mine").mkdir()
    (run / "mine" / "model.safetensors").write_text("mine too")
    (run / "heldout" / "step-000002.jsonl").write_text("of the old run\n")
    end = ended(command(model, run, "--overwrite", "--keep_last", "1"))
    assert end.code == 0, end.text
    assert differences(whole, run) == []
    assert not (run / "heldout" / "step-000002.jsonl").exists()
    assert [step_of(path) for path in checkpoints(run)] == [STEPS]
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "mine" / "model.safetensors").read_text() == "mine too"


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.yaml", "checkpoints/best.ckpt"], ["log.jsonl"]])
@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_with_other_peoples_files_is_refused_under_every_flag(
    names: list[str], flag: list[str], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("seed: 1\n")
    before = contents(folder)
    message = message_of([*command(model, folder), *flag])
    assert message.startswith(f"--output_dir {folder}: expected a folder that is new or empty, or holds a run")
    assert contents(folder) == before


@pytest.mark.parametrize("write", [1, 2, 3, 4])
@pytest.mark.parametrize("flag", [[], ["--resume"]])
def test_a_run_killed_while_it_writes_its_first_files_can_be_started_again(
    write: int, flag: list[str], model: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # config.yaml and provenance.json: each goes to disk as a file, then as an entry of its folder.
    assert ended(command(model, run), partial(on_call, sft_core.run.checkpoint, "to_disk", write, dies)).code == 9
    assert not (run / "log.jsonl").exists()
    again = flag or ["--overwrite"] * (run / "config.yaml").exists()
    end = ended(command(model, run, *again))
    assert end.code == 0, end.text
    assert differences(whole, run) == []


# --- the forms of --resume


@pytest.mark.parametrize("form", ["bare", "run", "run with its folder", "checkpoint", "relative"])
def test_every_form_of_resume_comes_to_the_same_end(form: str, model: Path, whole: Path, run: Path) -> None:
    short = ["--no_progress", "--resume"]
    argv = {
        "bare": command(model, run, "--resume"),
        "run": [*short, str(run)],
        "run with its folder": [*short, str(run), "--output_dir", str(run)],
        "checkpoint": [*short, str(run / "checkpoints" / "step-000002")],
        "relative": [*short, os.path.relpath(run)],
    }[form]
    end = ended(argv)
    assert end.code == 0, end.text
    assert differences(whole, run) == []


def test_an_earlier_checkpoint_that_is_named_sets_the_later_ones_aside(model: Path, whole: Path, run: Path) -> None:
    first, second = checkpoints(run)
    kept = contents(second)
    end = ended(["--no_progress", "--keep_last", "0", "--resume", str(first)])
    assert end.code == 0, end.text
    assert f"{second} is later: it is set aside as step-000002.set-aside" in end.text
    assert differences(whole, run) == []
    assert contents(second.with_name("step-000002.set-aside")) == kept
    assert [step_of(path) for path in checkpoints(run)] == [1, 2, 3]


def test_a_bare_resume_of_a_new_folder_begins_the_run(model: Path, whole: Path, tmp_path: Path) -> None:
    end = ended(command(model, tmp_path / "new", "--resume"))
    assert end.code == 0 and "begins anew" not in end.text, end.text
    assert differences(whole, tmp_path / "new") == []


def test_what_resume_cannot_take_is_one_line_that_says_so(model: Path, run: Path, tmp_path: Path) -> None:
    other, step = tmp_path / "other", run / "checkpoints" / "step-000002"
    aside = shutil.copytree(step, step.with_name("step-000002.set-aside"))
    before = contents(run)
    refusals = {
        ("--resume",): "--resume newest: expected --output_dir as well, or --resume RUN",
        ("--resume", str(run), "--output_dir", str(other)): f"--resume {run}: is not in --output_dir {other}; ",
        ("--resume", str(other)): f"--resume {other}: {other} holds no run",
        ("--resume", str(run / "checkpoints")): f"--resume {run}/checkpoints: {run}/checkpoints holds no run",
        ("--resume", str(step.with_name("step-000007"))): f"no such checkpoint; --resume {run} takes the newest",
        ("--resume", str(aside)): f"no such checkpoint; --resume {run} takes the newest",
        ("--resume", str(run), "--overwrite"): "either --overwrite (start again) or --resume (continue)",
    }
    for argv, part in refusals.items():
        assert part in message_of(list(argv))
    assert contents(run) == before and not other.exists()


def test_a_damaged_checkpoint_that_is_named_is_refused_with_its_file(run: Path) -> None:
    first, second = checkpoints(run)
    (second / "model.safetensors").write_bytes(b"")
    before = contents(run)
    end = ended(["--no_progress", "--resume", str(second)])
    assert_refused(end, f"--resume {second}: is damaged (model.safetensors has 0 bytes; ", "takes the one before")
    assert contents(run) == before


CHANGED = {"lr": "0.5", "group_size": "4", "seed": "1", "beta": "0.5", "task": "gsm8k"}
FREE = {"save_every": "7m", "keep_last": "0", "eval_every": "5", "log_every": "9", "tensorboard": "False"}
FREE |= {
    "micro_batch": "0",
    "memory": "2GB",
    "reward_timeout": "9",
    "eval_batch_size": "5",
    "progress": "False",
    "show_every": "0",
}
FREE |= {"eval_samples": "3", "offload_optimizer": "cpu", "keep_freed_memory": "False", "max_skipped": "9"}
FREE |= {"deterministic": "True", "vllm_memory": "0.5"}
FREE |= {"device": "cpu", "precision": "bf16", "track": "wandb"}  # tests/test_resume.py: `auto` may find another one
FREE |= {
    "max_steps": "7",
    "epochs": "2.0",
    "push_to_hub": "me/model",
    "private": "True",
    "record_tokens": "False",
    "rank_timeout": "60",
    "parallel": "ddp",
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_value_is_refused_with_both(name: str, run: Path) -> None:
    begun = yaml.safe_load((run / "config.yaml").read_text())[name]
    message = message_of(["--resume", str(run), f"--{name}", CHANGED[name]])
    assert message.startswith(f"--{name} {CHANGED[name]}: the run in {run} was begun with {begun}, ")


def test_every_setting_that_moves_no_number_may_change(run: Path) -> None:
    assert {*FREE, "output_dir", "resume", "overwrite", "dry_run"} == set(FREE_ON_RESUME)
    config = parse_config(GRPOConfig, ["--resume", str(run), *(f"--{name}={value}" for name, value in FREE.items())])
    assert {name: str(getattr(config, name)) for name in FREE} == {**FREE, "reward_timeout": "9.0"}


def test_a_finished_run_is_left_as_it_is(model: Path, whole: Path) -> None:
    before = contents(whole)
    for argv in (command(model, whole, "--resume"), ["--resume", str(whole)]):
        end = ended(argv)
        assert end.code == 0 and f"this run is finished: {whole / 'final'}" in end.text
        assert contents(whole) == before


# --- what the run was begun with has changed


def test_a_task_file_that_has_changed_is_refused_and_nothing_touched(model: Path, tmp_path: Path) -> None:
    run, task = tmp_path / "run", tmp_path / "task.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command(model, run, "--task", str(task))
    assert ended(argv, partial(on_call, Progress, "save", 2, dies, True)).code == 9
    before = contents(run)
    task.write_text("".join(json.dumps(row) + "\n" for row in [*rows[1:], rows[0]]))
    first = str(run / "checkpoints" / "step-000001")
    for again in ([*argv, "--resume"], ["--resume", first]):
        assert_refused(ended(again), f"--resume {run}: the task is not what it was when the run began")
        assert contents(run) == before


@pytest.mark.parametrize("flags", [["--beta", "0.1"], ["--lora", "--lora_r", "2"]])
def test_weights_below_an_adapter_or_of_a_reference_that_have_changed_are_refused(
    flags: list[str], model: Path, tmp_path: Path
) -> None:
    run, start = tmp_path / "run", tmp_path / "start"
    shutil.copytree(model, start)
    argv = command(start, run, *flags)
    assert ended(argv, partial(on_call, Progress, "save", 1, dies, True)).code == 9
    before = contents(run)
    tiny_model(seed=1).save_pretrained(start)
    assert_refused(ended([*argv, "--resume"]), f"--resume {run}: the model is not what it was when the run began")
    assert contents(run) == before


# --- the table of faults


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (tests.parent / "docs" / "faults.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"\ndef {test}(" in (tests / file).read_text(), f"{file}::{test}"
