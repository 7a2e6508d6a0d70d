"""One process at a time writes to a run folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sft_core.errors import Refused


def locked(run: Path) -> int | None:
    """The folder's descriptor, locked until this process ends, however it ends; None where the file system
    has no locks.

    Raises:
        Refused: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise Refused(f"--output_dir {run}: another process is writing to this run folder") from None
    except OSError:  # some network and cloud drives
        os.close(folder)
        print(f"{run} cannot be locked on this file system: see to it that one process alone uses it", file=sys.stderr)
        return None
    return folder
