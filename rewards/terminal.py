"""What every program says in the same way. Here because this is the package that all others may import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn an error that names what the user got wrong into one line on stderr and exit code 2."""
    try:
        yield
    except kind as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
