"""Tables 1, 2, 3 and 8 of the exact-gradient report: what advantages, weights and masks make of a reward."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.exact.comparison import compare
from benchmarks.exact.enumeration import (
    Estimator,
    TableModel,
    World,
    arbitrary_rewards,
    as_policy,
    contains,
    gpt2_policy,
    gradient,
    settings,
    table_policy,
    true_gradient,
    world,
)
from benchmarks.exact.table import AGGREGATIONS, COMPARED, WORD, Cell, Table, compared, language
from sft_core.model.policy import Policy

SHARES = (0.02, 0.5, 0.9)  # right answers to a hard, a middling and an easy prompt


def unscaled() -> Table:
    """Block 1."""
    networks = {"table": (*language(), (2, 3, 4)), "GPT-2": (world(5, 3), gpt2_policy(), (2, 3))}
    lines = []
    for name, (here, policy, sizes) in networks.items():
        reward_R = arbitrary_rewards(len(here.rows))
        truth = true_gradient(here, policy, reward_R)
        for G in sizes:
            for aggregation, scale in (("sequence_sum", 1), ("constant_length", here.budget)):
                config = settings(here.budget, G, aggregation=aggregation)
                direction = Estimator(here, config, reward_R).direction(policy)
                what = f"{name}, G = {G}, {aggregation}"
                lines.append(compared(what, "expected reward", direction, truth, (G - 1) / G / scale))
    says = (
        "Rewards minus the group's mean, undivided, give the true gradient times (G - 1) / G (a completion is "
        "part of its own baseline), and over the budget with constant_length: a smaller step in the right direction."
    )
    return Table("1. Unscaled advantages", COMPARED, lines, says)


def two_prompts() -> tuple[World, Policy, Tensor]:
    """One-token answers to two prompts, and reward_KR of two functions: one is 1 or 0, the other small. Both count a
    third as much on prompt 1."""
    here = world(5, 1, prompts=2)
    right_R = (here.rows.completion_NT == WORD).any(dim=1).double()
    scale_R = torch.tensor([1.0, 1 / 3], dtype=torch.float64).repeat_interleave(5)
    reward_KR = torch.stack([right_R, 0.2 * arbitrary_rewards(len(here.rows))])
    return here, table_policy(5, 1, prompts=2, seed=3), reward_KR * scale_R


def scaled() -> Table:
    """Block 2, first part."""
    here, policy, reward_KR = two_prompts()
    reward_R = reward_KR.sum(dim=0)
    truth = true_gradient(here, policy, reward_R)
    second_R = torch.arange(len(here.rows)) >= len(here.rows) // 2
    kinds: dict[str, tuple[dict[str, str], Tensor]] = {
        f"scale_rewards {scale}": ({"scale_rewards": scale}, reward_R) for scale in ("none", "group", "batch")
    }
    each = {"reward_aggregation": "normalize_then_sum", "scale_rewards": "group"}
    kinds["each function, then the batch (GDPO)"] = (each, reward_KR)
    lines: list[tuple[Cell, ...]] = []
    for name, (fields, reward) in kinds.items():
        direction = Estimator(here, settings(1, 4, **fields), reward).direction(policy)
        alone = []
        for mask_R in (~second_R, second_R):
            own = true_gradient(here, policy, torch.where(mask_R, reward_R, 0.0))
            alone.append(compare(direction[own != 0], own[own != 0]))
        whole = compare(direction, truth)
        lines.append((name, alone[0].size, alone[0].cosine, alone[1].size, alone[1].cosine, whole.cosine, whole.rest))
    columns = ("advantages", "size, prompt 0", "cosine", "size, prompt 1", "cosine", "cosine of both", "rest of both")
    says = (
        "G = 4, two prompts, graded rewards three times as small on prompt 1. Dividing by the group's standard "
        "deviation turns "
        "each prompt's own gradient, and undoes the difference of scale between them; dividing by the batch's does "
        "less of both."
    )
    return Table("2a. Dividing by the standard deviation", columns, lines, says)


def guesses(shares: tuple[float, ...]) -> tuple[World, Policy]:
    """Completions of one token, among 4; prompt b is answered right (by `WORD`) with probability shares[b]."""
    chance_BV = torch.stack([torch.full((4,), (1 - share) / 3, dtype=torch.float64) for share in shares])
    chance_BV[:, WORD] = torch.tensor(shares, dtype=torch.float64)
    return world(4, 1, prompts=len(shares)), as_policy(TableModel(chance_BV.log(), len(shares)))


def difficulty() -> Table:
    """Block 2, second part."""
    lines: list[tuple[Cell, ...]] = []
    for scale, G in [("none", 4), ("group", 2), ("group", 3), ("group", 4), ("group", 8), ("group", 16), ("batch", 4)]:
        # Under `batch` one prompt's samples change another's weight, so the three are enumerated together.
        parts = [guesses(SHARES)] if scale == "batch" else [guesses((share,)) for share in SHARES]
        directions, truths = [], []
        for here, policy in parts:
            right_R = (here.rows.completion_NT == WORD).any(dim=1).double()
            directions.append(Estimator(here, settings(1, G, scale_rewards=scale), right_R).direction(policy))
            truths.append(true_gradient(here, policy, right_R))
        direction, truth = torch.cat(directions).view(len(SHARES), -1), torch.cat(truths).view(len(SHARES), -1)
        sizes = [compare(direction[b], truth[b]).size for b in range(len(SHARES))]
        lines.append((f"{scale}, G = {G}", *sizes, compare(direction.flatten(), truth.flatten()).cosine))
    columns = ("scale_rewards", *(f"size, right {share:.0%}" for share in SHARES), "cosine of the three")
    says = (
        "Rewards 0 and 1: each prompt's direction is right (cosine 1), but their shares of the step change. With G = "
        "2 or 3 dividing by the group's standard deviation is one constant for all prompts; the larger the group, "
        "the more hard "
        "and easy prompts gain on those in the middle."
    )
    return Table("2b. Difficulty re-weighted", columns, lines, says)


def normalisers() -> Table:
    """Block 3, first part."""
    here, policy = language()
    reward_R = contains(here, WORD)
    mean = (here.chance(policy) * reward_R).sum().detach()
    per_token = true_gradient(here, policy, (reward_R - mean) / here.length_R)
    lines = []
    for G in (2, 4):
        for aggregation, predicted in (
            ("sequence_sum", (G - 1) / G),
            ("constant_length", (G - 1) / G / here.budget),
            ("sequence_mean", ""),
            ("token_mean", ""),
        ):
            direction = Estimator(here, settings(3, G, aggregation=aggregation), reward_R).direction(policy)
            truth = true_gradient(here, policy, reward_R)
            lines.append(compared(f"{aggregation}, G = {G}", "expected reward", direction, truth, predicted))
            if aggregation == "sequence_mean":
                of = "(reward - its mean, held fixed) / length"
                lines.append(compared(f"{aggregation}, G = {G}", of, direction, per_token, (G - 1) / G))
    says = (
        "Unscaled advantages; an answer is right that ends itself and holds the token 1. The mean over each "
        "completion's own tokens raises the advantage per token of length. The mean over the step's tokens divides "
        "by a number that depends on the group's own lengths, a bias that shrinks as the group grows."
    )
    return Table("3a. Weights of tokens", COMPARED, lines, says)


def length_bias() -> Table:
    """Block 3, second part."""
    here, policy = language()
    reward_R, G = contains(here, WORD), 3
    chance_R = here.chance(policy).detach()
    longer = gradient((here.chance(policy) * here.length_R).sum(), policy)
    kinds = [(1, 2), (1, 3), (0, 1), (0, 2), (0, 3)]  # right or wrong, length
    lines: list[tuple[Cell, ...]] = []
    for aggregation in AGGREGATIONS:
        estimator = Estimator(here, settings(3, G, aggregation=aggregation), reward_R)
        mean_length = float((chance_R * here.length_R).sum())
        unit = {"sequence_sum": 1, "constant_length": here.budget}.get(aggregation, mean_length) * G / (G - 1)
        pull_R, direction = unit * estimator.pull(policy)[:, 0], estimator.direction(policy)
        pulls = [float(pull_R[(reward_R == right) & (here.length_R == length)][0]) for right, length in kinds]
        lines.append((aggregation, *pulls, float(direction @ longer / direction.norm())))
    names = (f"{('wrong', 'right')[right]}, {length} token{'s' * (length > 1)}" for right, length in kinds)
    says = (
        "The mean advantage that one token of such an answer is pulled with, in units of (G - 1) / G and of the "
        "budget or mean length (G = 3), and how fast the mean length grows per unit of step. With the two means one "
        "token of a long wrong answer is punished less than one of a short, so failing at length pays more than it "
        "should."
    )
    return Table("3b. Length bias", ("weights", *names, "pull on the length"), lines, says)


def truncation() -> Table:
    """Block 8."""
    here, policy = language()
    reward_R, G = contains(here, WORD), 3
    chance_R = here.chance(policy).detach()
    fixed_R = (reward_R - (chance_R * reward_R).sum()) * ~here.truncated_R
    truth, ended = true_gradient(here, policy, reward_R), true_gradient(here, policy, fixed_R)
    lines = []
    for aggregation in AGGREGATIONS:
        config = settings(3, G, aggregation=aggregation, mask_truncated=True)
        direction = Estimator(here, config, reward_R).direction(policy)
        lines.append(compared(aggregation, "expected reward", direction, truth))
        if aggregation in ("sequence_sum", "constant_length"):
            scale = here.budget if aggregation == "constant_length" else 1
            of = "reward - its mean, held fixed, of those that end"
            lines.append(compared(aggregation, of, direction, ended, (G - 1) / G / scale))
    share = float(chance_R[here.truncated_R].sum())
    says = (
        f"mask_truncated, G = 3, unscaled; {share:.1%} of the completions are cut off, none of them right. Left out "
        "of the loss they count as if they had been worth exactly the mean: being cut off is not punished."
    )
    return Table("8. Truncated completions left out", COMPARED, lines, says)
