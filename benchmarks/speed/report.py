"""The report of an alternating run: a table, ratios pair by pair, raw numbers, reward against time as a picture."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.alternation import Pairs, Step
from rewards.tables import markdown
from sft_core.learn.footprint import GB
from sft_core.run.provenance import provenance, shown_flags

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the mean reward
WINDOW = 5  # steps that a reward is averaged over before it is compared with a level


def report(name: str, flags: Sequence[str], pairs: Pairs) -> str:
    """Markdown."""
    ratios, origin = pairs.ratios(), provenance(None)
    versions = ", ".join(f"{package} {number}" for package, number in origin["versions"].items())
    lines = [
        f"# Speed: `{name}`",
        "",
        markdown(_sides(pairs)),
        "",
        f"TRL's seconds over this project's, pair by pair ({len(ratios)} pairs after {pairs.warm_up} of warm-up): "
        f"median **{statistics.median(ratios):.2f}**, from {min(ratios):.2f} to {max(ratios):.2f}. "
        f"Peak memory: **{pairs.memory_ratio():.2f}** of TRL's.",
        "",
    ]
    if any(reached["ours"] for reached in learning(pairs)):
        lines += [f"Seconds of steps until the reward, averaged over {WINDOW} steps, reaches a level:", ""]
        lines += [markdown(_levels(pairs)), ""]
    lines += [f"`python -m benchmarks.compare_trl --speed {shown_flags([name, *flags])}`", ""]
    lines += [f"{'; '.join(origin['hardware'])}; {versions}; commit {origin['commit']}; {origin['started']}"]
    return "\n".join(lines)


def save(path: Path, text: str, pairs: Pairs) -> None:
    """The report, and beside it the raw numbers and, where rewards moved, the picture."""
    path.write_text(text + "\n")
    raw = {"ours": pairs.ours, "theirs": pairs.theirs, "warm_up": pairs.warm_up}
    path.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    if any(reached["ours"] for reached in learning(pairs)):
        draw(path.with_suffix(".png"), pairs)


def learning(pairs: Pairs) -> list[dict[str, Any]]:
    """Seconds of steps that each side needs to reach each of LEVELS; None: never."""
    reached = []
    for level in LEVELS:
        ours, theirs = (seconds_until(level, steps) for steps in (pairs.ours, pairs.theirs))
        reached.append({"level": level, "ours": ours, "theirs": theirs})
    return reached


def seconds_until(level: float, steps: Sequence[Step]) -> float | None:
    """Time of the steps up to the first whose reward, averaged over the last WINDOW, is at least `level`."""
    for end in range(WINDOW, len(steps) + 1):
        if statistics.mean(step["reward"] for step in steps[end - WINDOW : end]) >= level:
            return sum(step["seconds"] for step in steps[:end])
    return None


def draw(path: Path, pairs: Pairs) -> None:
    """Reward against seconds of steps, both sides."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, steps, color in (("this project", pairs.ours, "#0072b2"), ("TRL", pairs.theirs, "#d55e00")):
        seconds = list(itertools.accumulate(step["seconds"] for step in steps))
        axis.plot(seconds, [step["reward"] for step in steps], color=color, alpha=0.35, linewidth=1)
        means = [statistics.mean(s["reward"] for s in steps[max(0, i - WINDOW) : i]) for i in range(1, len(steps) + 1)]
        axis.plot(seconds, means, color=color, label=f"{name}, {len(steps)} steps")
    axis.set(xlabel="seconds of steps", ylabel=f"mean reward (thick: of {WINDOW} steps)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _sides(pairs: Pairs) -> list[list[str]]:
    """A line for each side, the warm-up left out."""
    rows = [["", "s a step (median)", "of it sampling", "tokens/s", "tokens a step", "peak memory of the process"]]
    for name, steps in (("this project", pairs.ours), ("TRL", pairs.theirs)):
        timed = steps[pairs.warm_up :]
        seconds, sampling = (
            statistics.median(step[key] for step in timed) for key in ("seconds", "generation_seconds")
        )
        tokens = statistics.mean(step["tokens"] for step in timed)
        rate = sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed)
        peak = steps[-1]["peak_bytes"] / GB
        rows.append([name, f"{seconds:.2f}", f"{sampling:.2f}", f"{rate:.0f}", f"{tokens:.0f}", f"{peak:.2f} GB"])
    return rows


def _levels(pairs: Pairs) -> list[list[str]]:
    rows = [["reward", "this project", "TRL", "ratio"]]
    for reached in learning(pairs):
        ours, theirs = reached["ours"], reached["theirs"]
        ratio = f"{theirs / ours:.2f}" if ours and theirs else ""
        rows.append([f"{reached['level']:.1f}", *(f"{s:.1f} s" if s else "never" for s in (ours, theirs)), ratio])
    return rows
