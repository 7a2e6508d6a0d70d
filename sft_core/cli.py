"""From the command line to a config: preset < --config file < flags. A user's mistake is one line and exit code 2.

A config file (and a preset, which is such a file inside a package) holds `field: value` lines. It is read as if its
lines had been typed as flags before the real ones, so types, choices and errors are the same for both.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from rewards.terminal import user_errors as user_errors  # every program's, with or without torch
from sft_core.checkpoint import NotSaved, is_checkpoint
from sft_core.config import FREE_ON_RESUME, NEWEST

ConfigT = TypeVar("ConfigT")


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are exceptions of one line that name the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)(/\S+)?:", r"\1:", message))  # without the flag's second spelling

    def unknown(self, flags: Sequence[str]) -> NoReturn:
        name = next((f for f in flags if f.startswith("--")), flags[0]).split("=")[0]
        known = [option for option in self._option_string_actions if "-" not in option.removeprefix("--")]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"{name}: no such flag" + (f"; did you mean {near[0]}?" if near else "; --help lists them all")
        )


def parse_config(
    cls: type[ConfigT], argv: Sequence[str], presets: Path | None = None, default_preset: str | None = None
) -> ConfigT:
    """Preset, then config file, then flags, each overriding the one before; then the config's own `check()`.

    `default_preset` is used where the command line names no preset, no config file, and no model or task of its own.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), a value of the wrong type, a failed check,
            --resume of a run that was begun with other values.
    """
    names = sorted(path.stem for path in presets.glob("*.yaml")) if presets else []
    parser = _Parser(
        cast(Any, cls),
        allow_abbrev=False,
        usage="%(prog)s [--preset NAME] [--config FILE] [--flag value ...]",
        description=sys.modules[cls.__module__].__doc__,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-5 for a flag before Python 3.14
    if presets:
        parser.add_argument(
            "--preset",
            choices=names,
            help="named settings"
            if default_preset is None
            else f"named settings; default: {default_preset}, unless --model, --task or --config is given",
        )
    for action in parser._actions:
        if action.dest == "resume":
            action.nargs, action.const = "?", NEWEST
    parser.add_argument("--config", type=Path, help="a YAML file of `flag: value` lines; flags override it")
    given, _ = parser.parse_known_args(list(argv))
    named = {argument.split("=")[0] for argument in argv}
    own_job = "--config" in named or any(
        f"--{name}" in named and getattr(given, name) != built_in
        for name, built_in in (("model", "tiny"), ("task", "arithmetic"))
    )
    run, resumed = _run_to_go_on_with(given)
    preset = getattr(given, "preset", None) or (None if own_job or run else default_preset)
    values: dict[str, Any] = {}
    begun: dict[str, Any] = _read_file(run / "config.yaml", parser, cls) if run else {}
    if run and not preset and not given.config:
        values |= begun
    if presets and preset:
        values |= _read_file(presets / f"{preset}.yaml", parser, cls)
    if given.config:
        values |= _read_file(given.config, parser, cls)
    config, _, unknown = parser.parse_args_into_dataclasses(
        [*_as_flags(values), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.unknown(unknown)
    if resumed:
        config = dataclasses.replace(config, **resumed)
    config.check()
    if run:
        _same_run(config, parser.parse_args_into_dataclasses(_as_flags(begun))[0], run)
    return config


def _run_to_go_on_with(given: Any) -> tuple[Path | None, dict[str, str]]:
    """The run folder that --resume means, where there is a run in it, and what the flag sets."""
    wanted, folder = getattr(given, "resume", None), getattr(given, "output_dir", "")
    if wanted is None:
        return None, {}
    if wanted == NEWEST:
        run = Path(folder)
        return (run if folder and (run / "config.yaml").is_file() else None), {}
    path, name = Path(wanted), NEWEST
    if path.parent.name == "checkpoints":
        path, name = path.parent.parent, path.name
    if not (path / "config.yaml").is_file():
        raise ValueError(f"--resume {wanted}: {path} holds no run")
    if name != NEWEST and not (Path(wanted).is_dir() and is_checkpoint(Path(wanted))):
        raise ValueError(f"--resume {wanted}: no such checkpoint; --resume {path} takes the newest")
    if folder and Path(folder).resolve() != path.resolve():
        raise ValueError(f"--resume {wanted}: is not in --output_dir {folder}; a run goes on in its own folder")
    return path, {"resume": name, "output_dir": str(path)}


def _same_run(config: Any, begun: Any, run: Path) -> None:
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), getattr(begun, field.name)
        if now != then and field.name not in FREE_ON_RESUME:
            raise ValueError(
                f"--{field.name} {now}: the run in {run} was begun with {then}, and goes on as it began; a new run can "
                f"start from its weights with --model"
            )


def _read_file(path: Path, parser: _Parser, cls: type) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected `flag: value` lines")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"--config {path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        parser.parse_known_args(_as_flags(values))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error
    return values


def _as_flags(values: dict[str, Any]) -> list[str]:
    """`{"lr": 1e-4, "rewards": ["a", "b"]}` as `["--lr=0.0001", "--rewards", "a", "b"]`; None means the default."""
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


@contextmanager
def run_ends() -> Iterator[None]:
    """Ctrl-C, SIGTERM, a full disk and gradients that stay without a number end a run in one line, after what
    `Progress.kept` says. Exit codes: 130, 143, 1."""
    try:
        yield
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + getattr(error, "number", signal.SIGINT)) from None
    except (NotSaved, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
