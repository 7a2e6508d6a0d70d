"""A causal language model in two parts, so that the output head is computed for scored tokens only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def backbone_and_head(model: Any, split: bool = True) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model without its output head, and the head: hidden states to logits. Not `split`, for models whose head is
    more than that: the whole model, whose logits stand for hidden states, and nothing behind it."""
    if not split:
        return partial(_logits_for_hidden_states, model), lambda logits: logits
    inner = without_adapter(model)
    head, config = inner.get_output_embeddings(), inner.config
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if divisor:  # Granite
            logits = logits / divisor
        if cap:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    return getattr(inner, inner.base_model_prefix), logits_of


def without_adapter(model: Any) -> Any:
    """A peft model's own model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits_for_hidden_states(model: Any, **inputs: Any) -> Any:
    return SimpleNamespace(last_hidden_state=model(**inputs).logits)
