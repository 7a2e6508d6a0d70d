"""Does each exercise of docs/exercises.md do what it says? `python -m tests.exercises [NUMBER ...]`

In a copy of the tree each exercise's command is run as it is, and must pass; then, where a function is to be rewritten,
without that function's body, and must fail. Exit code 0: all do.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bugs import Mutation
from tests.zoo import ROOT, Job, row, run_all, settle_in

COMMAND = re.compile(r"^python -m pytest -q (.*)$", re.MULTILINE)
REWRITE = re.compile(
    r"\bRewrite(?: `(\w+)`, the function inside)?\s+\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)(?:'s helper `(\w+)`)?"
)


@dataclass(frozen=True)
class Exercise:
    """The arguments of its pytest command, and the function that it blanks (None: there is nothing to rewrite)."""

    number: str
    arguments: tuple[str, ...]
    blanked: Mutation | None

    @property
    def jobs(self) -> list[Job]:
        """As it is; and blank."""
        blank = [Job(self.number, self.blanked, self.arguments)] if self.blanked else []
        return [Job(self.number, None, self.arguments), *blank]


def exercises() -> list[Exercise]:
    """Those that a pytest command checks."""
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^(?=\*\*\d+\. )", text, flags=re.MULTILINE)[1:]:
        number = part.split(".")[0].strip("*")
        for command in COMMAND.findall(part)[:1]:
            arguments, rewrite = tuple(shlex.split(command)), REWRITE.search(part)
            blanked = None
            if rewrite:
                inner, named, file, helper = rewrite.groups()
                blanked = without_body(file, inner or helper or named.rpartition(".")[2], arguments)
            found.append(Exercise(number, arguments, blanked))
    return found


def without_body(file: str, name: str, tests: tuple[str, ...]) -> Mutation:
    """The function keeps its signature and docstring."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    [function] = [node for node in functions if node.name == name]
    first = function.body[1 if ast.get_docstring(function) else 0]
    kept, body = lines[function.lineno - 1 : first.lineno - 1], lines[first.lineno - 1 : function.end_lineno]
    blank = " " * first.col_offset + "raise NotImplementedError\n"
    return Mutation(0, name, file, "".join(kept + body), "".join([*kept, blank]), "", tests)


def main(argv: Sequence[str] | None = None) -> int:
    wanted = list(sys.argv[1:] if argv is None else argv)
    chosen = [exercise for exercise in exercises() if not wanted or exercise.number in wanted]
    settle_in(len(chosen))
    right = True
    for job, result in run_all(
        [job for exercise in chosen for job in exercise.jobs], workers=min(2, os.cpu_count() or 1)
    ):
        verdict = job.verdict(result)
        right = right and verdict == ("caught" if job.bug else "pass")
        tried = f"without {job.bug.name}" if job.bug else shlex.join(job.tests)
        print(row(job.label, tried, verdict, result.first_failed, result.seconds), flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
