"""A sheet of panels as a PNG.

Lines differ in colour, dashes and markers at once, and parts of a bar in colour and hatching, so that a picture can be
read by the colour-blind and on grey paper. The colours are Okabe and Ito's (jfly.uni-koeln.de/color).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots.lines import Line, Panel, curve
from benchmarks.plots.panels import PARTS

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (7, 1, 1, 1, 1, 1)), (0, (10, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "")
COLUMNS = 3
CROWD = 3  # more lines than this, and the numbers themselves are not drawn behind their running mean


def style(index: int) -> dict[str, Any]:
    """How line number `index` looks: 42 looks before one returns."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def draw(path: Path, title: str, panels: Sequence[Panel], lines: Sequence[Line], window: int, parts: bool) -> None:
    """
    Args:
        window: how many log lines a running mean is of.
        parts: the first panel shows the parts of a mean step.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    count = len(panels) + parts
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 2.8 * rows + 1), layout="constrained")
    flat = list(np.ravel(axes))
    for axis in flat[count:]:
        axis.remove()
    if parts:
        draw_parts(flat.pop(0), lines)
    for axis, panel in zip(flat, panels, strict=False):
        draw_panel(axis, panel, lines, window)
    figure.suptitle(title, fontsize=13)
    labels = [shortened(line.label, 60) for line in lines]
    handles = [Line2D([], [], **style(index)) for index in range(len(lines))]
    across = max(1, min(len(lines), int(35 * columns / (max(map(len, labels)) + 6))))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=across,
        fontsize=10,
        handlelength=4,
        frameon=False,
        title=legend_title(panels, lines, window),
        title_fontsize=9,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a run named in a script that DejaVu has not
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_panel(axis: Any, panel: Panel, lines: Sequence[Line], window: int) -> None:
    """All lines of one quantity. A band that is not of seeds is drawn where it is an interval, or where one line is."""
    from matplotlib import ticker

    seen = []
    for index, line in enumerate(lines):
        found = curve(line, panel, window)
        if found is None:
            continue
        looks, count = style(index), len(found.steps)
        every = max(1, count // 6)
        start = index * every // max(1, len(lines))  # markers of lines that run close together stand side by side
        if len(line.runs) > 1 or (panel.band and (panel.kind == "eval" or len(lines) == 1)):
            axis.fill_between(found.steps, found.low, found.high, color=looks["color"], alpha=0.18, linewidth=0)
            seen += [found.low, found.high]
        if found.each is not None and window > 1 and not panel.exact and len(lines) <= CROWD:
            axis.plot(found.steps, found.each, color=looks["color"], alpha=0.35, linewidth=0.8)
            seen.append(found.each)
        axis.plot(found.steps, found.middle, markevery=1 if panel.kind == "eval" else (start, every), **looks)
        seen.append(found.middle)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    plain = ticker.FuncFormatter(lambda number, _: f"{number:g}")
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1) if panel.share else plain)
    numbers = np.concatenate(seen) if seen else np.array([])
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        axis.text(0.5, 0.5, "never a number", transform=axis.transAxes, ha="center", fontsize=10)
    elif numbers.min() == numbers.max():  # matplotlib would zoom in on nothing
        value = float(numbers[0])
        axis.set_ylim(*((-0.05, 1.05) if panel.share else (value - 1, value + 1)))
        if not panel.share:
            axis.set_yticks([value])


def draw_parts(axis: Any, lines: Sequence[Line]) -> None:
    """Where a mean step's time goes, a bar for each line."""
    means = [mean_parts(line) for line in lines]
    visible = {name for parts in means for name, seconds in parts.items() if seconds > 0.005 * sum(parts.values())}
    for place, parts in enumerate(means):
        done = 0.0
        for index, (name, seconds) in enumerate(parts.items()):
            looks = {"color": COLORS[index % len(COLORS)], "hatch": HATCHES[index], "edgecolor": "white"}
            axis.barh(place, seconds, left=done, label=name if name in visible and not place else None, **looks)
            done += seconds
    names = [shortened(line.label, 22) for line in lines]
    axis.set_yticks(range(len(lines)), names if len(lines) > 1 else [""], fontsize=8)
    axis.invert_yaxis()
    axis.set_title("the parts of a mean step", fontsize=11)
    axis.set_xlabel("seconds", fontsize=9)
    axis.tick_params(axis="x", labelsize=9)
    if visible:
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=3, fontsize=8, frameon=False)


def mean_parts(line: Line) -> dict[str, float]:
    """Seconds by part, the rest named so; all of a step is the rest where its parts were not logged."""
    means = {name: np.mean([run.mean(field) for run in line.runs]) for name, field in PARTS.items()}
    parts = {name: float(mean) for name, mean in means.items() if not np.isnan(mean)}
    rest = float(np.mean([run.mean("time_per_step_s") for run in line.runs])) - sum(parts.values())
    return {**dict.fromkeys(PARTS, 0.0), **parts, "not divided": max(0.0, 0.0 if math.isnan(rest) else rest)}


def legend_title(panels: Sequence[Panel], lines: Sequence[Line], window: int) -> str:
    """What lines and bands are."""
    notes = []
    single = any(len(line.runs) == 1 for line in lines)
    if window > 1:
        each = single and len(lines) <= CROWD
        notes.append(f"lines: running mean of {window} log lines" + (", thin: each" if each else ""))
    if any(len(line.runs) > 1 for line in lines):
        notes.append("seeds: their mean, and a band from the lowest to the highest")
    if single and any(panel.kind == "eval" and panel.band for panel in panels):
        notes.append("band of a run's accuracy: 95% interval (Wilson)")
    return "; ".join(notes)


def shortened(text: str, most: int) -> str:
    """A name for the legend, without what matplotlib takes for mathematics or leaves out (a leading _)."""
    text = text if len(text) <= most else f"{text[: most // 2]}...{text[3 - most // 2 :]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
