"""What the pages of docs/ take from the code. `python -m tests.pages` writes it anew, and says which pages it changed.

    ```python           with >>>: a session, run from the page's top to its end in one namespace; its output is compared
    ```python FILE      lines of that file, word for word
    <!-- table NAME --> a table made by a function of tests/tables.py, up to <!-- end -->
    *.png               drawn by docs/figures.py

What a session printed is as it was on the author's machine: look at the change before you commit it.
"""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from tests.tables import with_tables

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")  # what is counted has no point, and is to be exact


# --- sessions


@dataclass(frozen=True)
class Wrong:
    """An example of a session that printed something else than its page says."""

    line: int  # of the example in the page, from 0
    source: str
    want: str
    got: str


class Checker(doctest.OutputChecker):
    """Takes a decimal whose last digit is one off: another processor adds up in another order."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        wanted, found = DECIMAL.findall(want), DECIMAL.findall(got)
        if len(wanted) != len(found) or not super().check_output(
            *(DECIMAL.sub("N", t) for t in (want, got)), optionflags
        ):
            return False
        return all(abs(Decimal(a) - Decimal(b)) <= last_place(Decimal(a)) for a, b in zip(wanted, found, strict=True))


def last_place(number: Decimal) -> Decimal:
    """One in the last digit of a number as it is written.

    >>> last_place(Decimal("0.250")), last_place(Decimal("1.5e-06"))
    (Decimal('0.001'), Decimal('1E-7'))
    """
    return Decimal(1).scaleb(int(number.as_tuple().exponent))


class _Runner(doctest.DocTestRunner):
    """Notes what is wrong instead of printing it."""

    def __init__(self) -> None:
        super().__init__(Checker(), verbose=False, optionflags=FLAGS)
        self.wrong: list[Wrong] = []

    def report_failure(self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str) -> None:
        self.wrong.append(Wrong(example.lineno, example.source, example.want, got))

    def report_unexpected_exception(self, out: Any, test: doctest.DocTest, example: doctest.Example, info: Any) -> None:
        raise info[1]


def run_sessions(text: str, name: str) -> list[Wrong]:
    """Run a page's sessions; what did not print what the page says."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside and line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    test = doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", {"__name__": name}, name, name, 0)
    runner, stream = _Runner(), torch.random.get_rng_state()
    try:
        runner.run(test, clear_globs=True)
    finally:
        torch.set_printoptions(profile="default")
        torch.random.set_rng_state(stream)
    return runner.wrong


def corrected(text: str, wrong: list[Wrong]) -> str:
    """The page with what its sessions really print."""
    lines = text.split("\n")
    for example in reversed(wrong):
        start = example.line + example.source.count("\n")
        lines[start : start + example.want.count("\n")] = example.got.rstrip("\n").split("\n") if example.got else []
    return "\n".join(lines)


# --- quotations, links and names


def quotations(text: str) -> list[tuple[str, str]]:
    """(file, lines) of each block that quotes a file."""
    return re.findall(r"^```python (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def is_quoted(block: str, source: str) -> bool:
    """Whether the block's lines stand in the source one after the other, at whatever indentation."""
    wanted, there = ([line.strip() for line in part.splitlines()] for part in (block, source))
    return any(there[at : at + len(wanted)] == wanted for at in range(len(there)))


def links(text: str) -> list[tuple[str, str]]:
    """(text, target) of each link and picture, those inside blocks of code left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [(label, target) for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose) if "://" not in target]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def names(source: str) -> set[str]:
    """What a module defines: functions, classes, constants, and of classes `Class.member`."""

    def of(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}.")
                else:
                    yield from of(node.body, prefix)  # a function within a function
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(of(ast.parse(source).body, ""))


def first_column(text: str) -> list[str]:
    """Every `word` in the first cell of every row of the page's tables."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def main() -> None:
    from docs.figures import draw

    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        after = corrected(after, run_sessions(after, page.name))
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"changed: {page.relative_to(ROOT)}")
    for picture in draw(DOCS):
        print(f"drawn: {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
