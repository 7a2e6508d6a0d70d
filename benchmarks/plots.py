"""Learning curves of one or more GRPO runs as a PNG. `python -m benchmarks.plots RUN [RUN ...] --output curve.png`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_core.cli import user_errors

# (kind of log line, field, title); evaluations are drawn with their 95% interval where they have one
PANELS = (
    ("train", "reward_mean", "mean reward of the samples"),
    ("eval", "accuracy", "held-out accuracy, greedy"),
    ("eval", "worked_share", "held-out answers that show their working"),
    ("eval", "format_rate", "held-out answers in the format"),
    ("train", "length_mean", "mean length of the samples (tokens)"),
    ("train", "truncated_share", "share of samples cut off by the budget"),
    ("train", "entropy", "entropy (nats per token)"),
    ("train", "kl", "KL to the reference (nats per token)"),
    ("train", "grad_norm", "gradient norm before clipping"),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl.

    Raises:
        ValueError: no log there, or an empty one.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{run}: holds no log.jsonl, so it is not a run folder")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not any(record["kind"] == "train" for record in records):
        raise ValueError(f"{path}: holds no training step yet")
    return records


def draw(runs: Sequence[Path], output: Path) -> None:
    """Write the panels of all runs to one picture."""
    logs = {str(run): read_log(run) for run in runs}
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("benchmarks.plots needs matplotlib: pip install '.[plots]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(13, 9), layout="constrained")
    for axis, (kind, field, title) in zip(axes.flat, PANELS, strict=True):
        for (name, records), color in zip(logs.items(), COLORS * len(logs), strict=False):
            points = [(r["step"], r[field], r) for r in records if r["kind"] == kind and r.get(field) is not None]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axis.plot(steps, values, color=color, label=name, marker="o" if kind == "eval" else None, markersize=3)
            if field == "accuracy":
                low, high = ([p[2][f"accuracy_{end}"] for p in points] for end in ("low", "high"))
                axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    if len(logs) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="the picture to write")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with user_errors():
        draw(arguments.runs, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
