"""From one command line to the settings of several stages.

    --mode sft      SFT
    --mode grpo     GRPO
    --mode both     SFT, then GRPO from its result
    --mode eval     an evaluation
    --mode all      an evaluation, SFT, an evaluation, GRPO, an evaluation (without SFT where the preset has none)

A flag of a stage's own program, as it is, goes to every stage that has it: --max_samples 100, --task FILE. With the
stage's name before a dot it goes to that stage alone, and counts for more: --sft.lr 1e-4 --grpo.lr 1e-6
--eval.batch_size 64 --sft.config FILE. What stages mean differently (--lr, --epochs, --max_steps, --batch_size ...)
is taken with a name only, where several of them have it. --config FILE holds the same as lines: `max_samples: 100`,
`sft.lr: 1e-4`.

--model, --adapter_path, --lora, --from_scratch and --config_overrides are about the start, so they go to the first
stage that trains; what follows takes its result. Where SFT trains a LoRA adapter, GRPO trains it further.

preset < environment < --config < flags. `--help` of sft_core.train, grpo_core.train and eval lists the stages' flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import eval.__main__
import grpo_core.train
import sft_core.train
from eval.__main__ import EvalConfig
from grpo_core.config import GRPOConfig
from sft_core.cli import (
    ENVIRONMENT,
    Parser,
    as_flags,
    from_environment,
    no_such_flag,
    parse_config,
    parser_of,
    preset_names,
    read_yaml,
    say_environment,
)
from sft_core.config import NEWEST, PASSING
from sft_core.runlog import fresh_folder
from sft_core.source import find_source
from sft_core.train import SFTConfig

CONFIGS: dict[str, Any] = {"sft": SFTConfig, "grpo": GRPOConfig, "eval": EvalConfig}
PRESETS = {"sft": sft_core.train.PRESETS, "grpo": grpo_core.train.PRESETS, "eval": eval.__main__.PRESETS}
SETTINGS = "pipeline.yaml"  # in the pipeline's folder: the resolved settings of all stages; --config takes it back
MODES = ("sft", "grpo", "both", "eval", "all")

START = ("model", "adapter_path", "lora", "from_scratch", "config_overrides")  # of the first stage that trains
TAKEN_OVER = (
    "model",
    "adapter_path",
    "from_scratch",
    "config_overrides",
)  # what a later stage gets from the one before
DIFFERENT = ("lr", "lr_schedule", "warmup_ratio", "max_steps", "epochs", "batch_size")  # means another thing in each


class Stage(NamedTuple):
    """A part of the pipeline; its run folder has its name."""

    name: str
    kind: str  # sft, grpo or eval
    origin: str  # the stage whose final model it takes; "": the model that the pipeline starts from


class Weights(NamedTuple):
    """What a stage starts from, as --model and --adapter_path."""

    model: str
    adapter: str | None

    def after(self, config: Any, run: Path) -> Weights:
        """What a run that started from these weights leaves in `run`."""
        if config.lora or self.adapter:
            return Weights(self.model, str(run / "final"))
        return Weights(str(run / "final"), None)

    @property
    def flags(self) -> list[str]:
        return [f"--model={self.model}", *([f"--adapter_path={self.adapter}"] if self.adapter else [])]


def stages_of(mode: str, with_sft: bool = True) -> list[Stage]:
    """
    >>> [f"{stage.name} <- {stage.origin or 'start'}" for stage in stages_of("all")]
    ['zero-shot <- start', 'sft <- start', 'sft-eval <- sft', 'grpo <- sft', 'grpo-eval <- grpo']
    """
    if mode != "all":
        origin = "sft" if mode == "both" else ""
        return [Stage("sft", "sft", ""), Stage("grpo", "grpo", origin)] if origin else [Stage(mode, mode, "")]
    first, grpo = Stage("zero-shot", "eval", ""), Stage("grpo-eval", "eval", "grpo")
    if not with_sft:
        return [first, Stage("grpo", "grpo", ""), grpo]
    return [first, Stage("sft", "sft", ""), Stage("sft-eval", "eval", "sft"), Stage("grpo", "grpo", "sft"), grpo]


class Given(NamedTuple):
    """A flag with its values, as it was typed or stood in a file."""

    name: str  # "--sft.lr"
    tokens: list[str]  # ["--sft.lr", "1e-4"]
    typed: bool

    @property
    def kind(self) -> str:
        """The stage before the dot; none: ''."""
        return self.name.removeprefix("--").partition(".")[0] if "." in self.name else ""

    @property
    def plain(self) -> str:
        """The stage's own flag."""
        return f"--{self.name.removeprefix('--').partition('.')[2]}" if self.kind else self.name

    @property
    def built_in(self) -> bool:
        """Whether it names the embedded job's model or task."""
        return " ".join(self.for_stage()).replace("=", " ") in ("--model tiny", "--task arithmetic")

    def for_stage(self) -> list[str]:
        return [self.plain + self.tokens[0].removeprefix(self.name), *self.tokens[1:]]


def given_in(tokens: Sequence[str], typed: bool) -> list[Given]:
    """Tokens, each flag with what follows it.

    >>> [given.tokens for given in given_in(["--rewards", "a", "b", "--sft.lr=1e-4"], True)]
    [['--rewards', 'a', 'b'], ['--sft.lr=1e-4']]
    """
    found: list[Given] = []
    for token in tokens:
        if token.startswith("--"):
            found.append(Given(token.split("=")[0], [token], typed))
        elif found:
            found[-1].tokens.append(token)
        else:
            raise ValueError(f"{token}: expected a flag; --help lists them")
    return found


@dataclass(frozen=True)
class Settings:
    """A command line, understood. `configs`: by stage, checked one by one; no task and no model has been looked at but
    the start's own configuration."""

    mode: str
    stages: list[Stage]
    configs: dict[str, Any]
    start: Weights
    folder: Path
    resume: bool
    overwrite: bool
    dry_run: bool
    layers: str  # where the settings come from, for people

    @property
    def starter(self) -> Stage:
        """The stage whose flags say what the pipeline starts from: the first that trains, or the only one."""
        return min(self.stages, key=lambda stage: stage.kind == "eval")

    def as_values(self) -> dict[str, Any]:
        """What the settings file holds: the mode, and each stage's config but for what it takes over."""
        values: dict[str, Any] = {"mode": self.mode}
        for stage in self.stages:
            left_out = PASSING if stage == self.starter else (*PASSING, *TAKEN_OVER)
            config = self.configs[stage.name]
            names = [field.name for field in fields(config) if field.name not in left_out]
            values |= {f"{stage.kind}.{name}": getattr(config, name) for name in names}
        return values


def own_parser() -> Parser:
    """Of the flags that are the pipeline's own."""
    presets = sorted({name for folder in PRESETS.values() for name in preset_names(folder)})
    parser = Parser(
        [],
        prog="python -m grpo_core.pipeline",
        description=__doc__,
        epilog=ENVIRONMENT,
        allow_abbrev=False,
        usage="%(prog)s --mode MODE [--preset NAME] [--output_dir FOLDER] [--resume] [--[STAGE.]flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=MODES, help="which stages; default: both")
    add("--preset", choices=presets, help="named settings of all stages; default: tiny, unless --model, --task or "
        "--config is given")  # fmt: skip
    add("--config", type=Path, help="a YAML file of `flag: value` lines, such as a pipeline folder's pipeline.yaml")
    add("--output_dir", "--output_path", help="the folder of all stages' run folders; default: a new one under runs/")
    add("--resume", nargs="?", const=NEWEST, help="go on with the pipeline in --output_dir, or begin it where there is "
        "none; finished stages are left as they are. --resume FOLDER: with that one, its settings from it")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the stages that are in --output_dir and begin anew")
    add("--dry_run", action="store_true", help="load and check everything, say what each stage would do, and end")
    return parser


def understood(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """
    Raises:
        ValueError: as `parse_config`; a flag that no stage of the mode has, or that several have and mean differently;
            a preset that a stage has not.
    """
    typed, parser = given_in(["--help"] if "-h" in argv else argv, typed=True), own_parser()
    own_names = {option for option in parser._option_string_actions if option.startswith("--")}
    own_typed, stages_typed = _parted(typed, own_names)
    own, outer = parser.parse_args(_tokens(own_typed)), from_environment(environ)
    folder = _folder(own, outer)
    begun = folder / SETTINGS if own.resume and (folder / SETTINGS).is_file() else None
    file = own.config or (None if own.preset else begun)
    own_in_file, stages_in_file = _parted(given_in(as_flags(read_yaml(file)) if file else [], False), own_names)
    own = parser.parse_args(_tokens([*own_in_file, *own_typed]))
    of_environment = given_in(as_flags({"model": outer["model"]}) if "model" in outer else [], False)

    rest = [*of_environment, *stages_in_file, *stages_typed]
    own_job = any(given.plain in ("--model", "--task") and not given.built_in for given in rest)
    preset, mode = own.preset or (None if file or own_job else "tiny"), own.mode or "both"
    has = [kind for kind in CONFIGS if preset is None or preset in preset_names(PRESETS[kind])]
    stages = stages_of(mode, with_sft="sft" in has)
    for kind in {stage.kind for stage in stages} - set(has):
        raise ValueError(f"--mode {mode}: the preset {preset} has no {kind} stage; it has {' and '.join(has)}")
    configs, start = _configs(stages, preset, rest, mode, folder)
    in_force = _in_force(outer, start, folder)
    say_environment(in_force)
    layers = [f"preset {preset}" if preset else "", "the environment" if in_force else "", str(file or "")]
    layers += [" ".join(given.name for given in stages_typed)]
    said = " < ".join(filter(None, ["defaults", *layers]))
    return Settings(mode, stages, configs, start, folder, bool(own.resume), own.overwrite, own.dry_run, said)


def _parted(given: Sequence[Given], names: set[str]) -> tuple[list[Given], list[Given]]:
    return [each for each in given if each.name in names], [each for each in given if each.name not in names]


def _tokens(given: Sequence[Given]) -> list[str]:
    return [token for each in given for token in each.tokens]


def _folder(own: argparse.Namespace, outer: Mapping[str, str]) -> Path:
    """The pipeline's folder."""
    folder = own.output_dir
    if own.resume and own.overwrite:
        raise ValueError("--overwrite: expected either --overwrite (begin anew) or --resume (go on)")
    if own.resume not in (None, NEWEST):
        if not (Path(own.resume) / SETTINGS).is_file():
            raise ValueError(f"--resume {own.resume}: holds no {SETTINGS}, so no pipeline was begun there")
        if folder and Path(folder).resolve() != Path(own.resume).resolve():
            raise ValueError(f"--resume {own.resume}: is not --output_dir {folder}; it goes on in its own folder")
        return Path(own.resume)
    if not folder and own.resume and "output_dir" not in outer:
        raise ValueError("--resume: expected --output_dir beside it, or a pipeline's folder behind it")
    return Path(folder or outer.get("output_dir") or fresh_folder("pipeline"))


def _in_force(outer: Mapping[str, str], start: Weights, folder: Path) -> dict[str, str]:
    """What the environment has set and nothing has overridden."""
    now = {"model": start.model, "output_dir": str(folder)}
    return {name: value for name, value in outer.items() if now[name] == value}


def _configs(
    stages: Sequence[Stage], preset: str | None, rest: Sequence[Given], mode: str, folder: Path
) -> tuple[dict[str, Any], Weights]:
    """Each stage's config with what it takes over, and where the first one starts."""
    order = sorted(stages, key=lambda stage: stage.kind == "eval")  # those that train say what the others evaluate
    kinds = list(dict.fromkeys(stage.kind for stage in order))
    for given in rest:
        if given.kind in kinds[1:] and given.plain.removeprefix("--") in TAKEN_OVER:
            raise ValueError(f"{given.name}: with --mode {mode} this stage takes the model of an earlier one")
    tokens = _shared_out(rest, kinds, mode)
    configs: dict[str, Any] = {}
    left: dict[str, Weights] = {}  # by a stage, in its run folder
    for stage in order:
        started = "" in left
        flags = [*([f"--preset={preset}"] if preset else []), *tokens[stage.kind]]
        flags += left[stage.origin].flags if started else []
        config = parse_config(CONFIGS[stage.kind], flags, PRESETS[stage.kind])
        if not started:
            left[""] = _start(config, folder, several=len(stages) > 1)
        configs[stage.name] = config
        left[stage.name] = left[stage.origin].after(config, folder / stage.name)
    return configs, left[""]


def _start(config: Any, folder: Path, several: bool) -> Weights:
    """Where the first stage starts; the built-in model is made once for all stages."""
    if config.model == "tiny":
        return Weights(str(folder / "start") if several else "tiny", None)
    if several and config.from_scratch and config.lora:
        raise ValueError("--lora: expected a model whose weights are kept; those of --from_scratch are in no file")
    source = find_source(config)
    return Weights(source.base, source.adapter)


def _shared_out(rest: Sequence[Given], kinds: Sequence[str], mode: str) -> dict[str, list[str]]:
    """Each kind's own tokens: a layer's plain flags, then the kind's own, layer by layer."""
    flags = {kind: _flags_of(kind) for kind in CONFIGS}
    tokens: dict[str, list[str]] = {kind: [] for kind in kinds}
    for given in sorted(rest, key=lambda given: (given.typed, bool(given.kind))):
        if given.kind:
            if given.kind not in CONFIGS or given.plain not in flags[given.kind]:
                no_such_flag(given.name, [f"--{kind}.{flag[2:]}" for kind in CONFIGS for flag in flags[kind]])
            if given.kind in tokens:
                tokens[given.kind] += given.for_stage()
            elif given.typed:
                raise ValueError(f"{given.name}: --mode {mode} has no {given.kind} stage")
            continue
        having = [kind for kind in CONFIGS if given.plain in flags[kind] and given.plain != "--config"]
        if not having:
            no_such_flag(given.name, _every(flags.values()))
        here, name = [kind for kind in kinds if kind in having], given.plain.removeprefix("--").removeprefix("no_")
        if not here and given.typed:
            raise ValueError(f"{given.name}: no stage of --mode {mode} has it; {' and '.join(having)} would")
        if name in DIFFERENT and len(here) > 1:
            choice = " or ".join(f"--{kind}.{given.plain[2:]}" for kind in here)
            raise ValueError(f"{given.name}: {' and '.join(here)} each have their own; expected {choice}")
        here = here[:1] if name in START else [kind for kind in here if kind != "eval" or name != "use_4bit"]
        for kind in here:
            tokens[kind] += given.for_stage()
    return tokens


def _flags_of(kind: str) -> list[str]:
    """The flags that a stage takes; the pipeline sees to its folder."""
    passing = {f"--{prefix}{name}" for name in PASSING for prefix in ("", "no_")}
    return [flag for flag in parser_of(CONFIGS[kind]).flags if flag not in passing and flag != "--help"]


def _every(groups: Iterable[Iterable[str]]) -> list[str]:
    known = [option for option in own_parser().flags if option != "--help"]
    return [*known, *dict.fromkeys(flag for group in groups for flag in group)]
