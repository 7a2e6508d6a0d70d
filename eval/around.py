"""What the sampler needs around `generate`: a model that is ready, and batches that need no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from sft_core.model.policy import Policy


def equal_lengths(prompts: Sequence[Sequence[int]], places: Sequence[int]) -> list[list[int]]:
    """These prompts' places, those of equal lengths together.

    >>> equal_lengths([[5, 6], [7], [8, 9]], range(3))
    [[0, 2], [1]]
    """
    batches: dict[int, list[int]] = {}
    for place in places:
        batches.setdefault(len(prompts[place]), []).append(place)
    return list(batches.values())


@contextmanager
def ready_to_generate(model: Any) -> Iterator[None]:
    """In eval mode, so that dropout is off and gradient checkpointing does not disable the cache, and with an empty
    generation config on the model: `generate` fills whatever ours leaves unset from the model's."""
    was_training, shipped = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped
        model.train(was_training)


def generation_config(policy: Policy, tokens: int) -> GenerationConfig:
    """All of `generate`'s settings: the most probable token, or the one that `Draw` marks. The model's own (repetition
    penalty, top-k, top-p) are not inherited."""
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id)
    config.use_cache = policy.cached
    return config
