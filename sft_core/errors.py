"""Errors for what a user got wrong: one line that names the flag or file, and what would be accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Refused(ValueError):
    """What a user got wrong, found only on opening the run folder or reading the weights. (Other ValueErrors after
    `prepare` are bugs in the program, and keep their traceback.)"""


def require(condition: bool, name: str, value: Any, accepted: str) -> None:
    """Raise the ValueError that names the flag, the value found and what would be accepted."""
    if not condition:
        raise ValueError(f"--{name} {value}: expected {accepted}")


@contextmanager
def refused(name: str) -> Iterator[None]:
    """Turn a library's exception about files that it cannot use, whatever its class, into one line.

    Raises:
        Refused: the block failed.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{name}: cannot be loaded ({type(error).__name__}: {reason})") from error
