"""What the embedded job gained: `python -m benchmarks.sitting.gain RUN LEAST`; exit code 1 below LEAST points."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards.jsonl import each_jsonl


def main(argv: Sequence[str] | None = None) -> int:
    run, least = sys.argv[1:] if argv is None else argv
    summary = json.loads((Path(run) / "summary.json").read_text())
    before, after = (100 * summary[when]["accuracy"] for when in ("before", "after"))
    steps = [line["time_per_step_s"] for line in each_jsonl(Path(run) / "log.jsonl") if line["kind"] == "train"]
    print(
        f"figure: {after - before:+.1f} points of greedy accuracy, {before:.1f}% to {after:.1f}% of "
        f"{summary['after']['problems']} problems; {len(steps)} steps of {statistics.median(steps):.3f} s"
    )
    return 0 if after - before >= float(least) else 1


if __name__ == "__main__":
    raise SystemExit(main())
