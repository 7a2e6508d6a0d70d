"""What every program says in the same way. Here because this is the package that all others may import."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def user_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn an error that names what the user got wrong into one line on stderr and exit code 2."""
    try:
        yield
    except kind as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right.

    >>> print(aligned([["", "mean"], ["reward", "1.5"]]))
            mean
    reward   1.5
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
