"""A part's record: how it ended, when, where, and what it printed. Needs neither torch nor transformers, so that a
record is written also where those are broken."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.sitting.parts import Part, python

ROOT = Path(__file__).parent.parent.parent
KEPT = 100_000  # characters of what a part printed, the last
GRACE = 5.0  # seconds between the request to end and the kill

Record = dict[str, Any]


def recorded(
    part: Part, seconds: float, environment: dict[str, str], about: dict[str, Any], folders: Mapping[str, str]
) -> Record:
    """Run a part, for at most so many seconds. `about`: where, as `whereabouts` says it. `folders` of this machine are
    replaced by names, for others read a record."""
    began = time.monotonic()
    outcome, printed = "passed", ""
    if missing := part.missing():
        outcome, printed = "skipped", f"not installed here: {', '.join(missing)}"
    for command in [] if missing else part.commands:
        left = seconds - (time.monotonic() - began)
        code, text = run([python(), *command], left, environment)
        printed += text
        if code is None:
            outcome = "timed out"
            printed += f"\nended after {time.monotonic() - began:.0f} seconds, of which it had {seconds:.0f}\n"
            break
        if code:  # the part's other commands are run all the same
            outcome = "failed"
            printed += f"\nexit code {code}\n"
    figures = part.figures(printed)
    if outcome == "passed" and part.proof not in figures:
        outcome = "skipped"

    def known(text: str) -> str:
        for folder, name in folders.items():
            text = text.replace(folder, name)
        return text

    return {
        "part": part.name,
        "tells": part.tells,
        "outcome": outcome,
        "seconds": round(time.monotonic() - began, 1),
        "figures": known(figures),
        "commands": [known(shlex.join(["python", *command])) for command in part.commands],
        "about": about,
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "output": known(printed)[-KEPT:],
    }


def run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """The exit code, None where time was up, and what was printed. No process that it started outlives it."""
    code = None
    with TemporaryFile() as file:
        with (
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
            _ended(process),
            suppress(subprocess.TimeoutExpired),
        ):
            process.wait(max(0.0, seconds))
            code = process.returncode
        file.seek(0)
        return code, file.read().decode(errors="replace")


@contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """After the block the process's whole group is gone. It is asked first: torchrun's workers are no part of it."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            os.killpg(process.pid, signal.SIGKILL)


def whereabouts(environment: dict[str, str], commit: str) -> dict[str, Any]:
    """Hardware, versions and commit (`commit`, where the source tree does not know its own), asked of a process of its
    own: this one would hold GPU memory."""
    code, text = run([python(), "-m", "benchmarks.sitting.about"], 120, environment)
    try:
        about = json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        about = {"hardware": [f"unknown: {' '.join(text.split())[-300:]}"], "versions": {}, "commit": None}
    return about | {"commit": about["commit"] or commit or "unknown"}


def append(folder: Path, record: Record) -> None:
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def latest(folder: Path) -> list[Record]:
    """Each part's last record, in the order in which parts were first run."""
    found: dict[str, Record] = {}
    path = folder / "records.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        found[record["part"]] = record
    return list(found.values())
