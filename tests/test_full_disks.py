"""A disk that is full when any file of a run is written, and files that are damaged afterwards: the run continues."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import grpo_core.train
import sft_core.run.runlog
from sft_core.run.checkpoint import checkpoints, set_aside
from sft_core.run.progress import Progress
from sft_core.run.runlog import RunFolder
from tests.faulty import FORKS, SFT, Action, command, dies, disk_takes, ended, fails, on_call, on_write
from tests.killing import differences, log
from tests.test_faults import (
    assert_goes_on,
    assert_one_clear_line,
    assert_whole_checkpoints,
    copied,
    emptied,
    torn,
)

pytestmark = FORKS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


# --- a disk that is really full


def test_a_disk_that_takes_no_more_of_any_file_of_a_checkpoint_ends_in_one_line(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    newest = begun[2] / "checkpoints" / "step-000002"
    for name in ("model.safetensors", "training/tensors.safetensors", "training/state.json", "manifest.json"):
        copied(begun[1], run)
        takes = disk_takes((newest / name).stat().st_size - 1)
        end = ended([*command(model, run), "--resume"], partial(on_call, Progress, "save", 1, takes))
        assert_one_clear_line(end, "step-000002 could not be written: ")
        assert [path.name for path in checkpoints(run)] == ["step-000001"]
        assert_whole_checkpoints(run)
        assert list(run.rglob("*.unfinished")) == []
    assert_goes_on(command(model, run), whole, run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip("this user may not mount a disk to fill")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("left", [0, 64])  # kilobytes
def test_a_full_disk_ends_in_one_line_with_the_checkpoint_before_intact(
    model: Path, whole: Path, begun: dict[int, Path], disk: Path, left: int
) -> None:
    run = disk / "run"
    copied(begun[1], run)

    def fill() -> None:
        free = shutil.disk_usage(disk).free
        with suppress(OSError):  # TensorBoard's thread has taken some of it in the meantime
            (disk / "filler").write_bytes(b"." * max(0, free - 1024 * left))

    argv = [*command(model, run), "--resume"]
    end = ended(argv, lambda: on_call(Progress, "save", 1, fill))
    assert_one_clear_line(end, f"{run}/checkpoints/step-000002 could not be written: ", "No space left on device")
    assert [path.name for path in checkpoints(run)] == ["step-000001"]
    assert_whole_checkpoints(run)
    assert f"saved: {run}/checkpoints/step-000001; go on with --resume {run}" in end.text
    # Before there is room again the next try ends in one line as well, wherever it comes to.
    assert_one_clear_line(ended(argv), "could not be written: ")
    (disk / "filler").unlink()
    assert_goes_on(argv[:-1], whole, run)


# --- the other files of a run


def when_written(name: str, number: int, act: Action) -> Action:
    """`act` as soon as the `number`-th write of the file begins."""

    def before() -> None:
        seen = 0
        for module in (sft_core.run.runlog, grpo_core.train):
            for function in ("append_jsonl", "write_text", "write_whole"):
                if not hasattr(module, function):
                    continue
                own = getattr(module, function)

                def wrapped(path: Path, *args: object, own: Callable[..., object] = own) -> object:
                    nonlocal seen
                    seen += path.name == name
                    if path.name == name and seen == number:
                        act()
                    return own(path, *args)

                setattr(module, function, wrapped)

    return before


PLACES = {
    "config.yaml": 1,
    "provenance.json": 1,
    "log.jsonl": 3,
    "completions.jsonl": 2,
    "tokens.jsonl": 2,
    "step-000000.jsonl": 1,
    "step-000003.jsonl": 1,
    "summary.json": 1,
    "final": 1,
}


@pytest.mark.parametrize("name", PLACES)
def test_a_disk_that_is_full_when_another_file_is_written_ends_in_one_line_too(
    model: Path, whole: Path, run: Path, name: str
) -> None:
    def full() -> None:
        there = (run / name).stat().st_size if (run / name).is_file() else 0
        disk_takes(there + 20)()

    end = ended(command(model, run), when_written(name, PLACES[name], full))
    assert_one_clear_line(end, f"{name} could not be written: ")
    assert_whole_checkpoints(run)
    assert_goes_on(command(model, run), whole, run)


# Those that --resume reads or cuts; a full disk, above, leaves a torn line of every file.
@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "step-000003.jsonl", "final"])
def test_a_kill_when_another_file_is_written_loses_nothing(model: Path, whole: Path, run: Path, name: str) -> None:
    assert ended(command(model, run), when_written(name, PLACES[name], dies)).code == 9
    assert_goes_on(command(model, run), whole, run)


def test_a_run_folder_that_cannot_be_made_is_one_line(model: Path, run: Path) -> None:
    end = ended(command(model, run), lambda: on_write(RunFolder, "__init__", 1, fails(errno.ENOSPC)))
    assert_one_clear_line(end, f"{run} could not be written: ")


def test_the_built_in_models_weights_on_a_full_disk_are_one_line(run: Path) -> None:
    argv = ["--preset", "tiny", "--output_dir", str(run), "--max_steps", "1", "--no_progress"]
    end = ended(argv, lambda: on_call(sft_core.train, "build_tiny", 1, disk_takes(5000)), sft_core.train.main)
    assert_one_clear_line(end, f"{run}/base could not be written: ")


@pytest.mark.parametrize("damage", [torn, emptied])
def test_logs_that_have_lost_their_end_are_named_and_the_run_continues(
    damage: Callable[[Path], None], model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    copied(begun[2], run)
    damage(run / "log.jsonl")
    end = ended([*command(model, run), "--resume"])
    assert end.code == 0 and f"{run}/log.jsonl has lost " in end.text
    assert set(differences(whole, run)) == {"log.jsonl", "tensorboard"}
    # No evaluation is made up for with the weights of a later step.
    assert all(line in log(whole) for line in log(run))


def test_a_log_line_that_is_not_json_is_one_line_that_names_it(model: Path, begun: dict[int, Path], run: Path) -> None:
    copied(begun[2], run)
    path = run / "log.jsonl"
    path.write_bytes(b"#" + path.read_bytes()[1:])
    end = ended([*command(model, run), "--resume"])
    assert end.code == 2 and end.errors == [
        f"error: {path}, line 1: is not JSON; the run can go on without the line"
    ], end.text


@pytest.mark.parametrize("damage", [torn, Path.unlink])
def test_damaged_answers_cost_the_comparison_alone(
    damage: Callable[[Path], None], model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    copied(begun[2], run)
    damage(run / "heldout" / "step-000000.jsonl")
    end = ended([*command(model, run), "--resume"])
    assert (
        end.code == 0 and f"no comparison with step 0: {run}/heldout/step-000000.jsonl is damaged or gone" in end.text
    )
    assert differences(whole, run) == ["heldout/step-000000.jsonl"]


def test_sft_resumes_after_an_error_and_a_kill_too(model: Path, run: Path) -> None:
    program = sft_core.train.main
    whole = run.with_name("whole")
    assert ended(command(model, whole, own=SFT), program=program).code == 0
    argv = command(model, run, own=SFT)
    for number in (1, 8):
        shutil.rmtree(run, ignore_errors=True)
        end = ended(argv, partial(on_write, Progress, "save", number, fails()), program)
        assert_one_clear_line(end, "step-000001 could not be written: ")
        end = ended([*argv, "--resume"], lambda: on_call(Progress, "save", 2, dies), program)
        assert end.code == 9
        assert ended([*argv, "--resume"], program=program).code == 0
        assert [name for name in differences(whole, run) if name != "completions.jsonl"] == []


def test_setting_aside_replaces_what_was_set_aside_before(begun: dict[int, Path], run: Path) -> None:
    copied(begun[2], run)
    first, second = checkpoints(run)
    set_aside(second)
    shutil.copytree(first, second)
    assert set_aside(second).name == "step-000002.set-aside"
    assert checkpoints(run) == [first]
