"""The summary of a sitting, made from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.sitting.record import ROOT, Record
from rewards.tables import markdown

SHOWN = 15  # last lines of a part that did not pass


def page(records: Sequence[Record]) -> str:
    """Markdown: which part passed, its seconds and key figures; where; and what the others said at last."""
    rows = [["part", "what it tells", "outcome", "seconds", "figures"]]
    rows += [
        [r["part"], r["tells"], _stressed(r["outcome"]), f"{r['seconds']:.0f}", r["figures"] or "none"] for r in records
    ]
    counts = {outcome: sum(r["outcome"] == outcome for r in records) for outcome in dict.fromkeys(_outcomes(records))}
    sections = [
        "# One sitting",
        f"{len(records)} parts: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}.",
        markdown(rows),
        *_places(records),
        *(_last_lines(record) for record in records if record["outcome"] != "passed"),
        "## Commands",
        "\n".join(f"- {r['part']}: " + ", ".join(f"`{command}`" for command in r["commands"]) for r in records),
    ]
    return "\n\n".join(sections) + "\n"


def _outcomes(records: Sequence[Record]) -> list[str]:
    return [record["outcome"] for record in records]


def _stressed(outcome: str) -> str:
    return outcome if outcome in ("passed", "skipped") else f"**{outcome}**"


def _places(records: Sequence[Record]) -> list[str]:
    """A line for each hardware, commit and set of versions, with the parts that ran there."""
    pinned, places = pins(ROOT / "constraints.txt"), dict[str, list[Record]]()
    for record in records:
        about = record["about"]
        versions = ", ".join(
            f"{name} {number}"
            + (f" (tested: {pinned[name]})" if name in pinned and pinned[name] != number.partition("+")[0] else "")
            for name, number in about["versions"].items()
        )
        line = f"{'; '.join(about['hardware'])}; {versions or 'no versions known'}; commit {about['commit']}"
        places.setdefault(line, []).append(record)
    return [
        f"{', '.join(r['part'] for r in here)}, until {max(r['ended'] for r in here)}: {line}."
        for line, here in places.items()
    ]


def pins(constraints: Path) -> dict[str, str]:
    """The versions that were tested, by package."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(";")[0].strip().partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower(): number for name, _, number in pairs}


def _last_lines(record: Record) -> str:
    lines = [line for line in record["output"].splitlines() if line.strip()][-SHOWN:]
    return "\n".join([f"## {record['part']}: {record['outcome']}", "", "```text", *lines, "```"])
