"""What is wrong with this run? `python -m grpo_core.doctor RUN`

Reads a run folder of GRPO or SFT (config.yaml, log.jsonl, completions.jsonl where there is one) and says in words what
is wrong, causes before consequences, with the numbers that show it and the flags to try. Reads only; needs no model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_core.doctor import findings as symptoms
from grpo_core.doctor import movement
from grpo_core.doctor.finding import APART, SOLVED, Finding
from grpo_core.doctor.measured import measured
from grpo_core.doctor.readlog import LEAST_LINES, Run, read_run
from rewards.terminal import Arguments
from sft_core.cli import run_ends, user_errors

Symptom = Callable[[Run], Finding | None]

# Causes before consequences.
GRPO: tuple[Symptom, ...] = (
    *(symptoms.skipped_steps, symptoms.first_ratio, symptoms.sampler_gap),
    *(symptoms.everything_truncated, symptoms.format_never_earned, symptoms.never_rewarded, symptoms.dead_reward),
    *(movement.clipped, movement.lr_too_high, symptoms.groups_alike, movement.kl_explodes),
    *(movement.length_to_budget, movement.reward_hacking, movement.entropy_collapse),
    *(movement.heldout_falls, movement.reward_flat),
)
SFT: tuple[Symptom, ...] = (symptoms.skipped_steps, movement.sft_diverges, movement.sft_loss_flat)

_UNREWARDED = ("everything_truncated", "format_never_earned", "never_rewarded")
_BROKEN = ("skipped_steps", "first_ratio", "sampler_gap", "clipped", "lr_too_high")
# A finding is reported as a consequence of the first of these that was found, too.
CAUSES: dict[str, tuple[str, ...]] = {
    "format_never_earned": ("everything_truncated",),
    "never_rewarded": ("everything_truncated", "format_never_earned"),
    "dead_reward": ("everything_truncated", "format_never_earned"),
    "too_easy": (),
    "too_hard": (*_UNREWARDED, *_BROKEN),
    "groups_alike": (*_UNREWARDED, *_BROKEN),
    "clipped": ("first_ratio",),
    "lr_too_high": ("skipped_steps", "first_ratio", "sampler_gap", "clipped"),
    "kl_explodes": _BROKEN,
    "entropy_collapse": (*_BROKEN, "kl_explodes", "reward_hacking"),
    "length_to_budget": (*_BROKEN, "kl_explodes"),
    "reward_hacking": ("kl_explodes", "length_to_budget"),
    "heldout_falls": ("lr_too_high", "length_to_budget", "reward_hacking"),
    "reward_flat": (*_UNREWARDED, *_BROKEN),
}

# The main numbers, and whether each is a share.
NUMBERS = {
    "reward_mean": ("reward", False),
    "accuracy": ("accuracy of the samples", True),
    "truncated_share": ("completions cut off", True),
    "zero_variance_share": ("groups that teach nothing", True),
    "adv_abs_mean": ("mean |advantage|", False),
    "grad_norm": ("gradient norm", False),
    "entropy": ("entropy, nats a token", False),
    "length_mean": ("length in tokens", False),
    "loss": ("loss", False),
}


def findings(run: Run) -> list[Finding]:
    """All that is found, causes first, each with the cause that it probably follows from."""
    found = [finding for symptom in (GRPO if run.grpo else SFT) if run.train and (finding := symptom(run))]
    names = {finding.name for finding in found}
    causes = {name: next((cause for cause in CAUSES.get(name, ()) if cause in names), "") for name in names}
    return [dataclasses.replace(finding, follows=causes[finding.name]) for finding in found]


def notes(run: Run) -> list[str]:
    """What is normal, but often taken for a fault."""
    lines = run.train
    if not lines:
        return ["No step has been logged: nothing can be told."]
    found, last, steps = [], lines[-1]["step"], run.setting("max_steps") or 0
    if len(lines) < LEAST_LINES:
        found.append(
            f"Too short to tell a trend: {len(lines)} log lines of the {LEAST_LINES} needed (--max_steps, --log_every)."
        )
    if last < steps:
        found.append(f"The run stopped at step {last} of {steps}, or is still running.")
    return found + (_grpo_notes(run) if run.grpo else [])


def _grpo_notes(run: Run) -> list[str]:
    found = []
    if run.setting("mu") == 1 and not run.setting("beta"):
        found.append(
            "A loss near 0, or one that does not fall, is normal: with --mu 1 and --beta 0 the ratio is 1 and the "
            "loss's value is minus the tokens' mean advantage, whatever has been learned. Look at the reward."
        )
    if run.setting("mu") == 1 and not math.isnan(run.mean("ratio_max")):
        found.append("A ratio of exactly 1 and nothing clipped is normal with --mu 1: one update per batch.")
    if run.setting("shuffle_rewards"):
        found.append("--shuffle_rewards: a control experiment. Its reward is not meant to rise.")
    if run.heldout().last - run.last("accuracy") > APART:
        greedy, sampled = run.heldout().last, run.last("accuracy")
        found.append(
            f"Held-out answers are greedy, and {greedy:.1%} of them right; samples are drawn at --temperature "
            f"{run.setting('temperature'):g}, and {sampled:.1%} right. Both are true: greedy decoding takes the "
            "likeliest token each time, so a way of answering that is a little more likely than another wins always. "
            "docs/sharpening.md says what that means."
        )
    if run.last("accuracy") >= SOLVED and run.first("accuracy") < SOLVED:
        found.append("The task is nearly solved; a harder one would teach more.")
    return found


def numbers(run: Run) -> dict[str, tuple[float, float]]:
    """First and last fifth of the main numbers that were logged."""
    pairs = {name: (run.first(name), run.last(name)) for name in NUMBERS}
    return {name: pair for name, pair in pairs.items() if not all(map(math.isnan, pair))}


def report(run: Run) -> str:
    """The report as text, 100 columns wide."""
    found, lines = findings(run), [_title(run), ""]
    if not found:
        lines += ["Nothing wrong found." if run.train else "Nothing was found, for nothing was logged.", ""]
    for number, finding in enumerate(found, 1):
        lines += _wrapped(f"{number}. {finding.what}", " " * 3)
        lines += _wrapped(f"   seen: {finding.evidence}", " " * 9)
        lines += _wrapped(f"   try:  {finding.advice}", " " * 9)
        if where := measured(finding.name):
            lines += _wrapped(f"   tried: {where}", " " * 9)
        if finding.follows:
            cause = 1 + [other.name for other in found].index(finding.follows)
            lines.append(f"   Probably a consequence of {cause}.")
        lines.append("")
    lines += _table(run)
    for note in notes(run):
        lines += _wrapped(f"note: {note}", " " * 6)
    return "\n".join(lines).rstrip()


def _title(run: Run) -> str:
    kind = "GRPO" if run.grpo else "SFT"
    if not run.train:
        return f"{run.name}: {kind}"
    return f"{run.name}: {kind}, steps {run.train[0]['step']} to {run.train[-1]['step']}, {len(run.train)} log lines"


def _table(run: Run) -> list[str]:
    rows = [f"{'':26} {'first fifth':>12} {'last fifth':>12}"] if run.train else []
    for name, (first, last) in numbers(run).items():
        label, share = NUMBERS[name]
        shown = [f"{value:.1%}" if share else f"{value:.4g}" for value in (first, last)]
        rows.append(f"{label:26} {shown[0]:>12} {shown[1]:>12}")
    if not math.isnan(run.heldout().last):
        rows.append(f"{'held-out accuracy':26} {run.heldout().first:>12.1%} {run.heldout().last:>12.1%}")
    return [*rows, ""]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False)


def as_json(run: Run) -> dict[str, Any]:
    """The same as `report`, as JSON; a number that is not finite is null."""
    pairs = {name: [None if math.isnan(value) else value for value in pair] for name, pair in numbers(run).items()}
    return {
        "run": run.name,
        "kind": "grpo" if run.grpo else "sft",
        "steps": [run.train[0]["step"], run.train[-1]["step"]] if run.train else [],
        "findings": [{**dataclasses.asdict(finding), "measured": measured(finding.name)} for finding in findings(run)],
        "notes": notes(run),
        "numbers": pairs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Arguments(prog="python -m grpo_core.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of grpo_core.train or sft_core.train")
    parser.add_argument("--json", action="store_true", help="findings, notes and numbers as JSON")
    with run_ends(), user_errors():
        given = parser.parse_args(sys.argv[1:] if argv is None else argv)
        run = read_run(given.run)
        print(json.dumps(as_json(run), indent=2, allow_nan=False) if given.json else report(run))


if __name__ == "__main__":
    main()
