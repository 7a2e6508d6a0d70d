"""What every program prints in the same way. Here because this is the package that all others may import."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

HELP = "show this help, or the help of all flags"
ALL = "`--help all` lists every flag."


class _Help(argparse.Action):
    """--help, and --help all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.every = values == "all"
        parser.print_help()
        parser.exit()


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are exceptions of one line that name the nearest known flag."""

    every = False  # whether the help that is asked for is that of every flag

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "add_help": False})
        self.add_argument(
            "-h",
            "--help",
            action=_Help,
            nargs="?",
            choices=["all"],
            metavar="all",
            default=argparse.SUPPRESS,
            help=HELP,
        )

    def format_help(self) -> str:
        return super().format_help() + ("" if self.every else f"\n{ALL}\n")

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)(/\S+)?:", r"\1:", message))  # without the flag's second spelling

    @property
    def flags(self) -> list[str]:
        """Every flag, in one spelling each."""
        return [option for option in self._option_string_actions if "-" not in option.removeprefix("--")]

    def unknown(self, flags: Sequence[str]) -> NoReturn:
        no_such_flag(next((f for f in flags if f.startswith("--")), flags[0]), self.flags)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown)
        return given


def no_such_flag(flag: str, known: Iterable[str]) -> NoReturn:
    """
    Raises:
        ValueError: names the flag and the nearest of the known ones.
    """
    name = flag.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"{name}: no such flag" + (f"; did you mean {near[0]}?" if near else "; --help all lists every flag")
    )


def program() -> str | None:
    """As it was typed, `python -m eval`; argparse would say `__main__.py` before Python 3.14."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


@contextmanager
def quiet_ends() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a program in one line, a reader that has gone (`| head`) in none. Exit codes: 130, 143,
    and 141 as a shell has it for SIGPIPE."""
    try:
        yield
        sys.stdout.flush()  # the final flush can find its reader gone, too
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + getattr(error, "number", signal.SIGINT)) from None
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is left in the buffer, for Python would complain of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None


@contextmanager
def user_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn an error that names what the user got wrong into one line on stderr and exit code 2."""
    try:
        yield
    except kind as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
