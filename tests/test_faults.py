"""Writing goes wrong at every place in turn: a run goes on all the same, and ends as if nothing had happened."""

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
from sft_core.run.checkpoint import Damaged, checkpoints, set_aside, verify
from sft_core.run.progress import Progress
from sft_core.run.runlog import RunFolder
from tests.faulty import FORKS, SFT, Action, Ended, command, dies, disk_takes, ended, fails, on_call, on_write
from tests.killing import differences, log

pytestmark = FORKS

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "training/tensors.safetensors",
    "training/state.json",
    "manifest.json",
]


@pytest.fixture(scope="module")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run, killed after one checkpoint and after two."""
    runs = {}
    for count in (1, 2):
        runs[count] = tmp_path_factory.mktemp("begun") / "run"
        assert ended(command(model, runs[count]), partial(on_call, Progress, "save", count, dies, True)).code == 9
        assert [int(path.name[-6:]) for path in checkpoints(runs[count])] == list(range(1, count + 1))
    return runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def copied(begun: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(begun, run)


def writes(argv: list[str], owner: type, name: str, note: Path) -> list[str]:
    """Every write of the first call of `owner.name`."""
    note.unlink(missing_ok=True)
    assert ended(argv, lambda: on_write(owner, name, 0, dies, note)).code == 0
    return note.read_text().splitlines()


def of_every_kind(names: list[str], *kinds: str) -> list[int]:
    """The places of the first and the last write of each kind (open, fsync, os.rename, ...), or of these alone."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names, 1):
        found.setdefault(name.split()[0], []).append(number)
    return sorted({places[i] for kind, places in found.items() if not kinds or kind in kinds for i in (0, -1)})


def assert_one_clear_line(end: Ended, *parts: str) -> None:
    assert end.code == 1, end.text
    assert len(end.errors) == 1 and "Traceback" not in end.text, end.text
    for part in parts:
        assert part in end.errors[0]


def assert_whole_checkpoints(run: Path) -> None:
    for folder in checkpoints(run):
        verify(folder)


def assert_goes_on(argv: list[str], whole: Path, run: Path) -> Ended:
    """--resume brings the run to the end that it would have come to undisturbed."""
    end = ended(argv if "--resume" in argv else [*argv, "--resume"])
    assert end.code == 0, end.text
    assert differences(whole, run) == []
    assert list(run.rglob("*.unfinished")) == []
    return end


# --- writes of a checkpoint: an error, and then a kill


def test_an_error_and_a_kill_at_every_kind_of_write_of_a_checkpoint_lose_nothing(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    argv = [*command(model, run), "--resume"]
    copied(begun[1], run)
    names = writes(argv, Progress, "save", run.parent / "note")
    assert names.count("fsync") >= len(FILES) and names.count("serialize_file") == 2
    for number in of_every_kind(names):
        copied(begun[1], run)
        error = (errno.EIO, errno.ENOSPC)[number % 2]
        end = ended(argv, partial(on_write, Progress, "save", number, fails(error)))
        assert_one_clear_line(end, f"step-000002 could not be written: [Errno {error}]")
        assert f"saved: {checkpoints(run)[-1]}; go on with --resume {run}" in end.text, names[number - 1]
        assert_whole_checkpoints(run)
        assert list(run.rglob("*.unfinished")) == []
        assert ended(argv, partial(on_write, Progress, "save", number, dies)).code == 9
        assert_whole_checkpoints(run)
        assert_goes_on(argv, whole, run)


def test_an_error_or_a_kill_while_old_checkpoints_are_deleted_loses_nothing(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    argv = [*command(model, run), "--keep_last", "1", "--resume"]
    copied(begun[1], run)
    names = writes(argv, Progress, "save", run.parent / "note")
    assert sum(name.startswith(("os.remove", "os.rmdir")) for name in names) == len(FILES) + 2
    for number in of_every_kind(names, "os.remove", "os.rmdir"):
        copied(begun[1], run)
        assert ended(argv, partial(on_write, Progress, "save", number, dies)).code == 9
        verify(checkpoints(run)[-1])
        assert_goes_on(argv, whole, run)
    copied(begun[1], run)  # what cannot be deleted ends nothing
    assert ended(argv, partial(on_write, Progress, "save", number, fails())).code == 0
    assert differences(whole, run) == []


def test_an_error_and_a_kill_at_every_kind_of_write_of_a_resume_lose_nothing(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    """The newest checkpoint is damaged, one was set aside before, and the logs are longer than they are to be."""

    def prepare() -> None:
        copied(begun[2], run)
        shutil.copytree(begun[1] / "checkpoints" / "step-000001", run / "checkpoints" / "step-000002.set-aside")
        (run / "checkpoints" / "step-000002" / "manifest.json").unlink()

    argv = [*command(model, run), "--resume"]
    for where in ((RunFolder, "__init__"), (RunFolder, "go_on")):
        prepare()
        names = writes(argv, *where, run.parent / "note")
        assert any(what.startswith(("os.truncate", "os.rename")) for what in names)
        for number in of_every_kind(names):
            prepare()
            end = ended(argv, partial(on_write, *where, number, fails(errno.ENOSPC)))
            if end.code:
                assert_one_clear_line(end, "could not be written: ")
                end = ended(argv, partial(on_write, *where, number, dies))
                assert end.code in (0, 9)  # 0: what the first did need not be done again
                assert_goes_on(argv, whole, run)
            else:
                assert differences(whole, run) == []


# --- a file of the newest checkpoint that is not what was written


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [torn, flipped, Path.unlink, emptied]


def test_every_damage_to_every_file_of_a_checkpoint_is_noticed(begun: dict[int, Path], run: Path) -> None:
    for damage in DAMAGES:
        for name in FILES:
            copied(begun[2], run)
            damage(run / "checkpoints" / "step-000002" / name)
            with pytest.raises(Damaged):
                verify(run / "checkpoints" / "step-000002")


def test_a_damaged_newest_checkpoint_is_named_with_its_file_and_the_one_before_is_used(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    assert sorted(FILES) == sorted(
        path.relative_to(newest).as_posix()
        for newest in [begun[2] / "checkpoints" / "step-000002"]
        for path in newest.rglob("*")
        if path.is_file()
    )
    # Each damage in turn, so that the manifest, the last, and the weights get more than one.
    tried = [(name, DAMAGES[i % 4]) for i, name in enumerate(FILES)]
    for name, damage in [*tried, ("model.safetensors", torn), ("manifest.json", flipped), ("manifest.json", emptied)]:
        copied(begun[2], run)
        newest = run / "checkpoints" / "step-000002"
        damage(newest / name)
        end = assert_goes_on(command(model, run), whole, run)
        lines = [line for line in end.text.splitlines() if "is damaged" in line]
        assert len(lines) == 1 and lines[0].startswith(f"{newest} is damaged (")
        # A flip in the manifest may make it another name, size or sum.
        assert name in lines[0] or (damage is flipped and name == "manifest.json")
        assert lines[0].endswith("it is set aside as step-000002.set-aside")


def test_where_every_checkpoint_is_damaged_the_run_begins_anew(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    copied(begun[2], run)
    for folder in checkpoints(run):
        flipped(folder / "model.safetensors")
    end = assert_goes_on(command(model, run), whole, run)
    assert end.text.count("is damaged") == 2 and f"{run} holds no whole checkpoint yet: the run begins anew" in end.text


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
def test_logs_that_have_lost_their_end_are_named_and_the_run_goes_on(
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


def test_sft_goes_on_after_an_error_and_a_kill_too(model: Path, run: Path) -> None:
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
