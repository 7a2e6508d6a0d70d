"""Checkpoints: folders that are whole or absent, with the model and the training's state.

checkpoints/step-000100/
    config.json, model.safetensors, ...    the model or the adapter, as any other program opens it
    training/tensors.safetensors           the optimizer's moments, random states, a reference that moves
    training/state.json                    numbers: the step, the data's position, the schedule, the sizes of the logs
    manifest.json                          every file's size and SHA-256

Nothing here is a pickle, so no file of a checkpoint can run code. A folder is written under another name, synced to
the disk and renamed: after a kill, a full disk or a power cut it is whole or absent. The manifest shows what happened
to a file later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft_core.errors import Refused

MANIFEST = "manifest.json"
TENSORS, NUMBERS = "training/tensors.safetensors", "training/state.json"
UNFINISHED, ASIDE = ".unfinished", ".set-aside"


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the file."""


class NotSaved(Exception):
    """Something could not be written; the message names the file and the reason."""


@contextmanager
def not_saved(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that names the file."""
    try:
        yield
    except Exception as error:
        # tokenizers knows no class but Exception itself for a full disk
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise NotSaved(f"{path} could not be written: {' '.join(str(error).split())}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file; afterwards it is complete, or as it was before.

    Raises:
        NotSaved: the disk is full, or gone.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with not_saved(path):
            path.parent.mkdir(exist_ok=True)
            unfinished.write_text(text, encoding="utf-8")
            to_disk(unfinished)
            unfinished.replace(path)
            to_disk(path.parent)
    except NotSaved:
        with suppress(OSError):
            unfinished.unlink()
        raise


# --- folders that are whole or absent


def write_whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, then rename it to `folder`, replacing an older one.

    Raises:
        NotSaved: the disk is full, or gone. No temporary folder is left, and an older `folder` stays.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with not_saved(folder):
            unfinished.mkdir(parents=True)
            write(unfinished)
            _write_manifest(unfinished)
            for path in [*sorted(unfinished.rglob("*")), unfinished]:
                to_disk(path)
            older = set_aside(folder) if folder.exists() else None
            try:
                unfinished.rename(folder)
            except OSError:
                if older:
                    older.rename(folder)
                raise
            for parent in (folder.parent, folder.parent.parent):  # which may be as new as the folder
                to_disk(parent)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if older:
        shutil.rmtree(older, ignore_errors=True)
    return folder


def to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, would survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is no longer found; replaces one set aside earlier under this name."""
    aside = folder.with_name(folder.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _write_manifest(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(files.items())), indent=1) + "\n")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def verify(folder: Path) -> None:
    """
    Raises:
        Damaged: a file is missing, or is not the one that was written.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): (int(its["bytes"]), str(its["sha256"])) for name, its in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read") from error
    if not {TENSORS, NUMBERS} <= expected.keys():
        raise Damaged(f"{MANIFEST} does not name {TENSORS} and {NUMBERS}")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size:,} bytes; {size:,} were written")
        if _fingerprint(path)["sha256"] != digest:
            raise Damaged(f"{name} has other contents than were written")


def checkpoints(run: Path) -> list[Path]:
    """A run's finished checkpoints, the oldest first."""
    return sorted(filter(is_checkpoint, (run / "checkpoints").glob("step-*")), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether the name is a finished checkpoint's, neither unfinished nor set aside."""
    return re.fullmatch(r"step-\d{6,}", path.name) is not None


def step_of(checkpoint: Path) -> int:
    """
    >>> step_of(Path("run/checkpoints/step-000100"))
    100
    """
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are named and set aside. None: there is none."""
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
        except Damaged as error:
            say(f"{folder} is damaged ({error}); it is set aside as {set_aside(folder).name}")
        else:
            return folder
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: keep all), and unfinished ones that a kill has left."""
    left = (run / "checkpoints").glob("*" + UNFINISHED)
    for folder in [*left, *(checkpoints(run)[:-keep] if keep else [])]:
        shutil.rmtree(folder, ignore_errors=True)


# --- a state of numbers and tensors, nested in dicts, as one JSON and one safetensors file


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state: nested dicts with text keys, of tensors and whatever JSON holds."""
    tensors: dict[str, Tensor] = {}

    def numbers(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {key: numbers(item, f"{name}/{key}") for key, item in value.items()}
        return value

    text = json.dumps(numbers(state, "state"), indent=1)
    (folder / TENSORS).parent.mkdir()
    save_file(tensors, folder / TENSORS)
    (folder / NUMBERS).write_text(text + "\n")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` was given; lists where it was given tuples. Tensors are on the CPU.

    Raises:
        ValueError: a file cannot be read.
    """
    with readable(folder / TENSORS):
        tensors = load_file(folder / TENSORS)

    def state(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if value.keys() == {"tensor"} else {k: state(v) for k, v in value.items()}
        return value

    loaded: dict[str, Any] = state(load_numbers(folder))
    return loaded


def load_numbers(folder: Path) -> dict[str, Any]:
    """The part of a state that is not tensors."""
    with readable(folder / NUMBERS):
        numbers = json.loads((folder / NUMBERS).read_text())
        if not isinstance(numbers, dict):
            raise ValueError("expected a JSON object")
        return numbers


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of reading into one that names the file.

    Raises:
        Refused: it is not JSON, or not safetensors.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise Refused(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from error
