"""What is said when a user got something wrong: one line that names the flag or file, and what would be accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Refused(ValueError):
    """What a user got wrong and only opening the run folder or reading the weights could tell. (Other ValueErrors after
    `prepare` are faults of the program, and keep their traceback.)"""


def require(condition: bool, name: str, value: Any, accepted: str) -> None:
    """Raise the ValueError that names the flag, the value found and what would be accepted."""
    if not condition:
        raise ValueError(f"--{name} {value}: expected {accepted}")


@contextmanager
def refused(name: str) -> Iterator[None]:
    """What a library says of files that it cannot use, whatever the class of its exception, as one line.

    Raises:
        Refused: the block failed.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{name}: cannot be loaded ({type(error).__name__}: {reason})") from error
