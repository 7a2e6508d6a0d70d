"""The bug zoo as an exercise sheet: Markdown to read, predict from, and check with `python -m tests.zoo`."""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter
from collections.abc import Sequence

from tests.bugs import PITFALLS, Mutation

INTRODUCTION = """\
# The bug zoo

Ways to get GRPO wrong, each a patch of a few lines to this project, and each caught by a test. Pitfalls 1 to 26 were
seen in public implementations or reproduced; 27 to 32 are slips that the options of `grpo_core` invite, 33 and 34
such as come with saving time and memory, 35 such as come with measuring.

An exercise for each bug: read the patch, say what goes wrong in training and what a curve would show of it, guess which
test notices; then unfold the answer and watch:

```bash
python -m tests.zoo 3          # put in the bugs of pitfall 3, one after the other, and run the tests that must fail
python -m tests.zoo 3b --show  # one bug, with what pytest says
python -m tests.zoo            # all of them
```

Nothing here is changed by it: the bugs are put into a copy. This page is the output of `python -m tests.zoo --list`."""


def labels(mutations: Sequence[Mutation]) -> list[tuple[str, Mutation]]:
    """Each bug with its name on the command line: 3a, 3b, ..."""
    seen: Counter[int] = Counter()
    named = []
    for bug in mutations:
        named.append((f"{bug.pitfall}{chr(ord('a') + seen[bug.pitfall])}", bug))
        seen[bug.pitfall] += 1
    return named


def exercise_sheet(mutations: Sequence[Mutation]) -> str:
    """All bugs by pitfall, the answers folded away."""
    named = labels(mutations)
    parts = [INTRODUCTION, _contents(named)]
    for number, title in PITFALLS.items():
        parts.append(f"## {number}. {title}")
        parts += [_exercise(label, bug) for label, bug in named if bug.pitfall == number]
    return "\n\n".join(parts)


def _contents(named: Sequence[tuple[str, Mutation]]) -> str:
    count = Counter(bug.pitfall for _, bug in named)
    lines = ["| | pitfall | bugs |", "| --- | --- | --- |"]
    lines += [f"| {number} | {title} | {count[number]} |" for number, title in PITFALLS.items()]
    return "\n".join(lines)


def _exercise(label: str, bug: Mutation) -> str:
    before, after = bug.old.rstrip("\n").split("\n"), bug.new.rstrip("\n").split("\n") if bug.new else []
    lines = list(difflib.unified_diff(before, after, n=99, lineterm=""))[3:]  # without the two names and the place
    noticed = ", ".join(f"`{test}`" for test in bug.tests)
    return "\n".join(
        [
            f"### {label}. {bug.name[0].upper()}{bug.name[1:]}",
            "",
            f"In `{bug.file}`:",
            "",
            "```diff",
            *lines,
            "```",
            "",
            "<details><summary>What goes wrong, and which test notices?</summary>",
            "",
            textwrap.fill(bug.why, 120, break_on_hyphens=False, break_long_words=False),
            "",
            f"Noticed by {noticed}.",
            "",
            "</details>",
        ]
    )
