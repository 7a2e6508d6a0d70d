"""The atlas in pictures: training curves question by question, TRL beside this project, and `forest`.

Bands run from the lowest to the highest seed. Colours are Okabe and Ito's; lines differ in dashes, too, so that nothing
hangs on colour alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.atlas import words
from benchmarks.atlas.estimate import Study
from benchmarks.atlas.forest import GREY, forest
from benchmarks.atlas.records import BASELINE, CHECKS, TRL, Band, Experiment, band
from benchmarks.plots.sheet import COLORS, DASHES

COLUMNS = 3
ROOM = 1.62  # the width of a panel, of its lines' width: names stand to the right of the lines
AXES = {  # a curve's title, and whether it is a share
    "accuracy": ("right training samples", True),
    "reward": ("reward", False),
    "entropy": ("entropy, nats a token", False),
    "length": ("length, tokens", False),
    "right_length": ("length of right answers", False),
    "wrong_length": ("length of wrong answers", False),
    "truncated": ("answers cut off", True),
    "flat": ("groups that teach nothing", True),
    "clipped": ("clipped tokens", True),
    "kl": ("KL, nats a token", False),
    "gradient": ("norm of the gradient", False),
}


def draw(found: Study, folder: Path, shows: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """Write every picture to `folder`: `curves-TASK.png`, `forest.png`, and `trl.png` where TRL ran.

    Args:
        shows: by question, the curves of which a panel is drawn; a question that is not named shows accuracy alone.
    """
    import matplotlib
    from PIL import Image

    matplotlib.use("agg")
    from matplotlib import pyplot

    figures = {f"curves-{task}": curves(found, task, shows or {}) for task in found.tasks}
    figures["forest"] = forest(found)
    if any(name == TRL for _, name in found.results):
        figures["trl"] = beside_trl(found)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name.replace(' ', '-')}.png")
        figure.savefig(written[-1], dpi=100, metadata={"Software": None})  # the same bytes from each matplotlib
        pyplot.close(figure)
        with Image.open(written[-1]) as drawn:
            few = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(written[-1], optimize=True)  # a third of the bytes
    return written


# --- small multiples of a task


def curves(found: Study, task: str, shows: Mapping[str, Sequence[str]]) -> Any:
    """A panel for each question and curve; the checks share one, the last."""
    from matplotlib import pyplot

    named = {result.experiment.name: result.experiment for result in found.of(task)}
    questions: dict[str, list[Experiment]] = {}
    for experiment in named.values():
        if experiment.name not in CHECKS:
            questions.setdefault(experiment.question, []).append(experiment)
    if checks := [each for name, each in named.items() if name in CHECKS and name != BASELINE]:
        questions["checks"] = checks
    panels = [(question, curve) for question in questions for curve in shows.get(question, ["accuracy"])]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.98 * columns, 2.3 * rows + 0.3), layout="constrained")
    flat = list(np.ravel(axes))
    for axis in flat[len(panels) :]:
        axis.remove()
    for axis, (question, curve) in zip(flat, panels, strict=False):
        base = band(named[BASELINE], curve) if BASELINE in named else None
        panel(axis, curve, base, [(each.name, band(each, curve)) for each in questions[question]])
        axis.set_title(question, fontsize=8.4, fontweight="bold", loc="left")
    note = f"{task}, by step: means over seeds. Grey: the baseline, its band from the lowest to the highest seed"
    figure.suptitle(note, fontsize=9.5)
    _same_scale([axis for axis, (_, curve) in zip(flat, panels, strict=False) if curve == "accuracy"])
    for axis in flat[: len(panels)]:
        label_ends(axis)
    return figure


def panel(axis: Any, curve: str, base: Band | None, lines: Sequence[tuple[str, Band | None]]) -> None:
    """One curve: the baseline in grey under the lines of others. `label_ends` writes the names."""
    from matplotlib import ticker

    if base is not None:
        axis.fill_between(base.steps, base.low, base.high, color=GREY, alpha=0.25, linewidth=0)
        axis.plot(base.steps, base.mean, color=GREY, linewidth=2.2, label=BASELINE)
    for index, (name, found) in enumerate(lines):
        if found is not None:
            looks = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
            axis.plot(found.steps, found.mean, linewidth=1.5, label=name, **looks)
    _dress(axis, curve)
    last = max((line.get_xdata()[-1] for line in axis.get_lines()), default=1)
    axis.set_xlim(0, ROOM * last)
    axis.spines["bottom"].set_bounds(0, last)
    axis.xaxis.set_major_locator(ticker.FixedLocator([tick for tick in axis.get_xticks() if tick <= last]))


def _dress(axis: Any, curve: str) -> None:
    from matplotlib import ticker

    title, share = AXES.get(curve, (curve.replace("rewards/", "reward: "), False))
    axis.set_ylabel(title, fontsize=8)
    axis.tick_params(labelsize=7.5, length=2)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if share:
        axis.yaxis.set_major_locator(ticker.MaxNLocator("auto", steps=[1, 2, 5, 10]))  # 2.5% would be shown as 2%
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=int(high - low < 0.05)))


def _same_scale(axes: Sequence[Any]) -> None:
    """Panels of one quantity are read side by side."""
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def label_ends(axis: Any, size: float = 7.0) -> None:
    """Write each line's name at its end, moved up or down as far as names would overlap."""
    lines = [line for line in axis.get_lines() if np.isfinite(line.get_ydata()).any()]
    low, high = axis.get_ylim()
    names = [textwrap.wrap(line.get_label(), 16) for line in lines]
    ends = [[data[np.isfinite(line.get_ydata())][-1] for data in line.get_data()] for line in lines]
    order = sorted(range(len(lines)), key=lambda at: ends[at][1])
    room = [0.08 * len(names[at]) for at in order]  # heights of the names, of the axis' height
    places = spread([(ends[at][1] - low) / (high - low) for at in order], room)
    for at, place in zip(order, places, strict=True):
        color, (x, y) = lines[at].get_color(), ends[at]
        right = axis.get_xlim()[1] / ROOM
        axis.plot([x, right * 1.06], [y, low + place * (high - low)], color=color, linewidth=0.5, label="_")
        axis.text(
            right * 1.08,
            low + place * (high - low),
            "\n".join(names[at]).replace("$", r"\$"),
            fontsize=size,
            va="center",
            color="#555555" if color == GREY else color,
            linespacing=0.9,
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Middles of labels from bottom to top within 0..1, each near where it is wanted and none over another.

    >>> [round(each, 2) for each in spread([0.5, 0.5, 0.95], [0.1, 0.1, 0.2])]
    [0.45, 0.55, 0.9]
    """
    blocks: list[tuple[list[int], float]] = []  # labels that touch, and where their block begins
    for at, middle in enumerate(wanted):
        blocks.append(([at], middle - heights[at] / 2))
        while True:  # a block that would begin below the end of the one before joins it, at the mean of what both want
            members, start = blocks[-1]
            size = sum(heights[each] for each in members)
            start = min(max(start, 0.0), max(0.0, 1.0 - size))
            blocks[-1] = (members, start)
            if len(blocks) == 1 or start >= blocks[-2][1] + sum(heights[each] for each in blocks[-2][0]) - 1e-9:
                break
            joined = blocks[-2][0] + members
            offsets = np.cumsum([0.0, *(heights[each] for each in joined)])
            middles = [wanted[each] - heights[each] / 2 - offsets[i] for i, each in enumerate(joined)]
            blocks[-2:] = [(joined, float(np.mean(middles)))]
    places = [0.0] * len(wanted)
    for members, start in blocks:
        for each in members:
            places[each], start = start + heights[each] / 2, start + heights[each]
    return places


# --- TRL


def beside_trl(found: Study) -> Any:
    """This project's and TRL's curves with their bands, a row for each task that ran in both."""
    from matplotlib import pyplot

    tasks = [task for task in found.tasks if (task, TRL) in found.results and (task, BASELINE) in found.results]
    figure, axes = pyplot.subplots(
        len(tasks), 3, figsize=(8.9, 2.6 * len(tasks) + 0.5), layout="constrained", squeeze=False
    )
    for row, task in zip(axes, tasks, strict=True):
        runs = {BASELINE: found.of_all_seeds(task), TRL: found.results[task, TRL].experiment}
        for axis, curve in zip(row, ("accuracy", "length", "entropy"), strict=True):
            for name, color, dashes in ((BASELINE, COLORS[0], "-"), (TRL, COLORS[1], "--")):
                if one := band(runs[name], curve):
                    axis.fill_between(one.steps, one.low, one.high, color=color, alpha=0.2, linewidth=0)
                    label = "this project" if name == BASELINE else name
                    axis.plot(one.steps, one.mean, color=color, linestyle=dashes, linewidth=1.8, label=label)
            _dress(axis, curve)
            axis.set_xlabel("step", fontsize=8)
        result = found.results[task, TRL]
        if result.difference:
            told = f"{task}: TRL minus this project, held-out: {words.points(result.difference)}"
            row[0].set_title(told, fontsize=9, loc="left")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False
    )
    return figure
