"""From the command line to a config: preset < environment < --config file < flags. A user's mistake is one line and
exit code 2.

A config file (and a preset, which is such a file inside a package) holds `field: value` lines. It is read as if its
lines had been typed as flags before the real ones, so types, choices and errors are the same for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from rewards.terminal import no_such_flag as no_such_flag
from rewards.terminal import program, quiet_ends
from rewards.terminal import user_errors as user_errors  # every program's, with or without torch
from sft_core.config import FREE_ON_RESUME, NEWEST
from sft_core.helptext import Help, Parser
from sft_core.names import Known, known_names, own_flags, own_keys
from sft_core.run.checkpoint import NotSaved, is_checkpoint

ConfigT = TypeVar("ConfigT")

# The environment's names, after train-grpo-script's. They stand above a preset, which is the package's, and below what
# was typed for this run: a config file that repeats a run, and flags.
ENVIRONMENT = """environment: MODEL_NAME sets --model, OUTPUT_DIR sets --output_dir, RUN_NAME sets it to runs/RUN_NAME
where OUTPUT_DIR does not; each above a preset and below --config and flags."""


def parser_of(cls: type, names: Sequence[str] = (), default_preset: str | None = None) -> Parser:
    """The parser of a config class; `names` are those of its presets."""
    parser = Parser(
        cast(Any, cls),
        prog=program(),
        formatter_class=Help,
        allow_abbrev=False,
        usage="%(prog)s [--help [all]] [--preset NAME] [--config FILE] [--flag value ...]",
        description=sys.modules[cls.__module__].__doc__,
        epilog=ENVIRONMENT,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-5 for a flag before Python 3.14
    if names:
        parser.add_argument(
            "--preset",
            choices=names,
            help="named settings"
            if default_preset is None
            else f"named settings; default: {default_preset}, unless --model, --task or --config is given",
        )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # it is told beside the switch that it turns off
        if action.dest == "resume":
            action.nargs, action.const = "?", NEWEST
        if action.dest == "micro_batch":
            action.type = rows_or_auto
    parser.add_argument("--config", type=Path, help="a YAML file of `flag: value` lines; flags override it")
    return parser


def rows_or_auto(text: str) -> int:
    """0 is auto."""
    try:
        return 0 if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, or a number of rows") from None


def preset_names(presets: Path | None) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.yaml")) if presets else []


def parse_config(
    cls: type[ConfigT],
    argv: Sequence[str],
    presets: Path | None = None,
    default_preset: str | None = None,
    environ: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Preset, then recipe, then environment, then config file, then flags, each overriding the one before; then the
    config's own `check()`. Says on stderr what the environment has set, and under --dry_run on stdout which layers are
    in force.

    `default_preset` is used where neither command line nor environment names a preset, a config file, or a model or
    task of its own.

    Args:
        environ: where ENVIRONMENT's names are looked up; none for a config that no person asks for.
        settings: stand in for the fields' defaults.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), a value of the wrong type, a failed check,
            --resume of a run that was begun with other values.
    """
    parser = parser_of(cls, preset_names(presets), default_preset)
    outer, typed = from_environment(environ or {}), argv
    argv = own_flags(typed, fields_of(cls))
    given, _ = parser.parse_known_args([*as_flags(outer), *argv])
    file = _read_file(given.config, parser, cls) if given.config else {}
    argv = own_flags(typed, fields_of(cls), keys_set_in(given.config))
    if getattr(given, "resume", None) not in (None, NEWEST):
        outer.pop("output_dir", None)  # the run is named already
    given, _ = parser.parse_known_args([*as_flags({**outer, **file}), *argv])
    named = {argument.split("=")[0] for argument in argv} | {f"--{name}" for name in outer}
    own_job = "--config" in named or any(
        f"--{name}" in named and getattr(given, name) != built_in
        for name, built_in in (("model", "tiny"), ("task", "arithmetic"))
    )
    run, resumed = _run_to_continue(given)
    preset = getattr(given, "preset", None) or (None if own_job or run else default_preset)
    values: dict[str, Any] = dict(settings or {})
    begun: dict[str, Any] = _read_file(run / "config.yaml", parser, cls) if run else {}
    if presets and preset:
        values |= _read_file(presets / f"{preset}.yaml", parser, cls)
    if recipe := getattr(given, "recipe", None):
        values |= cls.settings_of(recipe)  # type: ignore[attr-defined]
    values |= outer
    if run and not preset and not given.config:
        values |= begun
    values |= file
    config, _, unknown = parser.parse_args_into_dataclasses(
        [*as_flags(values), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.unknown(unknown)
    if resumed:
        config = dataclasses.replace(config, **resumed)
    config.check()
    if run:
        same_run(config, parser.parse_args_into_dataclasses(as_flags(begun))[0], run)
    in_force = {name: value for name, value in outer.items() if getattr(config, name) == value}
    say_environment(in_force)
    if getattr(config, "dry_run", False):
        flags = [argument.split("=")[0] for argument in argv if argument.startswith("--")]
        beneath = given.config or (run if run and not preset else None)
        print(f"settings: {told_layers(preset, in_force, beneath, flags)}")
    return config


def told_layers(preset: str | None, in_force: Mapping[str, str], file: Path | None, typed: Sequence[str]) -> str:
    """What a config was put together from, for people.

    >>> told_layers("t4", {"model": "m"}, Path("mine.yaml"), ["--preset", "--config", "--lr", "--dry_run"])
    'defaults < preset t4 < environment < mine.yaml < --lr'
    """
    own = " ".join(flag for flag in typed if flag not in ("--preset", "--config", "--dry_run"))
    layers = [f"preset {preset}" if preset else "", "environment" if in_force else "", str(file or ""), own]
    return " < ".join(filter(None, ["defaults", *layers]))


def from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The fields that the environment sets, by ENVIRONMENT's names; an empty value sets nothing.

    >>> from_environment({"MODEL_NAME": "Qwen/Qwen2.5-1.5B-Instruct", "RUN_NAME": "first", "HOME": "/root"})
    {'model': 'Qwen/Qwen2.5-1.5B-Instruct', 'output_dir': 'runs/first'}

    Raises:
        ValueError: RUN_NAME is no name of a folder.
    """
    values = {}
    if model := environ.get("MODEL_NAME"):
        values["model"] = model
    name, folder = environ.get("RUN_NAME"), environ.get("OUTPUT_DIR")
    if name and (name != Path(name).name or name == ".."):
        raise ValueError(f"RUN_NAME {name}: expected the name of a folder below runs/, without slashes")
    if folder or name:
        values["output_dir"] = folder or str(Path("runs") / str(name))
    return values


def say_environment(in_force: Mapping[str, str]) -> None:
    """One line on stderr: a variable that was set for something else should not choose a model in silence."""
    if in_force:
        said = ", ".join(f"--{name} {value}" for name, value in in_force.items())
        print(f"set by the environment (MODEL_NAME, OUTPUT_DIR, RUN_NAME): {said}", file=sys.stderr)


def _run_to_continue(given: Any) -> tuple[Path | None, dict[str, str]]:
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
        raise ValueError(f"--resume {wanted}: is not in --output_dir {folder}; a run continues in its own folder")
    return path, {"resume": name, "output_dir": str(path)}


def same_run(config: Any, begun: Any, run: Path) -> None:
    """
    Raises:
        ValueError: the run in `run` was begun with another value of something that moves its numbers.
    """
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), getattr(begun, field.name)
        if now != then and field.name not in FREE_ON_RESUME:
            raise ValueError(
                f"--{field.name} {now}: the run in {run} was begun with {then}, and goes on as it began; a new run can "
                f"start from its weights with --model"
            )


def _read_file(path: Path, parser: Parser, cls: type) -> dict[str, Any]:
    values, known = read_own(path, fields_of(cls)), [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known, *known_names(known)], n=1)
            raise ValueError(f"--config {path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        parser.parse_known_args(as_flags(values))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error
    return values


def fields_of(cls: type) -> dict[str, list[str]]:
    """A program's fields as `sft_core.names` asks for them."""
    return {"": [field.name for field in dataclasses.fields(cls)]}


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a --config file.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected `flag: value` lines")
    return values


def read_own(path: Path, known: Known) -> dict[str, Any]:
    """The lines of a --config file by this project's names.

    Raises:
        ValueError: as `read_yaml` and `own_keys`.
    """
    values = read_yaml(path)
    try:
        return own_keys(values, known)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def keys_set_in(path: Path | None) -> list[str]:
    """The keys to which a --config file gives a value, as they stand there."""
    return [str(key) for key, value in read_yaml(path).items() if value is not None] if path else []


def as_flags(values: Mapping[str, Any]) -> list[str]:
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
    """Ctrl-C, SIGTERM, a reader that has gone, a full disk and gradients that stay without a number end a run in one
    line at most, after what `Progress.kept` says. Exit codes: as `quiet_ends`, else 1."""
    with quiet_ends():
        try:
            yield
        except (NotSaved, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
