"""What can be broken, unrewarded or impossible to learn, each as a function from a run's log to a `Finding` or None.

A quantity is compared between the first and the last fifth of the log's lines, and a change is measured in standard
errors of the noise from line to line (`Change.z` in readlog.py).
"""

from __future__ import annotations

import math

from grpo_core.config import GRPOConfig
from grpo_core.doctor.finding import (
    ALIKE,
    CUT_OFF,
    GAP,
    NOTICED,
    PENALTIES,
    RATIO_OFF,
    SATURATED,
    SKIPPED,
    SOLVED,
    UNSOLVED,
    Finding,
    always,
    some,
)
from grpo_core.doctor.readlog import Run

# --- what is broken whatever the settings


def skipped_steps(run: Run) -> Finding | None:
    skipped = max(run.values("skipped_steps"), default=0)
    updates = run.train[-1]["step"] * (run.setting("mu") if "mu" in run.config else 1)
    if skipped <= SKIPPED * updates:
        return None
    steps = [line["step"] for line in run.train if line.get("grad_norm") is None]
    return Finding(
        "skipped_steps",
        "Updates are skipped: their gradient is not finite.",
        f"{skipped:g} of {updates} updates; gradient norm not finite in steps {some(steps)}",
        "lower --lr and --max_grad_norm; --precision float32 (or bf16) tells whether fp16 overflows; look for a term "
        "that is infinite: a reward of 1e30, a --beta far too large",
    )


def first_ratio(run: Run) -> Finding | None:
    low, high = min(run.values("ratio_first_min"), default=1.0), max(run.values("ratio_first_max"), default=1.0)
    if max(1 - low, high - 1) <= RATIO_OFF:
        return None
    return Finding(
        "first_ratio",
        "The probability ratio is not 1 at a step's first update, though nothing has moved yet.",
        f"ratio_first_min down to {low:.4g}, ratio_first_max up to {high:.4g}",
        "a bug: old and new log-probabilities come from different computations. Look for dropout, another temperature, "
        "or log-probabilities kept in half precision",
    )


def sampler_gap(run: Run) -> Finding | None:
    gap, bound = run.mean("sampler_gap_mean"), GAP.get(run.setting("precision"), GAP[""])
    if not gap > bound:
        return None
    cut = [name for name in ("top_k", "top_p", "min_p") if run.setting(name) != getattr(GRPOConfig, name)]
    flags = " ".join(f"--{name} {run.setting(name):g}" for name in cut)
    cause = f"{flags} cuts the sampler's distribution and not the learner's: leave it out" if cut else ""
    return Finding(
        "sampler_gap",
        "Sampler and learner disagree: the samples come from another distribution than the learner's.",
        f"sampler_gap_mean {gap:.3g} nats a token (rounding stays below {bound:g}), "
        f"sampler_gap_max up to {max(run.values('sampler_gap_max'), default=math.nan):.3g}",
        cause or "a bug (other weights, another temperature, a wrong mask), or rounding: try --precision float32",
    )


# --- why nothing is rewarded


def everything_truncated(run: Run) -> Finding | None:
    if not run.first("truncated_share") >= CUT_OFF:
        return None
    return Finding(
        "everything_truncated",
        "Completions do not end: the budget cuts them off.",
        f"{run.trend('truncated_share')}; the budget is {run.setting('max_completion_tokens')} tokens",
        "raise --max_completion_tokens; a model that never ends by itself needs SFT first; a shorter --system_prompt "
        "format, or soft_overlong_reward_func among --rewards, asks for shorter answers",
    )


def format_never_earned(run: Run) -> Finding | None:
    dead = [name for name in run.functions if run.only_value(name) is not None and name not in PENALTIES]
    if not run.extracted <= NOTICED or not dead:
        return None
    return Finding(
        "format_never_earned",
        f"The model does not answer in the format: --prompt_format {run.setting('prompt_format')} is never followed.",
        f"an answer was found in {run.extracted:.0%} of the completions; never rewarded: {', '.join(dead)}",
        "choose the --prompt_format that the model was taught, or teach it (SFT first, --shots 1); a reward that pays "
        "for parts of the format (xmlcount_reward_func) gives it something to climb",
    )


def never_rewarded(run: Run) -> Finding | None:
    constant = {name: run.only_value(name) for name in run.functions}
    if not constant or None in constant.values():
        return None
    share, accuracy = run.extracted, run.mean("accuracy")
    answers = "" if math.isnan(share) else f"; an answer was found in {share:.0%} of the completions"
    why, advice = "", "an easier --task or --difficulty, SFT first, or a --rewards function that pays for parts"
    if any(value and value > 0 for value in constant.values()):
        advice = "all rewards are equal: a harder --task, or --rewards that tell one completion from another"
    elif accuracy > 0:
        why = f"; yet by the rule of --prompt_format {run.setting('prompt_format')} {accuracy:.0%} are right"
        advice = "these rewards read another format than --prompt_format asks for: change one of the two"
    return Finding(
        "never_rewarded",
        "Every completion gets the same reward: there is nothing to learn from.",
        f"{always(constant)} (steps {run.train[0]['step']}-{run.train[-1]['step']}){answers}{why}",
        advice,
    )


def dead_reward(run: Run) -> Finding | None:
    dead = {}
    for name in run.functions:
        value, std = run.mean(f"rewards/{name}"), run.mean(f"rewards_std/{name}")
        if run.only_value(name) is not None or 0 <= std <= SATURATED * value:
            dead[name] = value
    # Where all functions are constant, the whole reward is at fault, and other findings say so.
    if len(dead) == len(run.functions) or not dead.keys() - PENALTIES:
        return None
    return Finding(
        "dead_reward",
        "A reward function gives (nearly) every completion the same value, so it cancels out of the advantages.",
        always({name: value for name, value in dead.items() if name not in PENALTIES}),
        "at 0: it never fires, look at completions.jsonl for what it misses; above: it is earned already, leave it out "
        "of --rewards",
    )


# --- why the groups teach nothing


def groups_alike(run: Run) -> Finding | None:
    """Too easy, too hard, or sampled too alike."""
    if not run.mean("zero_variance_share") >= ALIKE or not run.first("zero_variance_share") >= ALIKE / 2:
        return None
    accuracy = run.mean("accuracy")
    wasted = sum(run.values("zero_variance_tokens"))
    evidence = f"{run.trend('zero_variance_share')}, with {wasted:g} tokens; mean accuracy {accuracy:.0%}"
    more = "--dynamic_sampling 3 replaces such groups"
    if accuracy >= SOLVED:
        advice = f"a harder --task or --difficulty; {more}"
        return Finding("too_easy", "The task is too easy: whole groups are right.", evidence, advice)
    if accuracy <= UNSOLVED:
        advice = f"an easier --task or --difficulty, SFT first; --mu 4 learns more from the few right answers; {more}"
        return Finding("too_hard", "The task is too hard: whole groups are wrong.", evidence, advice)
    advice = f"--temperature 1 if it is lower; nothing, if accuracy rises; {more}"
    return Finding("groups_alike", "The completions of a group get equal rewards.", evidence, advice)
