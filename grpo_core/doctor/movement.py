"""How weights move and what is learned instead, each as a function from a run's log to a `Finding` or None."""

from __future__ import annotations

import math

from grpo_core.config import LOSSES
from grpo_core.doctor.finding import (
    ALIKE,
    BUDGET,
    CLIPPED,
    ENTROPY_LEFT,
    ENTROPY_LOW,
    EXPLODED,
    FELL,
    KL_FAR,
    LONGER,
    LOOSENED,
    LOSS_UP,
    MOVED,
    NO_LR,
    SOLVED,
    STILL,
    Finding,
)
from grpo_core.doctor.readlog import Change, Run

# --- how the weights move


def clipped(run: Run) -> Finding | None:
    taught = 1 - run.mean("zero_variance_share")  # elsewhere advantages are 0, so nothing is clipped
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
        "lower --mu or --lr; each update on a batch after the first starts where the previous one ended",
    )


def lr_too_high(run: Run) -> Finding | None:
    reward, norm, entropy = run.change("reward_mean"), run.change("grad_norm"), run.change("entropy")
    fell = reward.fall >= FELL and reward.last < (reward.peak + min(reward.first, reward.peak)) / 2
    signs = [run.trend("reward_mean") + f", at best {reward.peak:.3g}"] if fell else []
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
        "lower --lr to a third or a tenth; --warmup_ratio 0.1; --max_grad_norm 0.1; --beta 0.04",
    )


def reward_flat(run: Run) -> Finding | None:
    """The learning rate is too low, or the rewards do not depend on anything that can be learned."""
    changes = [run.change("reward_mean"), run.change("accuracy"), run.heldout()]
    teaches = run.mean("grad_norm") > 0 and run.mean("zero_variance_share") < ALIKE
    if not abs(changes[0].z) < STILL or any(change.z >= STILL for change in changes) or not teaches:
        return None
    rates = run.values("learning_rate") or [math.nan]
    evidence = f"{run.trend('reward_mean')}, {abs(changes[0].z):.1f} standard errors; gradient norm "
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
        "The policy has moved far away from its reference.",
        f"{run.trend('kl')} nats a token; --beta {run.setting('beta'):g}",
        "raise --beta (DeepSeekMath: 0.04), lower --lr",
    )


def entropy_collapse(run: Run) -> Finding | None:
    entropy = run.change("entropy")
    if not entropy.last <= min(ENTROPY_LOW, ENTROPY_LEFT * entropy.first) or run.last("accuracy") >= SOLVED:
        return None
    return Finding(
        "entropy_collapse",
        "The entropy has collapsed: the model always writes the same, and explores nothing new.",
        f"{run.trend('entropy')} nats a token; {run.trend('zero_variance_share')}",
        "lower --lr or --mu; in long runs --beta 0.04, --entropy_coef and, with --mu above 1, --epsilon_high 0.28",
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
        f"{run.trend('length_mean')} of {budget} tokens; {run.trend('truncated_share')}",
        "find which of --rewards pays for length; add soft_overlong_reward_func; raise "
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
        f"The reward rises and accuracy {falls}: something other than right answers is rewarded.",
        f"{run.trend('reward_mean')}; {run.trend('accuracy')}; rising: {', '.join(rising) or 'none by itself'}",
        "read the best rewarded of completions.jsonl; change or leave out that function, or give it less of "
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
        f"{run.trend('reward_mean')}",
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
        "The loss ends above its best value: the learning rate is too high.",
        f"{run.trend('loss')}, at best {best:.3g}; --lr {run.setting('lr'):g}",
        "lower --lr to a third or a tenth; --warmup_ratio 0.1",
    )


def sft_loss_flat(run: Run) -> Finding | None:
    loss = run.change("loss")
    if not abs(loss.z) < STILL:
        return None
    return Finding(
        "sft_loss_flat",
        "The loss does not fall.",
        f"{run.trend('loss')}, {abs(loss.z):.1f} standard errors; --lr {run.setting('lr'):g}",
        "raise --lr (SFT wants 10 to 100 times GRPO's), more --max_steps or --epochs",
    )
