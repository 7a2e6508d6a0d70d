"""The forest plot: every experiment's difference to its baseline with its 95% interval, on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.atlas import words
from benchmarks.atlas.estimate import Result, Study
from benchmarks.atlas.records import CHECKS

GREY = "#757575"
LOOKS = {  # colour, marker and meaning; markers, too, so that nothing hangs on colour alone
    "better": ("#0072b2", "^", "better"),
    "worse": ("#d55e00", "v", "worse"),
    "unclear": ("#cc79a7", "D", "not clear: one of many comparisons"),
    "none": (GREY, "o", "no difference found"),
    "check": ("black", "s", "a check, not one of the comparisons"),
}
WIDEST = 0.30  # differences beyond are drawn as an arrow at the edge
ROW = 0.155  # inches
GAP = 0.45  # rows between two questions

Row = tuple[float, Result | None, str]  # place from above, in rows; a result, or the heading of a task


def forest(found: Study) -> Any:
    """Tasks in two columns of like height, their experiments question by question."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    columns = [rows_of(found, tasks) for tasks in halves(found)]
    tall = max(rows[-1][0] for rows in columns) + 1
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(4.45 * len(columns), ROW * tall + 0.9), layout="constrained", squeeze=False
    )
    low, high = limits([result for rows in columns for _, result, _ in rows if result])
    for axis, rows in zip(axes[0], columns, strict=True):
        column(axis, rows, low, high)
        axis.set_ylim(tall, -0.8)
    present = {looks(result) for rows in columns for _, result, _ in rows if result}
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.2, label=told)
        for name, (color, marker, told) in LOOKS.items()
        if name in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        "points of held-out accuracy above or below the baseline, with 95% intervals over seeds and problems",
        fontsize=9.5,
    )
    return figure


def looks(result: Result) -> str:
    return "check" if result.experiment.name in CHECKS else result.verdict


def halves(found: Study) -> list[list[str]]:
    """The tasks, in order, cut where the longer column is shortest; one column for a single task."""
    tasks = found.tasks
    heights = [rows_of(found, [task])[-1][0] + 2 for task in tasks]
    cuts = range(1, len(tasks))
    best = min(cuts, key=lambda cut: max(sum(heights[:cut]), sum(heights[cut:])), default=None)
    return [tasks] if best is None else [tasks[:best], tasks[best:]]


def rows_of(found: Study, tasks: Sequence[str]) -> list[Row]:
    """A heading for each task, then its experiments by question, the checks last."""
    rows: list[Row] = []
    at = 0.0
    for task in tasks:
        rows.append((at, None, task))
        compared = [result for result in found.of(task) if result.difference]
        by_question = sorted(compared, key=lambda result: result.experiment.name in CHECKS)
        questions = dict.fromkeys(question_of(result) for result in by_question)
        for question in questions:
            at += GAP
            for result in by_question:
                if question_of(result) == question:
                    at += 1
                    rows.append((at, result, ""))
        at += 1.6
    return rows


def question_of(result: Result) -> str:
    return "checks" if result.experiment.name in CHECKS else result.experiment.question


def limits(results: Sequence[Result]) -> tuple[float, float]:
    """The scale, in shares: all intervals, but no further than WIDEST on either side."""
    ends = [(result.difference.low, result.difference.high) for result in results if result.difference]
    low = max(-WIDEST, min([-0.02, *(low for low, _ in ends)]))
    return low * 1.05, min(WIDEST, max([0.02, *(high for _, high in ends)])) * 1.05


def column(axis: Any, rows: Sequence[Row], low: float, high: float) -> None:
    """One column of the plot: names to the left, intervals, and their numbers to the right."""
    from matplotlib import ticker

    axis.axvline(0, color="black", linewidth=0.7)
    for place, result, heading in rows:
        if result is None or result.difference is None:
            axis.text(
                -0.035,
                place,
                heading,
                transform=axis.get_yaxis_transform(),
                ha="right",
                va="center",
                fontweight="bold",
                fontsize=8.5,
            )
            continue
        color, marker, _ = LOOKS[looks(result)]
        found = result.difference
        ends = [min(max(end, low), high) for end in (found.low, found.high)]
        axis.plot(ends, [place, place], color=color, linewidth=1.4, solid_capstyle="butt")
        beyond = "<" if found.value < low else ">" if found.value > high else ""
        value = min(max(found.value, low), high)
        axis.plot([value], [place], beyond or marker, color=color, markersize=4.5, clip_on=False)
        axis.text(
            -0.035,
            place,
            result.experiment.name.replace("$", r"\$"),
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=7.5,
        )
        axis.text(
            1.02,
            place,
            words.interval(found, "share", "+"),
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=6.8,
            color=color,
        )
    axis.set_xlim(low, high)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{100 * share:+.0f}" if share else "0"))
    axis.tick_params(labelsize=7.5, length=2)
    axis.grid(axis="x", alpha=0.25)
