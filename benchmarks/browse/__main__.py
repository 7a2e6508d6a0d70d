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
from sft_core.checkpoint import NotSaved, write_text
from sft_core.cli import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.browse", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of grpo_core.train")
    parser.add_argument("--output", type=Path, help="the page to write; default: RUN/completions.html")
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=MOST_TOKENS,
        help="of a run that sampled more, the page has every k-th step and the last; 0: all (default: %(default)s, "
        "some 20 MB)",
    )
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    output = given.output or given.run / "completions.html"
    with user_errors():
        if given.max_tokens < 0:
            raise ValueError(f"--max_tokens {given.max_tokens}: expected 0 or more")
        if not output.parent.is_dir():
            raise ValueError(f"--output {output}: expected a file in an existing folder")
        recorded = read_recorded(given.run, given.max_tokens)
    try:
        write_text(output, page(recorded))
    except NotSaved as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", *recorded["about"][1:], sep="\n")


if __name__ == "__main__":
    main()
