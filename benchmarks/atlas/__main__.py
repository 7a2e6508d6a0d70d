"""What each trick of GRPO does, measured on this machine: `python -m benchmarks.atlas`

    python -m benchmarks.atlas                              every experiment that is not recorded yet, then the page
    python -m benchmarks.atlas "ways/mu 4" stale --seeds 1  one experiment and one task, their first seed
    python -m benchmarks.atlas --dry_run                    how many runs, and how long they take
    python -m benchmarks.atlas --page                       only the tables and figures of docs/atlas.md

Each experiment is its task's baseline with some flags of grpo_core.train changed (benchmarks/atlas/experiments.yaml). A
run's figures are appended to the records as soon as it ends, so that the same command goes on after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.atlas.estimate import study
from benchmarks.atlas.experiments import SEEDS, cells, experiments, named
from benchmarks.atlas.figures import draw
from benchmarks.atlas.page import fill, report
from benchmarks.atlas.pool import Plan, take
from benchmarks.atlas.records import Run
from rewards.jsonl import read_jsonl
from rewards.terminal import quiet_ends, user_errors

RECORDS = Path(__file__).parents[1] / "results" / "atlas" / "runs.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "atlas.md"
# The curves that a question's panels show, where it is about more than accuracy.
SHOWS = {
    "entropy": ("accuracy", "entropy"),
    "how samples are drawn": ("accuracy", "entropy"),
    "length, with a budget that cuts": ("accuracy", "wrong_length", "truncated"),
    "length, with a budget that suffices": ("accuracy", "right_length", "wrong_length"),
    "rare success": ("accuracy", "flat"),
    "two rewards": ("accuracy", "length"),
    "bounds on stale samples": ("accuracy", "entropy", "clipped"),
    "losses for stale samples": ("accuracy", "entropy", "clipped"),
    "other brakes on stale samples": ("accuracy", "entropy"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.atlas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", help="tasks, or experiments as task/name; default: all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"1 to {len(SEEDS)} (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where a line for each run goes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/atlas"), help="where starts are kept, and runs while they last"
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would be done")
    parser.add_argument("--page", action="store_true", help="run nothing, write tables and figures of what is recorded")
    parser.add_argument("--list", action="store_true", help="the command of each experiment")
    given = parser.parse_args()
    known = experiments()
    with user_errors():
        chosen = named(given.names, known)
        if not 1 <= given.seeds <= len(SEEDS):
            raise ValueError(f"--seeds {given.seeds}: expected 1 to {len(SEEDS)}")
        plan = Plan.of(cells(chosen, given.seeds), read_jsonl(given.records), given.work)
    if given.list:
        for each in chosen:
            print(f"{each.label}: python -m grpo_core.train {shlex.join(each.flags)}")
        return 0
    failed: list[str] = []
    if not given.page:
        print(plan.lines(given.processes))
        if given.dry_run:
            return 0
        failed = take(plan, given.records, given.work, given.processes, given.minutes)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    for path in written(given.records):
        print(path)
    return 1 if failed else 0


def recorded(records: Path) -> list[Run]:
    """The runs of the table's experiments, in its order and under its questions."""
    table = {each.label: (place, each.question) for place, each in enumerate(experiments())}
    runs = [Run.of(record) for record in read_jsonl(records)]
    known = [replace(run, question=table[run.label][1]) for run in runs if run.label in table]
    return sorted(known, key=lambda run: (table[run.label][0], run.start))


def written(records: Path) -> list[Path]:
    """Tables and figures beside the records, and where these are the project's own, the numbers of docs/atlas.md."""
    found = study(recorded(records))
    if not any(result.difference for result in found.results.values()):
        print("no tables yet: they take two seeds of a task's baseline, and two of something else")
        return []
    (records.parent / "README.md").write_text(report(found), encoding="utf-8")
    paths = [records.parent / "README.md", *draw(found, records.parent, SHOWS)]
    if records == RECORDS and PAGE.is_file():
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        paths.append(PAGE)
    return paths


if __name__ == "__main__":
    with quiet_ends():
        raise SystemExit(main())
