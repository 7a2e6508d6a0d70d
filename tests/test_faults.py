"""Writing goes wrong at every place in turn: a run goes on all the same, and ends as if nothing had happened."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sft_core.run.checkpoint import Damaged, checkpoints, verify
from sft_core.run.progress import Progress
from sft_core.run.runlog import RunFolder
from tests.faulty import FORKS, Ended, command, dies, ended, fails, on_write
from tests.killing import differences

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


@pytest.mark.slow
def test_an_error_and_a_kill_at_each_write_of_a_checkpoint_lose_nothing(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    argv = [*command(model, run), "--resume"]
    copied(begun[1], run)
    names = writes(argv, Progress, "save", run.parent / "note")
    assert names.count("fsync") >= len(FILES) and names.count("serialize_file") == 2
    for number in range(1, len(names) + 1):
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


@pytest.mark.slow
def test_an_error_and_a_kill_at_each_write_of_a_resume_lose_nothing(
    model: Path, whole: Path, begun: dict[int, Path], run: Path
) -> None:
    """The newest checkpoint is damaged, one was set aside before, and the logs are longer than they are to be."""

    def prepare() -> None:
        copied(begun[2], run)
        shutil.copytree(begun[1] / "checkpoints" / "step-000001", run / "checkpoints" / "step-000002.set-aside")
        (run / "checkpoints" / "step-000002" / "manifest.json").unlink()

    argv = [*command(model, run), "--resume"]
    for where in ((RunFolder, "__init__"), (RunFolder, "resume_from")):
        prepare()
        names = writes(argv, *where, run.parent / "note")
        assert any(what.startswith(("os.truncate", "os.rename")) for what in names)
        for number in range(1, len(names) + 1):
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
