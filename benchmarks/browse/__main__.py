"""A GRPO run's completions as one page: rewards and advantages token by token, and each problem over time.
`python -m benchmarks.browse RUN [--output FILE.html]`

The page is one file that asks no network for anything and opens from a disk, as an attachment, from a web server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.browse.page import page
from benchmarks.browse.recorded import MOST_TOKENS, read_recorded
from rewards.terminal import Arguments
from sft_core.cli import run_ends, user_errors
from sft_core.errors import require
from sft_core.run.checkpoint import write_text


def main(argv: Sequence[str] | None = None) -> None:
    with run_ends():
        with user_errors():
            given = arguments(sys.argv[1:] if argv is None else argv)
            recorded = read_recorded(given.run, given.max_tokens)
        write_text(given.output, page(recorded))
        print(f"wrote {given.output} ({given.output.stat().st_size / 1e6:.1f} MB)", *recorded["about"][1:], sep="\n")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments("python -m benchmarks.browse", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of grpo_core.train")
    parser.add_argument("--output", type=Path, help="the page to write; default: RUN/completions.html")
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=MOST_TOKENS,
        help="of a run that sampled more, the page has every k-th step and the last; 0: all (default: %(default)s, "
        "some 20 MB)",
    )
    given = parser.parse_args(argv)
    require(given.max_tokens >= 0, "max_tokens", given.max_tokens, "0 or more")
    if given.output:
        free = given.output.parent.is_dir() and not given.output.is_dir()
        require(free, "output", given.output, "a file in an existing folder")
    given.output = given.output or given.run / "completions.html"
    return given


if __name__ == "__main__":
    main()
