"""--resume RUN --max_steps MORE: a run, finished or not, gets another end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from sft_core.config import LENGTH
from sft_core.errors import Refused
from sft_core.run.checkpoint import write_text


def has_another_end(run: Path, config: Any) -> bool:
    """Whether `config` asks the run in `run` for another number of steps than its config.yaml does."""
    path = run / "config.yaml"
    begun = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(begun, dict):
        return False
    return any(getattr(config, name, begun.get(name)) != begun.get(name) for name in LENGTH)


def refuse_finished(run: Path) -> None:
    """Of a run without a checkpoint: what is left to begin anew must not be a finished run.

    Raises:
        Refused: it is finished.
    """
    if (final := run / "final").is_dir():
        raise Refused(
            f"{run} is finished and holds no checkpoint to go on from; a new run can start with --model {final}"
        )


def reopen(run: Path, config: Any) -> None:
    """Remove what only a finished run has, and write the new number of steps to config.yaml, for the next --resume.

    Raises:
        NotSaved: the disk is full, or gone.
    """
    shutil.rmtree(run / "final", ignore_errors=True)  # first: as long as it is there, the run counts as finished
    (run / "summary.json").unlink(missing_ok=True)
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    for name in LENGTH:
        text = re.sub(rf"^{name}:.*$", f"{name}: {getattr(config, name)}", text, flags=re.MULTILINE)
    write_text(path, text)
