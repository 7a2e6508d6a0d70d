"""Rewards that are wrong on purpose, or of unlike scale."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from rewards import numeric_reward_func

RewardFunction = Callable[..., list[float]]


def flipped(share: float) -> RewardFunction:
    """Right or wrong, and the verdict turned round in this share of the completions, drawn anew for each of them."""

    def reward(
        prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], trainer_state: object, **_: object
    ) -> list[float]:
        rng = random.Random(f"{getattr(trainer_state, 'global_step', 0)}/{len(completions)}/{completions[0]}")
        right = numeric_reward_func(prompts, completions, answer)
        return [1 - verdict if rng.random() < share else verdict for verdict in right]

    return reward


flipped_5, flipped_20, flipped_40 = flipped(0.05), flipped(0.20), flipped(0.40)


def wrong(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """Pays for an answer that is a number, and not the right one.

    >>> wrong(["?"] * 3, ["#### 4", "#### 5", "four"], ["4", "4", "4"])
    [0.0, 1.0, 0.0]
    """
    right = numeric_reward_func(prompts, completions, answer)
    return [float("####" in text and not verdict) for text, verdict in zip(completions, right, strict=True)]


def brief(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    max_completion_tokens: Sequence[int],
    **_: object,
) -> list[float]:
    """The share of the budget that is left.

    >>> brief(["?"] * 2, ["", ""], [[1, 2, 3], [4]], [4, 4])
    [0.25, 0.75]
    """
    return [1 - len(ids) / most for ids, most in zip(completion_ids, max_completion_tokens, strict=True)]
