"""What a reader needs in order to repeat a run: command, versions, commit, hardware, seed, time."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sft_core.precision import cpu_capabilities


def provenance(seed: int | None) -> dict[str, Any]:
    """What a reader needs in order to repeat a run."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "safetensors", "tokenizers", "peft", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cpu = cpu_capabilities().get("cpu_name", platform.machine())
    hardware = [f"{cpu}, {torch.get_num_threads()} threads"]
    hardware += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(sys.orig_argv[1:]),
        "commit": _commit(),
        "versions": versions,
        "hardware": hardware,
        "seed": seed,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def as_line(about: dict[str, Any]) -> str:
    """For a record that others read: commit, versions, hardware, time."""
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    return f"Commit {about['commit']}; {versions}; {', '.join(about['hardware'])}; {about['started']}."


def last_start(about: dict[str, Any]) -> dict[str, Any]:
    """Of a run's provenance, the part about its latest start or resume."""
    resumed: list[dict[str, Any]] = about.get("resumed") or [about]
    return resumed[-1]


def what_changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Processor, threads, devices and versions on which the bits of a result depend, where they are others now.

    >>> here = {"hardware": ["AMD EPYC, 2 threads"], "versions": {"torch": "2.13.0", "python": "3.11.7"}}
    >>> there = {"hardware": ["Intel Xeon, 2 threads"], "versions": {"torch": "2.14.1", "python": "3.11.7"}}
    >>> what_changed(here, there)
    'AMD EPYC, 2 threads, now Intel Xeon, 2 threads; torch 2.13.0, now 2.14.1'
    >>> what_changed(here, here), what_changed({}, {})
    ('', '')
    """
    changed = []
    then, today = (about.get("hardware", []) for about in (before, now))  # the file may be somebody's own
    if then != today:
        changed.append(f"{' + '.join(then)}, now {' + '.join(today)}")
    for package in ("torch", "transformers", "peft"):
        then, today = (about.get("versions", {}).get(package) for about in (before, now))
        if then != today:
            changed.append(f"{package} {then}, now {today}")
    return "; ".join(changed)


def shown_flags(flags: Sequence[str]) -> str:
    """A command's flags for a record that others read: of absolute paths, the last part.

    >>> shown_flags(["--model", "/home/me/model", "--output_dir=/home/me/run", "--task", "data/train.jsonl"])
    '--model model --output_dir=run --task data/train.jsonl'
    """
    return shlex.join(map(without_folders, flags))


def without_folders(text: str) -> str:
    """The last part of an absolute path, alone or after `name=`; any other text unchanged.

    >>> without_folders("/home/a=b/model"), without_folders("--x=/home/me/model"), without_folders("x=/home/me/y=z")
    ('model', '--x=model', 'x=y=z')
    """
    name, equals, value = ("", "", text) if Path(text).is_absolute() else text.partition("=")
    return name + equals + (Path(value).name if Path(value).is_absolute() else value)


def _commit() -> str | None:
    """The commit of the source tree that runs, marked where it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
