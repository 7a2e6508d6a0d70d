"""The run folder: all that a run leaves behind, and nothing elsewhere.

config.yaml         the resolved config; --config takes it back
provenance.json     command, versions, commit, hardware, seed, time
log.jsonl           one object per log line; `kind` says which: train, eval
completions.jsonl   every sampled completion of GRPO with its rewards and advantage
tensorboard/        the same scalars
checkpoints/        step-000100/, ... in Hugging Face format
final/              the final model or adapter
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from sft_core.config import RunConfig, as_yaml
from sft_core.policy import Policy
from sft_core.precision import cpu_capabilities

# Loading and saving are announced by this project where they matter; the libraries' own bars would tear ours apart.
transformers.logging.disable_progress_bar()


class RunFolder:
    """Open a new run folder and write what is known before the first step."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        self.path = Path(config.output_dir) if config.output_dir else _fresh(kind)
        self.path.mkdir(parents=True, exist_ok=True)
        # Without output_dir: repeating a run must not collide with it.
        lines = [line for line in as_yaml(config).splitlines() if not line.startswith("output_dir:")]
        (self.path / "config.yaml").write_text("\n".join(lines) + "\n")
        _write_json(self.path / "provenance.json", provenance(getattr(config, "seed", None)))
        self.writer = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to log.jsonl and its numbers to TensorBoard. NaN and infinity are written as null: JSON has
        no word for them."""
        record = {"kind": kind, "step": step, "timestamp_iso": datetime.now(timezone.utc).isoformat(), **values}
        append_jsonl(self.path / "log.jsonl", [record])
        if self.writer:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def save_checkpoint(self, policy: Policy, step: int) -> Path:
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        return folder if folder.exists() else self._save(policy, folder)  # a failing step comes after a saved one

    def save_final(self, policy: Policy) -> Path:
        return self._save(policy, self.path / "final")

    def _save(self, policy: Policy, folder: Path) -> Path:
        # Written beside and renamed: a folder of this name is whole or absent.
        unfinished = folder.with_name(folder.name + ".unfinished")
        policy.save(unfinished)
        return unfinished.rename(folder)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _fresh(kind: str) -> Path:
    """runs/<kind>-<time>, with a number where two runs start within a second."""
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


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


def shown_flags(flags: Sequence[str]) -> str:
    """A command's flags for a record that others read: of absolute paths, the last part."""
    return shlex.join(Path(flag).name if Path(flag).is_absolute() else flag for flag in flags)


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


class Stopwatch:
    """Where the time of a step goes. `lap(name)` adds the time since the last lap to `name`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start = self.last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run behind Python's back
        return time.perf_counter()
