"""Tables, for the terminal and as Markdown. Here because this is the package that all others may import."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Cells = Sequence[Sequence[str]]  # rows of equal length, the first its head


def aligned(rows: Cells, justify: Callable[[str, int], str] = str.rjust) -> str:
    """A table for the terminal: the first column to the left, the others, which are numbers, to the right.

    >>> print(aligned([["", "mean"], ["reward", "1.5"]]))
            mean
    reward   1.5
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [row[0].ljust(widths[0]), *(justify(cell, w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def markdown(rows: Cells) -> str:
    """A table as Markdown.

    >>> print(markdown([["name", "is"], ["a|b", "c"]]))
    | name | is |
    | --- | --- |
    | a\\|b | c |
    """
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
