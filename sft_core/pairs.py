"""Settings that are given as name=value, for a library to read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def read_pairs(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Each value read as JSON where it is JSON, otherwise as text.

    Raises:
        ValueError: one is not name=value.

    >>> read_pairs("--config_overrides", ["hidden_size=64", "hidden_act=gelu", "tie_word_embeddings=true"])
    {'hidden_size': 64, 'hidden_act': 'gelu', 'tie_word_embeddings': True}
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag} {pair}: expected name=value")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values
