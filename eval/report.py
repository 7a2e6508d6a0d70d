"""Evaluations as people read them: tables, in the terminal and as Markdown, and problems with their answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from eval.evaluate import Answered
from rewards.tables import aligned
from sft_core.run.trackers import indented

METHOD = "Greedy answers; in brackets 95% intervals over problems (Wilson's)."
SAMPLED_METHOD = " pass@k and maj@k: of samples; Wilson's interval at the mean's effective sample size."


def method(summaries: Sequence[dict[str, Any]]) -> str:
    """What the figures in a table mean."""
    return METHOD + SAMPLED_METHOD * any("samples" in summary for summary in summaries)


def summary_table(columns: dict[str, dict[str, Any]]) -> str:
    """Summaries side by side, one column each, as aligned text."""
    return aligned(summary_cells(columns), str.ljust)


def summary_cells(columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Summaries side by side, one column each; blank where a summary lacks samples or steps that another one has."""
    rows = {
        "accuracy": lambda s: share(s, "accuracy"),
        "lenient accuracy": lambda s: share(s, "lenient_accuracy"),
        "format kept": lambda s: share(s, "format_rate"),
        "worked answers": lambda s: share(s, "worked_share"),
        "mean length": lambda s: f"{s['mean_length']:.1f} tokens",
        "truncated": lambda s: share(s, "truncated_share"),
        "problems": lambda s: f"{s['problems']}",
    }
    cells = [["", *columns]] + [[name, *(show(s) for s in columns.values())] for name, show in rows.items()]
    for kind in ("pass", "maj"):
        for k in _numbers(columns, kind + r"_at_(\d+)"):
            cells.append([f"{kind}@{k}", *(share(s, f"{kind}_at_{k}") for s in columns.values())])
    for steps in _numbers(columns, r"steps/(\d+)/accuracy"):
        shares = [share(s, f"steps/{steps}/accuracy") for s in columns.values()]
        counts = [s.get(f"steps/{steps}/problems") for s in columns.values()]
        of = [f"{text} of {count}" if text else "" for text, count in zip(shares, counts, strict=True)]
        cells.append([f"accuracy, {steps} step{'s' if steps > 1 else ''}", *of])
    return cells


def _numbers(columns: dict[str, dict[str, Any]], pattern: str) -> list[int]:
    """The number in each key of this pattern, of all summaries."""
    found = [re.fullmatch(pattern, key) for summary in columns.values() for key in summary]
    return sorted({int(match.group(1)) for match in found if match})


def share(summary: dict[str, Any], key: str) -> str:
    """
    >>> share({"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}, "accuracy")
    '50.0% [40.0%, 60.0%]'
    >>> share({"format_rate": 1.0}, "format_rate"), share({}, "format_rate")
    ('100.0%', '')
    """
    if key not in summary:
        return ""
    low, high = summary.get(f"{key}_low"), summary.get(f"{key}_high")
    return f"{summary[key]:.1%}" + (f" [{low:.1%}, {high:.1%}]" if low is not None and high is not None else "")


def side_by_side(old: Answered, new: Answered, names: Sequence[str]) -> str:
    """A problem and both answers to it."""
    lines = {"Question": old.question, "Expected": old.expected, names[0]: old.response, names[1]: new.response}
    width = max(10, 1 + max(map(len, lines)))
    return "\n".join(f"{name + ':':{width}} {indented(text, width + 1)}" for name, text in lines.items())
