"""A run folder, read: its settings, its log, and what changed between the first and the last fifth of the log's lines.

What a log does not hold is NaN, and a comparison with NaN is False: no numbers, no finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from grpo_core.config import GRPOConfig
from rewards.jsonl import read_jsonl
from sft_core.model.source import stages_in

LEAST_LINES = 10  # two lines in a fifth; one is no mean


@dataclass(frozen=True)
class Change:
    """A quantity's means over the first and the last fifth, the best mean of so many lines in a row, and the standard
    error of the difference of two such means, from the differences of neighbouring lines (which a trend leaves small).

    >>> Change.of([1, 2, 1, 2, 1, 5, 6, 5, 6, 5]).z > 3
    True
    """

    first: float = math.nan
    last: float = math.nan
    peak: float = math.nan
    error: float = math.nan

    @staticmethod
    def of(values: Sequence[float]) -> Change:
        if len(values) < LEAST_LINES:
            return Change()
        k = len(values) // 5
        windows = [fmean(values[at : at + k]) for at in range(len(values) - k + 1)]
        noise = fmean((b - a) ** 2 for a, b in zip(values, values[1:], strict=False)) / 2
        return Change(windows[0], windows[-1], max(windows), math.sqrt(noise * 2 / k))

    def _errors(self, difference: float) -> float:
        if self.error:
            return difference / self.error
        return math.copysign(math.inf, difference) if difference else 0.0

    @property
    def z(self) -> float:
        """Last minus first, in standard errors."""
        return self._errors(self.last - self.first)

    @property
    def fall(self) -> float:
        """Peak minus last, in standard errors."""
        return self._errors(self.peak - self.last)


@dataclass(frozen=True)
class Run:
    """A run folder, read: its settings, and the lines of its log by kind. None in a line is a number that was NaN or
    infinite."""

    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def grpo(self) -> bool:
        """Whether it is a run of GRPO; else of SFT."""
        return "group_size" in self.config

    def setting(self, name: str) -> Any:
        """A setting from the config, else its default in GRPOConfig."""
        return self.config.get(name, getattr(GRPOConfig, name, None))

    def values(self, name: str) -> list[float]:
        """A quantity's numbers, line by line; without those that are missing."""
        return [line[name] for line in self.train if line.get(name) is not None]

    def mean(self, name: str) -> float:
        return fmean(self.values(name) or [math.nan])

    def fifth(self, last: bool = False) -> list[dict[str, Any]]:
        """The first or the last fifth of the training lines, and one at least."""
        count = max(1, len(self.train) // 5)
        return self.train[-count:] if last else self.train[:count]

    def first(self, name: str) -> float:
        return fmean([line[name] for line in self.fifth() if line.get(name) is not None] or [math.nan])

    def last(self, name: str) -> float:
        return fmean([line[name] for line in self.fifth(last=True) if line.get(name) is not None] or [math.nan])

    def change(self, name: str) -> Change:
        return Change.of(self.values(name))

    def trend(self, name: str) -> str:
        """`reward_mean 0.31 (steps 1-8) -> 0.52 (steps 33-40)`."""
        first, last = (f"{lines[0]['step']}-{lines[-1]['step']}" for lines in (self.fifth(), self.fifth(last=True)))
        return f"{name} {self.first(name):.3g} (steps {first}) -> {self.last(name):.3g} (steps {last})"

    @cached_property
    def functions(self) -> list[str]:
        """The reward functions that were logged."""
        return [name.removeprefix("rewards/") for name in (self.train or [{}])[0] if name.startswith("rewards/")]

    def only_value(self, name: str) -> float | None:
        """The one value that a reward gave each completion of each line (NaN: none ever), else None."""
        means = {line.get(f"rewards/{name}") for line in self.train}
        if means == {None}:
            return math.nan
        varied = any(line.get(f"rewards_std/{name}") for line in self.train)
        return None if varied or len(means) > 1 else means.pop()

    @property
    def extracted(self) -> float:
        """Share of the completions in which the prompt format's rule found an answer."""
        if self.completions:
            return fmean(bool(row.get("extracted")) for row in self.completions)
        return fmean([line["format_rate"] for line in self.eval if "format_rate" in line] or [math.nan])

    def heldout(self) -> Change:
        """Held-out accuracy: first, last, best; the error is that of two samples of so many problems."""
        lines = [line for line in self.eval if line.get("accuracy") is not None and line.get("problems")]
        if len(lines) < 2:
            return Change()
        shares = [line["accuracy"] for line in lines]
        variance = sum(p * (1 - p) / line["problems"] for p, line in ((max(shares), lines[0]), (shares[-1], lines[-1])))
        return Change(shares[0], shares[-1], max(shares), math.sqrt(variance))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run of GRPO or of SFT.

    Raises:
        ValueError: the folder holds no such run.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: expected a run folder; there is no config.yaml in it{stages_in(folder)}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.yaml'}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict) or not {"group_size", "batch_size"} & set(config) or "lr" not in config:
        raise ValueError(f"{folder}: expected a run of grpo_core.train or sft_core.train, not this config.yaml")
    return config


def read_run(folder: Path, completions: bool = True) -> Run:
    """The run folder of GRPO or of SFT; without its completions, which may be many, where they are not wanted.

    Raises:
        ValueError: it is no such folder, or a line before the last one is no JSON object.
    """
    config = read_config(folder)
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: expected a run folder; there is no log.jsonl in it")
    log = read_jsonl(folder / "log.jsonl", torn_end=True)
    return Run(
        folder.resolve().name,
        config,
        [line for line in log if line.get("kind") == "train"],
        [line for line in log if line.get("kind") == "eval"],
        read_jsonl(folder / "completions.jsonl", torn_end=True) if completions else [],
    )
