"""What can be wrong with a run, each as a function from its log to a `Finding` or None.

A quantity is compared between the first and the last fifth of the log's lines, and a change is told in standard errors
of the noise from line to line (`Change.z` in readlog.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_core.config import GRPOConfig
from grpo_core.objective import LOSSES
from grpo_core.readlog import Change, Run

MOVED = 3.0  # standard errors; by chance in one flat quantity of 400
STILL = 2.0  # standard errors; a flat quantity stays within them 19 times in 20
FELL = 4.0  # as MOVED, but a peak is the best of many windows: its height is luck in part
CUT_OFF = 0.8  # share of completions; what ends by itself is then the exception
ALIKE = 0.7  # share of groups that teach nothing: three in four samples are wasted
SOLVED = 0.9  # accuracy; a group of 8 is then all right nearly every other time
UNSOLVED = 0.15  # accuracy; more, and eight samples of a prompt are rarely all wrong
NOTICED = 0.05  # share of completions with an answer; less is an accident, not a habit
NO_LR = 1e-7  # AdamW moves a weight by about lr a step: a thousand steps would not show in a weight of 0.02
SATURATED = 0.05  # of a reward's value, its spread: one completion in 400 differs
SKIPPED = 0.02  # share of the updates; a stray one is no illness
RATIO_OFF = 1e-3  # of a ratio that is 1 by definition; float32 rounds at 1e-7
GAP = {"float32": 1e-3, "": 2e-2}  # nats a token, mean; float32 rounds to 1e-6, bf16 (8 bits) to some 1e-2
# Share of the ratios in groups that differ; PPO's users take 0.1 to 0.2 for much, GSPO clips 0.15 by intent.
CLIPPED = {"token": 0.1, "sequence": 0.3}
KL_FAR = 1.0  # nats a token; the samples are then e times as likely as under the reference
ENTROPY_LEFT = 0.25  # of the first fifth's
ENTROPY_LOW = 0.05  # nats a token; below it eight samples of a prompt are mostly one text
EXPLODED = 10.0  # times the first fifth's gradient norm
LOOSENED = 3.0  # times the first fifth's entropy
BUDGET = 0.8  # of the budget, in the mean
LONGER = 1.3  # times the first fifth's length
LOSS_UP = 1.3  # times the best loss of SFT
PENALTIES = {"soft_overlong_reward_func"}  # meant to be 0


@dataclass(frozen=True)
class Finding:
    """What is wrong, the numbers that say so, what to try; `follows` names the finding that probably causes it."""

    name: str
    what: str
    evidence: str
    advice: str
    follows: str = ""


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
        f"{skipped:g} of {updates} updates; gradient norm not finite in steps {_some(steps)}",
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
        "Sampler and learner disagree: what is learned from was sampled from another distribution.",
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
        f"{run.told('truncated_share')}; the budget is {run.setting('max_completion_tokens')} tokens",
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
        advice = "all is paid alike: a harder --task, or --rewards that tell one completion from another"
    elif accuracy > 0:
        why = f"; yet by the rule of --prompt_format {run.setting('prompt_format')} {accuracy:.0%} are right"
        advice = "these rewards look for another format than --prompt_format asks for: change one of the two"
    return Finding(
        "never_rewarded",
        "Every completion gets the same reward: there is nothing to learn from.",
        f"{_always(constant)} (steps {run.train[0]['step']}-{run.train[-1]['step']}){answers}{why}",
        advice,
    )


def dead_reward(run: Run) -> Finding | None:
    dead = {}
    for name in run.functions:
        value, spread = run.mean(f"rewards/{name}"), run.mean(f"rewards_std/{name}")
        if run.only_value(name) is not None or 0 <= spread <= SATURATED * value:
            dead[name] = value
    # Where all say nothing, the whole reward is at fault, and other findings say so.
    if len(dead) == len(run.functions) or not dead.keys() - PENALTIES:
        return None
    return Finding(
        "dead_reward",
        "A reward function says the same of (nearly) every completion; it cancels out of the advantages.",
        _always({name: value for name, value in dead.items() if name not in PENALTIES}),
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
    evidence = f"{run.told('zero_variance_share')}, with {wasted:g} tokens; mean accuracy {accuracy:.0%}"
    more = "--dynamic_sampling 3 replaces such groups"
    if accuracy >= SOLVED:
        advice = f"a harder --task or --difficulty; {more}"
        return Finding("too_easy", "The task is too easy: whole groups are right.", evidence, advice)
    if accuracy <= UNSOLVED:
        advice = f"an easier --task or --difficulty, SFT first, a larger --group_size; {more}"
        return Finding("too_hard", "The task is too hard: whole groups are wrong.", evidence, advice)
    advice = f"raise --temperature or --group_size; {more}"
    return Finding("groups_alike", "The completions of a group earn alike.", evidence, advice)


# --- how the weights move


def clipped(run: Run) -> Finding | None:
    taught = 1 - run.mean("zero_variance_share")  # elsewhere nothing pulls, so nothing is clipped
    share = (run.mean("clip_ratio_low") + run.mean("clip_ratio_high")) / taught if taught else 0.0
    level = run.setting("ratio_level") or LOSSES[run.setting("loss")].ratio_level
    if not share >= CLIPPED[level]:
        return None
    return Finding(
        "clipped",
        "Much is clipped: the updates on one batch go too far.",
        f"{share:.0%} of the ratios clipped in groups that differ, ratios from "
        f"{min(run.values('ratio_min'), default=math.nan):.3g} to "
        f"{max(run.values('ratio_max'), default=math.nan):.3g}; --mu {run.setting('mu')}, --lr {run.setting('lr'):g}",
        "lower --mu or --lr; each update but the first of a batch starts where the one before has gone",
    )


def lr_too_high(run: Run) -> Finding | None:
    reward, norm, entropy = run.change("reward_mean"), run.change("grad_norm"), run.change("entropy")
    fell = reward.fall >= FELL and reward.last < (reward.peak + min(reward.first, reward.peak)) / 2
    signs = [run.told("reward_mean") + f", at best {reward.peak:.3g}"] if fell else []
    if norm.peak >= EXPLODED * norm.first > 0:
        signs.append(f"gradient norm {norm.first:.3g} at first, up to {norm.peak:.3g}")
    if entropy.peak >= LOOSENED * entropy.first > 0:
        signs.append(f"entropy {entropy.first:.3g} at first, up to {entropy.peak:.3g}")
    if not signs or (reward.z >= MOVED and not fell):
        return None
    return Finding(
        "lr_too_high",
        "The policy breaks: most often the learning rate is too high.",
        f"{'; '.join(signs)}; --lr {run.setting('lr'):g}",
        "lower --lr to a third or a tenth; --warmup_ratio 0.1; --max_grad_norm 0.1; --beta 0.04, which holds it back",
    )


def reward_flat(run: Run) -> Finding | None:
    """The learning rate is too low, or there is nothing that the reward follows."""
    changes = [run.change("reward_mean"), run.change("accuracy"), run.heldout()]
    teaches = run.mean("grad_norm") > 0 and run.mean("zero_variance_share") < ALIKE
    if not abs(changes[0].z) < STILL or any(change.z >= STILL for change in changes) or not teaches:
        return None
    rates = run.values("learning_rate") or [math.nan]
    evidence = f"{run.told('reward_mean')}, {abs(changes[0].z):.1f} standard errors; gradient norm "
    evidence += f"{run.mean('grad_norm'):.3g}, learning rate {min(rates):g} to {max(rates):g}"
    if max(rates) <= NO_LR:
        advice = "raise --lr (1e-6 to 1e-5 for all weights of a trained model, ten times that with --lora)"
        return Finding("lr_too_low", "Nothing moves: the learning rate is too low.", evidence, advice)
    advice = "more --max_steps, a higher --lr, a larger --prompts_per_step; read completions.jsonl: does the reward "
    advice += "follow what you want?"
    if run.setting("shuffle_rewards"):
        advice = "leave out --shuffle_rewards, the control experiment: with it there is nothing to learn"
    return Finding("reward_flat", "The reward does not move, though the groups differ.", evidence, advice)


def kl_explodes(run: Run) -> Finding | None:
    if not run.last("kl") >= KL_FAR:
        return None
    return Finding(
        "kl_explodes",
        "The policy has left its reference far behind.",
        f"{run.told('kl')} nats a token; --beta {run.setting('beta'):g}",
        "raise --beta (DeepSeekMath: 0.04), lower --lr",
    )


def entropy_collapse(run: Run) -> Finding | None:
    entropy = run.change("entropy")
    if not entropy.last <= min(ENTROPY_LOW, ENTROPY_LEFT * entropy.first) or run.last("accuracy") >= SOLVED:
        return None
    return Finding(
        "entropy_collapse",
        "The entropy has collapsed: the model writes one and the same, and finds nothing new.",
        f"{run.told('entropy')} nats a token; {run.told('zero_variance_share')}",
        "lower --lr; --entropy_coef 0.001, --beta 0.04, a higher --temperature; with --mu above 1 --epsilon_high 0.28",
    )


# --- what is learned instead


def length_to_budget(run: Run) -> Finding | None:
    budget, length = run.setting("max_completion_tokens"), run.change("length_mean")
    grown = length.z >= MOVED and length.last >= LONGER * length.first
    if not grown or not length.last >= BUDGET * budget:
        return None
    return Finding(
        "length_to_budget",
        "Completions grow until the budget cuts them off.",
        f"{run.told('length_mean')} of {budget} tokens; {run.told('truncated_share')}",
        "find which of --rewards pays for length; add soft_overlong_reward_func; --mask_truncated; raise "
        "--max_completion_tokens if longer answers are better ones",
    )


def reward_hacking(run: Run) -> Finding | None:
    reward, accuracy = run.change("reward_mean"), run.change("accuracy")
    if not (reward.z >= MOVED and accuracy.z < STILL and accuracy.first < SOLVED and not run.heldout().z >= STILL):
        return None
    rising = [name for name in run.functions if run.change(f"rewards/{name}").z >= MOVED]
    falls = "falls" if accuracy.z <= -STILL else "does not"
    return Finding(
        "reward_hacking",
        f"The reward rises and accuracy {falls}: something else than right answers is paid for.",
        f"{run.told('reward_mean')}; {run.told('accuracy')}; rising: {', '.join(rising) or 'none by itself'}",
        "read the best paid of completions.jsonl; change or leave out that function, or give it less of "
        "--reward_weights. Fine if the format is what you want learned first",
    )


def heldout_falls(run: Run) -> Finding | None:
    heldout, reward = run.heldout(), run.change("reward_mean")
    if not (heldout.fall >= STILL and reward.z >= MOVED and run.change("accuracy").z >= STILL):
        return None
    return Finding(
        "heldout_falls",
        "Held-out accuracy falls while the training reward rises: the training problems are learned by heart.",
        f"held-out {heldout.first:.1%} at first, {heldout.peak:.1%} at best, {heldout.last:.1%} at last; "
        f"{run.told('reward_mean')}",
        "more training problems, fewer --max_steps, a lower --lr; --save_every with --eval_every keeps the best",
    )


# --- supervised fine-tuning


def sft_diverges(run: Run) -> Finding | None:
    loss, losses = run.change("loss"), run.values("loss")
    lowest = -Change.of([-value for value in losses]).peak
    best = min([lowest, *losses[:1]])  # a rate far too high throws it up at once, within the first fifth
    if not loss.last >= LOSS_UP * best:
        return None
    return Finding(
        "sft_diverges",
        "The loss ends above what it has been: the learning rate is too high.",
        f"{run.told('loss')}, at best {best:.3g}; --lr {run.setting('lr'):g}",
        "lower --lr to a third or a tenth; --warmup_ratio 0.1",
    )


def sft_loss_flat(run: Run) -> Finding | None:
    loss = run.change("loss")
    if not abs(loss.z) < STILL:
        return None
    return Finding(
        "sft_loss_flat",
        "The loss does not fall.",
        f"{run.told('loss')}, {abs(loss.z):.1f} standard errors; --lr {run.setting('lr'):g}",
        "raise --lr (SFT wants 10 to 100 times GRPO's), more --max_steps or --epochs",
    )


def _some(steps: Sequence[int]) -> str:
    """`2, 3, 4, ...`"""
    return ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "") if steps else "(not logged)"


def _always(constant: Mapping[str, float | None]) -> str:
    """`judge always 0, format always None`: None is "no opinion"."""
    shown = {name: "None" if value is None or math.isnan(value) else f"{value:.3g}" for name, value in constant.items()}
    return ", ".join(f"{name} always {value}" for name, value in shown.items())
