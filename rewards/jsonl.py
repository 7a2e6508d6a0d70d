"""Files of one JSON object a line: the logs, completions and answers that a run leaves behind.

Here because every package reads such files, and this is the package that all others may import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path, torn_end: bool = False) -> list[dict[str, Any]]:
    """As `each_jsonl`, in a list."""
    return list(each_jsonl(path, torn_end))


def each_jsonl(path: Path, torn_end: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file one after the other, for files that are larger than memory; nothing where there is no file.

    torn_end: the last line may be half a line, where a process was killed while it wrote; it is left out then.

    Raises:
        ValueError: a line is not a JSON object, with its number.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if torn_end and not file.read(1):
                    return
                raise ValueError(f"{path}, line {number}: is not JSON") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield record
