"""From one command line to the settings of several stages. What its flags mean: grpo_core/pipeline/stageflags.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from grpo_core.pipeline.stageflags import (
    CONFIGS,
    KNOWN,
    MODES,
    PRESETS,
    Given,
    flags_of,
    given_in,
    own_parser,
    shared_out,
)
from sft_core.cli import (
    as_flags,
    fields_of,
    from_environment,
    keys_set_in,
    parse_config,
    parser_of,
    preset_names,
    read_own,
    read_yaml,
    say_environment,
    told_layers,
)
from sft_core.config import NEWEST, PASSING
from sft_core.model.source import find_source
from sft_core.names import own_flags
from sft_core.run.runlog import fresh_folder

SETTINGS = "pipeline.yaml"  # in the pipeline's folder: the resolved settings of all stages; --config takes it back

TAKEN_OVER = ("model", "adapter_path", "from_scratch", "config_overrides")  # by a stage from the one before it


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


def every_stage_name() -> list[str]:
    """The folders of all modes' stages."""
    return list(dict.fromkeys(stage.name for mode in MODES for stage in stages_of(mode)))


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
    preset: str | None
    layers: str  # where the settings come from, for people

    @property
    def starter(self) -> Stage:
        """The stage whose flags say what the pipeline starts from: the first that trains, or the only one."""
        return min(self.stages, key=lambda stage: stage.kind == "eval")

    def as_values(self) -> dict[str, Any]:
        """What the settings file holds: the mode, and each stage's config but for what it takes over. The preset still
        says which stages there are."""
        values: dict[str, Any] = {"mode": self.mode, "preset": self.preset}
        for stage in self.stages:
            left_out = PASSING if stage == self.starter else (*PASSING, *TAKEN_OVER)
            config = self.configs[stage.name]
            names = [field.name for field in fields(config) if field.name not in left_out]
            values |= {f"{stage.kind}.{name}": getattr(config, name) for name in names}
        return values


def understood(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """
    Raises:
        ValueError: as `parse_config`; a flag that no stage of the mode has, or that several have and mean differently;
            a preset that a stage has not.
    """
    argv, parser = ["--help" if token == "-h" else token for token in argv], own_parser()
    typed = given_in(own_flags(argv, KNOWN), typed=True)
    own_names = {option for option in parser._option_string_actions if option.startswith("--")}
    own_typed, stages_typed = _parted(typed, own_names)
    own, outer = parser.parse_args(_tokens(own_typed)), from_environment(environ)
    folder = _folder(own, outer)
    begun = folder / SETTINGS if own.resume and (folder / SETTINGS).is_file() else None
    file = own.config or (None if own.preset else begun)
    in_file = given_in(as_flags(read_own(file, KNOWN)) if file else [], False)
    own_in_file, stages_in_file = _parted(in_file, own_names)
    typed = given_in(own_flags(argv, KNOWN, keys_set_in(file)), True)
    own_typed, stages_typed = _parted(typed, own_names)
    own = parser.parse_args(_tokens([*own_in_file, *own_typed]))
    of_environment = given_in(as_flags({"model": outer["model"]}) if "model" in outer else [], False)

    rest = [*of_environment, *stages_in_file, *_in_typed_files(stages_typed), *stages_typed]
    own_job = any(given.plain in ("--model", "--task") and not given.built_in for given in rest)
    preset, mode = own.preset or (None if file or own_job else "tiny"), own.mode or "both"
    has = [kind for kind in CONFIGS if preset is None or preset in preset_names(PRESETS[kind])]
    stages = stages_of(mode, with_sft="sft" in has)
    for kind in {stage.kind for stage in stages} - set(has):
        raise ValueError(f"--mode {mode}: the preset {preset} has no {kind} stage; it has {' and '.join(has)}")
    if begun:
        _same_origins(stages, stages_of(read_yaml(begun).get("mode", mode), with_sft="sft" in has), mode, folder)
    configs, start = _configs(stages, preset, rest, mode, folder)
    in_force = _in_force(outer, start, folder)
    say_environment(in_force)
    said = told_layers(preset, in_force, file, [given.name for given in stages_typed])
    return Settings(mode, stages, configs, start, folder, bool(own.resume), own.overwrite, own.dry_run, preset, said)


def _in_typed_files(typed: Sequence[Given]) -> list[Given]:
    """The lines of each --STAGE.config FILE, which count for more than those of --config. What a stage takes over is
    not among them, nor what it does not have: of that its own parser knows more to say."""
    found: list[Given] = []
    for given in typed:
        if given.kind in CONFIGS and given.plain == "--config":
            known = set(flags_of(given.kind))
            file = parser_of(CONFIGS[given.kind]).parse_known_args(given.for_stage())[0].config
            values = {
                name: value
                for name, value in read_own(file, fields_of(CONFIGS[given.kind])).items()
                if name not in TAKEN_OVER
            }
            values = {f"{given.kind}.{name}": value for name, value in values.items() if f"--{name}" in known}
            found += given_in(as_flags(values), typed=False)
    return found


def _parted(given: Sequence[Given], names: set[str]) -> tuple[list[Given], list[Given]]:
    return [each for each in given if each.name in names], [each for each in given if each.name not in names]


def _tokens(given: Sequence[Given]) -> list[str]:
    return [token for each in given for token in each.tokens]


def _folder(own: argparse.Namespace, outer: Mapping[str, str]) -> Path:
    """The pipeline's folder."""
    folder = own.output_dir
    if own.resume and own.overwrite:
        raise ValueError("--overwrite: expected either --overwrite (start again) or --resume (continue)")
    if own.resume not in (None, NEWEST):
        if not (Path(own.resume) / SETTINGS).is_file():
            raise ValueError(f"--resume {own.resume}: holds no {SETTINGS}, so no pipeline was started there")
        if folder and Path(folder).resolve() != Path(own.resume).resolve():
            raise ValueError(
                f"--resume {own.resume}: is not --output_dir {folder}; a pipeline continues in its own folder"
            )
        return Path(own.resume)
    if not folder and own.resume and "output_dir" not in outer:
        raise ValueError("--resume: expected --output_dir as well, or --resume FOLDER")
    return Path(folder or outer.get("output_dir") or fresh_folder("pipeline"))


def _same_origins(stages: Sequence[Stage], begun: Sequence[Stage], mode: str, folder: Path) -> None:
    then = {stage.name: stage.origin for stage in begun}
    for stage in stages:
        if then.get(stage.name, stage.origin) != stage.origin:
            starts = [f"from {origin}" if origin else "with --model" for origin in (then[stage.name], stage.origin)]
            raise ValueError(
                f"--mode {mode}: the {stage.name} of the pipeline in {folder} starts {starts[0]}, not {starts[1]}"
            )


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
    tokens = shared_out(rest, kinds, mode)
    configs: dict[str, Any] = {}
    left: dict[str, Weights] = {}  # by a stage, in its run folder
    for stage in order:
        started = "" in left
        flags = [*([f"--preset={preset}"] if preset else []), *tokens[stage.kind]]
        flags += left[stage.origin].flags if started else []
        try:
            config = parse_config(CONFIGS[stage.kind], flags, PRESETS[stage.kind])
        except ValueError as error:
            flag, rest_of_it = re.match(r"(--\w+|)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
            typed = {given.plain: given.name for given in rest if given.kind == stage.kind}
            raise ValueError(typed.get(flag, flag) + rest_of_it) from error
        if not started:
            left[""] = _start(config, folder, stages)
        configs[stage.name] = config
        left[stage.name] = left[stage.origin].after(config, folder / stage.name)
    return configs, left[""]


def _start(config: Any, folder: Path, stages: Sequence[Stage]) -> Weights:
    """Where the first stage that trains starts; the built-in model is made once for all stages."""
    if config.model == "tiny":
        return Weights(str(folder / "start") if len(stages) > 1 else "tiny", None)
    if len(stages) > 1 and config.from_scratch and (config.lora or stages[0].kind == "eval"):
        raise ValueError(
            "--from_scratch: its random weights are in no file, but --mode all and stages after --lora need one"
        )
    source = find_source(config)
    return Weights(source.base, source.adapter)
