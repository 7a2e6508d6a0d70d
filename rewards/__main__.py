"""Audit rewards on completions that were recorded, or score one text.

python -m rewards RUN                                            a run folder's completions, an evaluation's answers
python -m rewards answers.jsonl --rewards numeric_reward_func my_module:my_reward --reward_weights 1 0.5
python -m rewards --response '6 * 7 = 42  #### 42' --expected 42
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.audit import EXTRACTORS, Audit, Recorded, audit, read_recorded, scored
from rewards.call import RewardError
from rewards.combine import REWARDS, load_rewards
from rewards.tables import aligned
from rewards.terminal import Arguments, quiet_ends, user_errors

# Those that need only a text and a gold answer.
DEFAULT = [name for name in REWARDS if name != "soft_overlong_reward_func"]

FINDINGS = {
    "silent": "has no opinion on any row",
    "dead": "is dead: it never fires, so it teaches nothing",
    "saturated": "is saturated: the same for every row, so it teaches nothing",
}


def main(argv: Sequence[str] | None = None) -> None:
    with quiet_ends(), user_errors():
        given = _parser().parse_args(sys.argv[1:] if argv is None else argv)
        _check(given)
        try:
            print(_one(given) if given.response is not None else _many(given))
        except RewardError as error:
            where = f"{given.file}, line {error.row + 1}: " if given.file and error.row is not None else ""
            print(f"{error.traceback}error: {where}{error}", file=sys.stderr)
            raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="python -m rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="JSONL of completions, or a run folder")
    paid = "built in, or my_module:my_reward; default: the run's own built-in ones, else all of them"
    parser.add_argument("--rewards", nargs="+", default=[], metavar="NAME", help=paid)
    parser.add_argument("--reward_weights", nargs="+", type=float, default=[], metavar="W", help="default: all 1")
    parser.add_argument("--reward_timeout", type=float, default=300.0, help="seconds for a function; 0: no limit")
    parser.add_argument("--extractors", nargs=2, choices=EXTRACTORS, default=[], help="the two that are compared")
    parser.add_argument("--rows", type=int, default=5, help="rows shown on which they disagree (default: %(default)s)")
    parser.add_argument("--response", help="score this text instead of a file; -: read it from stdin")
    parser.add_argument("--expected", help="the answer to --response")
    parser.add_argument("--question", default="", help="the question to --response, where a reward looks at it")
    parser.add_argument("--json", action="store_true", help="the same as JSON; no answer or correlation is null")
    return parser


def _check(given: argparse.Namespace) -> None:
    if (given.file is None) == (given.response is None):
        raise ValueError("expected either a FILE of completions or one text as --response")
    if (given.response is None) != (given.expected is None):
        raise ValueError("--expected: expected together with --response; a FILE has its own gold answers")
    if given.file and given.file.is_dir():
        answers = given.file / "answers.jsonl"  # an evaluation's
        given.file = answers if answers.is_file() else given.file / "completions.jsonl"
    if given.file and not given.file.is_file():
        raise ValueError(f"{given.file}: expected a JSONL file, or a run folder that holds a completions.jsonl")
    for name in ("rows", "reward_timeout"):
        if not 0 <= getattr(given, name) <= 1e9:
            raise ValueError(f"--{name} {getattr(given, name)}: expected 0 or more")


# --- one text


def _one(given: argparse.Namespace) -> str:
    rewards = load_rewards(given.rewards or DEFAULT, given.reward_weights)
    text = sys.stdin.read() if given.response == "-" else given.response
    row = Recorded(given.question, text, given.expected)
    scores = scored([row], rewards, given.reward_timeout)
    found = {name: extract(row.text) or None for name, extract in EXTRACTORS.items()}
    values = {name: values[0] for name, values in scores.by_function.items()}
    total = None if scores.total[0] != scores.total[0] else scores.total[0]
    if given.json:
        right = {name: row.right(answer) for name, answer in found.items()}
        return _json({"extracted": found, "right": right, "rewards": values, "total": total})
    answers = [[f"answer found by {n}", _quoted(a), "right" if row.right(a) else "wrong"] for n, a in found.items()]
    earned = [[name, _number(value)] for name, value in [*values.items(), ("total, weighted", total)]]
    return aligned(answers) + "\n\n" + aligned(earned)


# --- a file


def _many(given: argparse.Namespace) -> str:
    rows = read_recorded(given.file)
    paid = rows[0].fields.get("rewards")
    names = [name for name in DEFAULT if isinstance(paid, dict) and name in paid] or DEFAULT
    found = audit(
        rows, load_rewards(given.rewards or names, given.reward_weights), given.extractors, given.reward_timeout
    )
    return _json(dataclasses.asdict(found)) if given.json else report(found, given.rows)


def report(found: Audit, shown: int) -> str:
    """For people."""
    groups = f" in {found.groups} groups" if found.groups else ""
    lines = [f"{found.rows} completions{groups}; {found.accuracy:.1%} are right, judged by {found.judged_by}", ""]
    lines += [_table(found), ""]
    remarks = []
    for column in found.columns[:-1]:
        if column.verdict:
            remarks.append(f"{column.name} {FINDINGS[column.verdict]}")
    for name, changed in found.changed.items():
        if changed:
            remarks.append(f"{name} is not what the run recorded on {len(changed)} lines, the first {changed[0]}")
    lines += [*remarks, ""] if remarks else []
    lines += ["correlations (-: one of both never varies)", _correlations(found), ""]
    return "\n".join([*lines, *_disagreements(found, shown)])


def _table(found: Audit) -> str:
    head = ["", "weight", "fires", "full", "mean", "std", "low", "high", "with right", "equal groups", "no opinion"]
    rows = [
        [
            *(column.name, _number(column.weight), _percent(column.fires), _percent(column.full)),
            *(_number(value) for value in (column.mean, column.std, column.low, column.high, column.with_correct)),
            *(_percent(column.equal_groups), str(found.rows - column.given)),
        ]
        for column in found.columns
    ]
    return aligned([head, *rows])


def _correlations(found: Audit) -> str:
    names = list(found.correlations)
    head = ["", *(str(i) for i in range(1, len(names) + 1))]
    rows = [
        [f"{i} {a}", *(_number(found.correlations[a][b]) for b in names[:i])] + [""] * (len(names) - i)
        for i, a in enumerate(names, 1)
    ]
    return aligned([head, *rows])


def _disagreements(found: Audit, shown: int) -> list[str]:
    (first, second), rows = found.extractors, found.disagreements
    alone = [sum(row.right == verdict for row in rows) for verdict in ((True, False), (False, True), (False, False))]
    counts = f"{first} alone right {alone[0]}, {second} alone right {alone[1]}, both wrong {alone[2]}"
    lines = [f"{first} and {second} find different answers in {len(rows)} of {found.rows} completions: {counts}"]
    for row in rows[:shown]:
        answers = [
            f"{name} {_quoted(answer)} ({'right' if right else 'wrong'})"
            for name, answer, right in zip(found.extractors, row.found, row.right, strict=True)
        ]
        lines.append(f"  line {row.line}: expected {_quoted(row.gold)}; {', '.join(answers)}; it ends in {row.end!r}")
    if len(rows) > shown:
        lines.append(f"  and {len(rows) - shown} more (--rows, --json)")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _quoted(answer: str | None) -> str:
    """Escaped, on one line, and not long."""
    return "none" if not answer else repr(answer) if len(answer) <= 40 else f"{answer[:40]!r}..."


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


if __name__ == "__main__":
    main()
