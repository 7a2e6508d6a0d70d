"""A trained model by the name that a user gives: its run folder, a folder of the model itself, or a name on the hub."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_core.model.source import is_a_path
from sft_core.run.checkpoint import checkpoints, is_checkpoint, step_of
from sft_core.text.config import PromptConfig


@dataclass(frozen=True)
class Trained:
    """What --model takes, and the run that made it where there is one on this disk."""

    model: str
    run: Path | None

    @property
    def step(self) -> float:
        """The last step that the model has seen: a checkpoint's own, else the run's last one, whatever it is."""
        path = Path(self.model)
        return step_of(path) if self.run and is_checkpoint(path) else math.inf

    def settings(self) -> dict[str, Any]:
        """The run's config.yaml; nothing without a run.

        Raises:
            ValueError: it is not YAML of `name: value` lines.
        """
        if self.run is None:
            return {}
        path = self.run / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected `name: value` lines")
        return values

    def prompt_settings(self) -> dict[str, Any]:
        """The prompt's settings and the completion budget: what must be the same when the model is
        asked again."""
        names = [*(field.name for field in dataclasses.fields(PromptConfig)), "max_completion_tokens"]
        return {name: value for name, value in self.settings().items() if name in names}

    def hub_base(self) -> str | None:
        """The hub's name of the model that the training began with, through one run after the other. None: a built-in
        or unknown one, or one that is only on this machine."""
        at, name = self, self.model
        for _ in range(10):  # SFT, GRPO, perhaps GRPO again; a circle must end, too
            if not Path(name).is_dir():
                return None if name == "tiny" or is_a_path(name) else name
            base = at.settings().get("model") or base_of_adapter(Path(name))
            if not isinstance(base, str):
                return None
            at, name = find_trained(base), base
        return None


def find_trained(name: str) -> Trained:
    """`name`: a run folder, its final/, one of its checkpoints, any other model or adapter folder, or a hub name.

    Raises:
        ValueError: a run folder that holds no final/ yet.
    """
    path = Path(name)
    if _is_run(path):
        if not (path / "final").is_dir():
            newest = [f"; its newest checkpoint is {found}" for found in checkpoints(path)[-1:]]
            raise ValueError(f"{name}: this run has no final/ yet" + "".join(newest))
        return Trained(str(path / "final"), path)
    above = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
    return Trained(name, next((run for run in above if path.is_dir() and _is_run(run)), None))


def find_both(model: str, adapter: str | None) -> tuple[Trained, dict[str, Any]]:
    """The one that was trained last, the adapter where there is one, and what --model and --adapter_path mean.

    Raises:
        ValueError: as `find_trained`.
    """
    below = find_trained(model)
    last = find_trained(adapter) if adapter else below
    return last, {"model": below.model, "adapter_path": last.model if adapter else None}


def model_first(argv: Sequence[str]) -> list[str]:
    """A command line in which the model may stand first, without its flag.

    >>> model_first(["runs/grpo", "--seed", "1"]), model_first(["--model", "x"])
    (['--model', 'runs/grpo', '--seed', '1'], ['--model', 'x'])
    """
    return ["--model", *argv] if argv and not argv[0].startswith("-") else list(argv)


def base_of_adapter(folder: Path) -> str | None:
    """What the folder's adapter_config.json names as the model below it; None where there is none."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) else None


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "provenance.json").is_file()
