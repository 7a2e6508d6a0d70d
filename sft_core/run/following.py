"""A run folder under torchrun: rank 0's, which the others know and leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sft_core.config import FolderConfig
from sft_core.learn import ranks
from sft_core.run.runlog import RunFolder, checkpoint_of

KNOWN = ("path", "evaluations", "finished", "ends_elsewhere", "checkpoint")


def run_folder(config: FolderConfig, kind: str) -> RunFolder:
    """The folder of this run, opened by rank 0; for the others one that knows the same and writes nothing.

    Raises:
        Refused, NotSaved: as `RunFolder`.
    """
    folder = RunFolder(config, kind) if ranks.first() else None
    known = {name: getattr(folder, name) for name in KNOWN} if folder else {}
    known = ranks.gathered(known, "run folder")[0]
    return folder or _Following(config, known)


class _Following(RunFolder):
    """What another process writes."""

    def __init__(self, config: FolderConfig, known: dict[str, Any]) -> None:
        self.config, self.trackers, self.lock = config, None, None
        for name, value in known.items():
            setattr(self, name, value)

    def resume_from(self, checkpoint: Path) -> None:
        pass

    def note(self, **found: Any) -> None:
        pass

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        return checkpoint_of(self.path, step)

    def prune(self, keep: int) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}
