"""Are two runs one and the same to the bit, times aside? Their weights, logs, completions and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOGS = ("completions.jsonl", "tokens.jsonl")


def unequal_files(undisturbed: Path, other: Path) -> list[str]:
    """What tells two run folders apart."""
    weights = sorted(path.relative_to(undisturbed) for path in (undisturbed / "final").glob("*.safetensors"))
    found = [] if weights else ["no final weights"]
    for name in [*map(str, weights), *LOGS, *(f"heldout/{path.name}" for path in undisturbed.glob("heldout/*"))]:
        ours, theirs = (path.read_bytes() if path.exists() else None for path in (undisturbed / name, other / name))
        if ours != theirs:
            found.append(name)
    return [*found, "log.jsonl"] if log(undisturbed) != log(other) else found


def log(run: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_a_time(name)} for line in lines]


def is_a_time(name: str) -> bool:
    return name.endswith(("_s", "seconds", "timestamp_iso", "waiting_share"))
