"""One command line for several stages: which of its flags goes where.

    --mode sft      SFT
    --mode grpo     GRPO
    --mode both     SFT, then GRPO from its result
    --mode eval     an evaluation
    --mode all      an evaluation, SFT, an evaluation, GRPO, an evaluation (without SFT where the preset has none)

A plain flag goes to every stage that has it: --max_samples 100, --task FILE. A stage's name and a dot before it send it
to that stage only, where it overrides the plain one: --sft.lr 1e-4 --grpo.lr 1e-6 --sft.config FILE.
Flags that differ from stage to stage (--lr, --epochs, --max_steps, --batch_size ...) need the stage's name where
several stages have them. --config FILE holds the same settings as lines: `max_samples: 100`, `sft.lr: 1e-4`.

--model, --adapter_path, --lora, --from_scratch and --config_overrides describe the starting model, so they go to the
first stage that trains; later stages take its result. If SFT trains a LoRA adapter, GRPO continues to train it.
--push_to_hub goes to the last stage that trains.

preset < environment < --config < flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import eval.__main__
import grpo_core.train
import sft_core.train
from eval.config import EvalConfig
from grpo_core.config import GRPOConfig
from sft_core.cli import ENVIRONMENT, fields_of, no_such_flag, parser_of, preset_names
from sft_core.config import NEWEST, PASSING
from sft_core.helptext import Help, Parser
from sft_core.job import SFTConfig
from sft_core.names import Known, known_names

CONFIGS: dict[str, Any] = {"sft": SFTConfig, "grpo": GRPOConfig, "eval": EvalConfig}
PRESETS = {"sft": sft_core.train.PRESETS, "grpo": grpo_core.train.PRESETS, "eval": eval.__main__.PRESETS}
MODES = ("sft", "grpo", "both", "eval", "all")
START = ("model", "adapter_path", "lora", "from_scratch", "config_overrides")  # of the first stage that trains
END = ("push_to_hub", "private")  # of the last stage that trains
DIFFERENT = ("lr", "lr_schedule", "warmup_ratio", "max_steps", "epochs", "batch_size")  # means another thing in each

_FIELDS = {kind: fields_of(config)[""] for kind, config in CONFIGS.items()}
# What may be typed, with a stage's name before a dot and without.
KNOWN: Known = {"": [name for names in _FIELDS.values() for name in names]} | {f"{k}.": f for k, f in _FIELDS.items()}


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
            raise ValueError(f"{token}: expected a flag; --help all lists every flag")
    return found


def own_parser() -> Parser:
    """Of the flags that are the pipeline's own."""
    presets = sorted({name for folder in PRESETS.values() for name in preset_names(folder)})
    parser = Parser(
        [],
        prog="python -m grpo_core.pipeline",
        description=__doc__,
        epilog=ENVIRONMENT,
        allow_abbrev=False,
        usage="%(prog)s [--help [all]] --mode MODE [--preset NAME] [--[STAGE.]flag value ...]",
        formatter_class=Help,
        others=[parser_of(config) for config in CONFIGS.values()],
    )
    add = parser.add_argument
    add("--mode", choices=MODES, help="which stages; default: both")
    add("--preset", choices=presets, help="named settings of all stages; default: tiny, unless --model, --task or "
        "--config is given")  # fmt: skip
    add("--config", type=Path, help="a YAML file of `flag: value` lines, such as a pipeline folder's pipeline.yaml")
    add("--output_dir", "--output_path", help="the folder of all stages' run folders; default: a new one under runs/")
    add("--resume", nargs="?", const=NEWEST, help="continue the pipeline in --output_dir, or start it if there is "
        "none; finished stages are kept. --resume FOLDER: continue that one with its settings")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the stages in --output_dir and start again")
    add("--dry_run", action="store_true", help="load and check everything, print what each stage would do, and exit")
    return parser


def shared_out(rest: Sequence[Given], kinds: Sequence[str], mode: str) -> dict[str, list[str]]:
    """Each kind's own tokens: a layer's plain flags, then the kind's own, layer by layer."""
    flags = {kind: flags_of(kind) for kind in CONFIGS}
    tokens: dict[str, list[str]] = {kind: [] for kind in kinds}
    for given in sorted(rest, key=lambda given: (given.typed, bool(given.kind))):
        if given.kind:
            if given.kind not in CONFIGS or given.plain not in flags[given.kind]:
                no_such_flag(
                    given.name, [f"--{kind}.{name}" for kind in CONFIGS for name in _typable(kind, flags[kind])]
                )
            if given.kind in tokens:
                tokens[given.kind] += given.for_stage()
            elif given.typed:
                raise ValueError(f"{given.name}: --mode {mode} has no {given.kind} stage")
            continue
        having = [kind for kind in CONFIGS if given.plain in flags[kind]]
        if not having:
            no_such_flag(given.name, _every(flags.values()))
        here, name = [kind for kind in kinds if kind in having], given.plain.removeprefix("--").removeprefix("no_")
        if not here and given.typed:
            raise ValueError(f"{given.name}: no stage of --mode {mode} has it; {' and '.join(having)} would")
        if name in DIFFERENT and len(here) > 1:
            choice = " or ".join(f"--{kind}.{given.plain[2:]}" for kind in here)
            raise ValueError(f"{given.name}: {' and '.join(here)} each have their own; expected {choice}")
        for kind in _chosen(name, here):
            tokens[kind] += given.for_stage()
    return tokens


def _chosen(name: str, kinds: list[str]) -> list[str]:
    """Of the kinds that have a plain flag, those that get it."""
    if name in START:
        return kinds[:1]
    if name in END:
        return [kind for kind in kinds if kind != "eval"][-1:]
    return [kind for kind in kinds if kind != "eval" or name != "use_4bit"]  # which is of use in training alone


def flags_of(kind: str) -> list[str]:
    """The flags that a stage takes; the pipeline sees to its folder."""
    parser = parser_of(CONFIGS[kind])
    return [flag for flag in parser.flags if parser._option_string_actions[flag].dest not in (*PASSING, "help")]


def _typable(kind: str, flags: Iterable[str]) -> list[str]:
    return [*(flag[2:] for flag in flags), *known_names(_FIELDS[kind])]


def _every(groups: Iterable[Iterable[str]]) -> list[str]:
    known = [option for option in own_parser().flags if option != "--help"]
    theirs = [f"--{name}" for name in known_names(KNOWN[""])]
    return [*known, *dict.fromkeys(flag for group in groups for flag in group), *theirs]
