"""Compare evaluations of the same problems, pair by pair. `python -m eval.compare RUN_A RUN_B [RUN ...]`

A RUN is the run folder of an evaluation, its answers.jsonl, or a step's file in a GRPO run's heldout/. A single GRPO
run folder is compared before and after training; among others it stands for its last evaluation.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.evaluate import Answered, Evaluation, read_answers
from eval.report import method, side_by_side, summary_cells
from eval.statistics import Paired, mean_difference, pass_at_k
from rewards.tables import Cells, aligned, markdown
from rewards.terminal import Arguments, program
from sft_core.cli import run_ends, user_errors
from sft_core.errors import require
from sft_core.model.source import stages_in
from sft_core.run.checkpoint import write_text

PAIRED_METHOD = (
    "won: wrong in the first, right in the second. In brackets the difference's 95% interval (Newcombe 1998, method "
    "10). p: McNemar's exact test, two-sided, each row's by itself."
)


def paired(first: Sequence[Answered], second: Sequence[Answered]) -> Paired:
    """The paired outcome, by the strict rule, of the same problems in the same order."""
    return Paired.of([a.strict for a in first], [a.strict for a in second])


def sampled(first: Sequence[Answered], second: Sequence[Answered]) -> dict[str, float]:
    """How much pass@1 and pass@k of the samples rose from the first to the second, k being all of them, with 95%
    intervals; nothing where either has no samples."""
    most = min(len(answer.samples) for answer in [*first, *second])
    found: dict[str, float] = {}
    for k in sorted({1, most}) if most else ():
        before, after = ([_passes(answer, k) for answer in answers] for answers in (first, second))
        name = f"pass_at_{k}_gain"
        found[name], found[f"{name}_low"], found[f"{name}_high"] = mean_difference(before, after)
    return found


def _passes(answer: Answered, k: int) -> float:
    return pass_at_k(len(answer.samples), sum(sample.strict for sample in answer.samples), k)


def sampled_lines(found: Mapping[str, float]) -> list[str]:
    """
    >>> sampled_lines({"pass_at_8_gain": 0.25, "pass_at_8_gain_low": 0.201, "pass_at_8_gain_high": 0.299})
    ['pass@8 gain: +25.0 points [+20.1, +29.9]']
    """
    gains = [name for name in found if name.endswith("_gain")]
    points = {name: [100 * found[name + end] for end in ("", "_low", "_high")] for name in gains}
    return [
        f"{name.replace('pass_at_', 'pass@').replace('_', ' ')}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
        for name, (mean, low, high) in points.items()
    ]


def verdict(pair: Paired) -> str:
    """
    >>> print(verdict(Paired(both=20, won=15, lost=3, neither=12)))
    +24.0 points [+7.8, +38.3], 15 won, 3 lost, McNemar's exact p = 0.0075
    """
    return f"{_points(pair)}, {pair.won} won, {pair.lost} lost, McNemar's exact p = {_p(pair)}"


def _points(pair: Paired) -> str:
    low, high = pair.interval
    return f"{100 * pair.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(pair: Paired) -> str:
    return f"{pair.p:.2g}" if pair.p else "< 1e-300"  # smaller than a float


def comparison_cells(first: Sequence[Answered], second: Sequence[Answered], names: tuple[str, str]) -> Cells:
    """The paired comparison of all problems, and of those of each number of steps."""
    rows = {"accuracy": paired(first, second)}
    rows["lenient accuracy"] = Paired.of([a.lenient for a in first], [a.lenient for a in second])
    for steps in sorted({a.steps for a in first if a.steps}):
        at = [i for i, a in enumerate(first) if a.steps == steps]
        rows[f"accuracy, {steps} step{'s' if steps > 1 else ''}"] = paired(
            [first[i] for i in at], [second[i] for i in at]
        )
    cells = [["", "problems", *names, "difference", "won", "lost", "p"]]
    for name, pair in rows.items():
        shares = [f"{(pair.both + alone) / pair.problems:.1%}" for alone in (pair.lost, pair.won)]
        counts = [str(pair.won), str(pair.lost)]
        cells.append([name, str(pair.problems), *shares, _points(pair), *counts, _p(pair)])
    return cells


def changed(first: Sequence[Answered], second: Sequence[Answered], names: tuple[str, str], count: int) -> str:
    """The first problems that were won, and as many that were lost, with both answers."""
    pairs = list(zip(first, second, strict=True))
    shown = []
    for title, won in (("won", True), ("lost", False)):
        found = [(old, new) for old, new in pairs if new.strict == won != old.strict]
        shown += [f"--- {title}\n{side_by_side(old, new, names)}" for old, new in found[:count]]
    return "\n".join(shown)


# --- reading


@dataclass(frozen=True)
class Named:
    """An evaluation under a name short enough for the head of a table."""

    name: str
    path: Path
    answers: list[Answered]


def evaluations(runs: Sequence[Path]) -> list[Named]:
    """The evaluation that each RUN stands for, all in the order of the first one's problems.

    Raises:
        ValueError: a RUN is none; there are not two; they are of different problems.
    """
    if len(runs) == 1:
        files = _heldout(runs[0])
        if len(files) < 2:
            raise ValueError(
                f"{runs[0]}: expected two RUNs, or a GRPO run folder with evaluations before and after"
                f"{stages_in(runs[0])}"
            )
        found = [Named(name, file, read_answers(file)) for name, file in (("before", files[0]), ("after", files[-1]))]
    else:
        names = [chr(ord("A") + i) if len(runs) <= 26 else f"run {i + 1}" for i in range(len(runs))]
        found = [Named(name, run, read_answers(_answers_file(run))) for name, run in zip(names, runs, strict=True)]
    first, *others = found
    return [first, *(replace(other, answers=in_order(other, first)) for other in others)]


def _heldout(run: Path) -> list[Path]:
    """The evaluations that a GRPO run has made, by step."""
    return sorted((run / "heldout").glob("step-*.jsonl"))


def _answers_file(run: Path) -> Path:
    candidates = [run / "answers.jsonl", *_heldout(run)[-1:]] if run.is_dir() else [run]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"{run}: expected an evaluation's run folder (with answers.jsonl), GRPO's (with heldout/), or such a file"
        f"{stages_in(run)}"
    )


def in_order(other: Named, first: Named) -> list[Answered]:
    """The other's answers in the order of the first one's problems.

    Raises:
        ValueError: they are to other problems, with the counts.
    """
    here, there = Counter(map(_problem, first.answers)), Counter(map(_problem, other.answers))
    if here != there:
        counts = f"{(here & there).total()} are in both, {(here - there).total()} in the first alone, "
        counts += f"{(there - here).total()} in the second alone"
        raise ValueError(
            f"{first.path} and {other.path}: expected the same problems; of {here.total()} and {there.total()}, "
            f"{counts} (--task, --eval_file, --eval_problems and --max_prompt_tokens choose them)"
        )
    waiting: defaultdict[tuple[str, str], list[Answered]] = defaultdict(list)
    for answer in reversed(other.answers):  # duplicates are matched in their order
        waiting[_problem(answer)].append(answer)
    return [waiting[_problem(answer)].pop() for answer in first.answers]


def _problem(answer: Answered) -> tuple[str, str]:
    return answer.question, answer.expected


# --- the program


def report(runs: Sequence[Named], as_markdown: bool, show: int) -> str:
    """All tables: each evaluation's summary, then every other one against the first, with problems that changed."""

    def table(cells: Cells) -> str:
        return markdown(cells) if as_markdown else aligned(cells, str.ljust)

    summaries = {run.name: Evaluation(run.answers, math.nan).summary() for run in runs}
    parts = ["\n".join(f"{'- ' * as_markdown}{run.name}: {run.path}" for run in runs)]
    parts += [table(summary_cells(summaries)), method(list(summaries.values()))]
    first, *others = runs
    for other in others:
        names = (first.name, other.name)
        parts.append(f"{'## ' * as_markdown}{other.name} against {first.name}")
        parts.append(table(comparison_cells(first.answers, other.answers, names)))
        parts.append(changed(first.answers, other.answers, names, show))
    return "\n\n".join(part for part in [*parts, PAIRED_METHOD] if part) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Arguments(
        program(), description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="what is compared; the first with each other")
    parser.add_argument("--show", type=int, default=2, help="problems won and lost that are shown; default: 2 of each")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    with run_ends():
        with user_errors():
            given = parser.parse_args(sys.argv[1:] if argv is None else argv)
            require(given.show >= 0, "show", given.show, "0 or more")
            if given.markdown:
                free = given.markdown.parent.is_dir() and not given.markdown.is_dir()
                require(free, "markdown", given.markdown, "a file in a folder that is there")
            runs = evaluations(given.runs)
        print(report(runs, as_markdown=False, show=given.show), end="")
        if given.markdown:
            write_text(given.markdown, "# Comparison of evaluations\n\n" + report(runs, as_markdown=True, show=0))
            print(f"wrote {given.markdown}")


if __name__ == "__main__":
    main()
