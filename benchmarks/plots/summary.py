"""A run in a few lines of text."""

from __future__ import annotations

import math
from statistics import fmean

from benchmarks.plots.lines import Line
from benchmarks.plots.panels import PARTS
from grpo_core.doctor.readlog import Run


def summary(run: Run) -> str:
    """What it was, what it reached, and what that took. What the log does not hold is left out."""
    about = [f"{'GRPO' if run.grpo else 'SFT'}, seed {run.setting('seed')}"]
    if device := run.train[-1].get("device"):
        about.append(device)
    rows = [f"{run.name} ({', '.join(about)})", _steps(run), _course(run), _heldout(run), _time(run), _tokens(run)]
    return "\n  ".join(row for row in rows if row)


def seeds(line: Line) -> str:
    """What the runs of a line have in common: the mean over seeds, the lowest and the highest."""
    rows = [line.label]
    ends = [
        (f"{'first' if at == 0 else 'last'} held-out accuracy", [_accuracy(run, at) for run in line.runs])
        for at in (0, -1)
    ]
    ends.append(("reward, last fifth of the lines", [run.last("reward_mean") for run in line.runs]))
    for name, values in ends:
        if not any(map(math.isnan, values)):
            show = "{:.1%}" if "accuracy" in name else "{:.3g}"
            mean, low, high = (show.format(value) for value in (fmean(values), min(values), max(values)))
            rows.append(f"{name}: mean {mean}, lowest {low}, highest {high}")
    return "\n  ".join(rows)


def _accuracy(run: Run, at: int) -> float:
    found = [line["accuracy"] for line in run.eval if line.get("accuracy") is not None]
    return found[at] if found else math.nan


def _steps(run: Run) -> str:
    last, asked = run.train[-1]["step"], run.setting("max_steps")
    of = f" of {asked}" if asked and asked != last else ""
    return f"steps     {last}{of}, {len(run.train)} logged, {run.train[-1].get('skipped_steps', 0)} skipped"


def _course(run: Run) -> str:
    """The reward, or the loss of SFT: single log lines, and means that do not hang on one of them."""
    name, best = ("reward_mean", max) if run.grpo else ("loss", min)
    known = [(line[name], line["step"]) for line in run.train if line.get(name) is not None]
    if not known:
        return ""
    top, step = best(known, key=lambda pair: pair[0])
    label = "reward  " if run.grpo else "loss    "
    means = f"; mean of the first fifth {run.first(name):.3g}, of the last {run.last(name):.3g}"
    return f"{label}  first {known[0][0]:.3g}, last {known[-1][0]:.3g}, best {top:.3g} (step {step}){means}"


def _heldout(run: Run) -> str:
    known = [line for line in run.eval if line.get("accuracy") is not None]
    if not known:
        losses = [line["heldout_loss"] for line in run.eval if line.get("heldout_loss") is not None]
        ends = [losses[0], losses[-1]][: len(losses)] if losses else []
        return f"held out  loss {' -> '.join(f'{loss:.3g}' for loss in ends)}" if ends else ""
    best = max(known, key=lambda line: line["accuracy"])
    shares = " -> ".join(_interval(line) for line in (known[0], known[-1])[: len(known)])
    steps = f"steps {known[0]['step']} and {known[-1]['step']}" if len(known) > 1 else f"step {known[0]['step']}"
    problems = f" of {known[-1]['problems']} problems" if "problems" in known[-1] else ""
    return f"held out  {shares}{problems} ({steps}; 95% intervals); best {best['accuracy']:.1%} (step {best['step']})"


def _interval(line: dict[str, float]) -> str:
    ends = [line.get("accuracy_low"), line.get("accuracy_high")]
    bounds = "" if None in ends else " [" + ", ".join(f"{100 * (end or 0.0):.1f}" for end in ends) + "]"
    return f"{line['accuracy']:.1%}{bounds}"


def _time(run: Run) -> str:
    whole = run.values("time_per_step_s")
    if not whole:
        return ""
    parts = [f"{name} {run.mean(field):.3g}" for name, field in PARTS.items() if not math.isnan(run.mean(field))]
    of = f": {', '.join(parts)}" if parts else ""
    return f"time      {fmean(whole):.3g} s a step{of}; {sum(whole):.3g} s for the logged steps"


def _tokens(run: Run) -> str:
    name, doing = ("tokens_generated", "generated") if run.grpo else ("tokens", "learned")
    tokens, seconds = run.values(name), run.values("generation_time_s" if run.grpo else "time_per_step_s")
    if not tokens:
        return ""
    rate = f", {sum(tokens) / sum(seconds):,.0f} a second" if len(seconds) == len(tokens) and sum(seconds) else ""
    return f"tokens    {sum(tokens):,} {doing} in the logged steps, {fmean(tokens):,.0f} a step{rate}"
