"""Pictures and a summary of one or more runs, of GRPO or SFT, from their logs.

losses.png, rewards.png, timing.png, tokens.png, and curve.png with the learning curves; a sheet of which the runs have
logged nothing is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.plots.lines import by_settings, one_by_one, read_runs
from benchmarks.plots.panels import SHEETS, panels
from benchmarks.plots.summary import seeds, summary
from grpo_core.doctor.readlog import Run
from rewards.terminal import Arguments
from sft_core.cli import run_ends, user_errors
from sft_core.run.checkpoint import not_saved

TITLES = {
    "losses": "losses and the optimizer",
    "rewards": "rewards and advantages",
    "timing": "where the time goes",
    "tokens": "tokens",
    "curve": "learning curves",
}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments("python -m benchmarks.plots", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, help="a folder; default: plots/ in the run, or here for several runs")
    parser.add_argument("--sheets", nargs="+", choices=SHEETS, default=list(SHEETS), help="which; default: all")
    parser.add_argument(
        "--seeds", action="store_true", help="runs that differ in their seed alone: one line, and a band around it"
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="lines are running means of N log lines; default: a 20th of them; 1: off",
    )
    given = parser.parse_args(argv)
    if given.smooth is not None and given.smooth < 1:
        raise ValueError(f"--smooth {given.smooth}: expected 1 or more")
    if given.output and (given.output.suffix == ".png" or given.output.is_file()):
        raise ValueError(f"--output {given.output}: expected a folder; --sheets curve writes one picture alone")
    if find_spec("matplotlib") is None:
        raise ValueError("benchmarks.plots needs matplotlib: pip install '.[plots]'")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    with run_ends():
        with user_errors():
            given = arguments(sys.argv[1:] if argv is None else argv)
            runs = read_runs(given.runs)
        write(given, runs)


def write(given: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Print the summaries and draw the sheets."""
    from benchmarks.plots.sheet import draw

    lines = (by_settings if given.seeds else one_by_one)(runs)
    window = given.smooth or max(len(run.train) for run in runs) // 20
    window += window % 2 == 0  # as many to the left as to the right
    output = given.output or (given.runs[0] / "plots" if len(runs) == 1 else Path("plots"))
    with not_saved(output):
        output.mkdir(parents=True, exist_ok=True)
    for text in [*map(summary, runs), *(seeds(line) for line in lines if len(line.runs) > 1)]:
        print(text)
    for sheet in given.sheets:
        found = panels(sheet, runs)
        if found:
            parts = sheet == "timing"
            with not_saved(output / f"{sheet}.png"):
                draw(output / f"{sheet}.png", TITLES[sheet], found, lines, window, parts)
            print(f"wrote {output / sheet}.png")
        else:
            print(f"no {sheet}.png: the runs have logged nothing of it")


if __name__ == "__main__":
    main()
