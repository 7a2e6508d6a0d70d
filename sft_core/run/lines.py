"""Lines of JSON, added to a log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft_core.run.checkpoint import not_saved


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """
    Raises:
        NotSaved: the disk is full, or gone.
    """
    with not_saved(path), path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(line_of(finite(record)))


def line_of(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
