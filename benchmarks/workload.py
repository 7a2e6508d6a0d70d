"""What the benchmarks run: a GRPO configuration by name, with its start weights on disk, and the learner for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_core import train
from grpo_core.config import GRPOConfig
from grpo_core.forecast.memory import fitted
from grpo_core.job import prepare
from grpo_core.step import Learner, StepReport, grpo_step
from grpo_core.warmstart import tiny_sft
from sft_core.cli import parse_config
from sft_core.model.policy import load_policy

PRESETS = Path(__file__).parent / "presets"


def names() -> list[str]:
    """The presets of grpo_core and this package's own."""
    return sorted(path.stem for folder in (PRESETS, train.PRESETS) for path in folder.glob("*.yaml"))


def workload(name: str, flags: Sequence[str]) -> GRPOConfig:
    """A workload by name, with any flags of grpo_core.train over it.

    Raises:
        ValueError: as `parse_config`.
    """
    presets = PRESETS if (PRESETS / f"{name}.yaml").is_file() else train.PRESETS
    return parse_config(GRPOConfig, ["--preset", name, "--progress=False", "--tensorboard=False", *flags], presets)


def with_start(config: GRPOConfig, folder: Path) -> GRPOConfig:
    """The same workload with its start weights on disk, made where there are none: the built-in model's SFT, or the
    random weights of --from_scratch in `folder`."""
    if config.model == "tiny":
        return replace(config, model=str(tiny_sft(config)))
    if config.from_scratch:
        policy = load_policy(replace(config, device="cpu", keep_freed_memory=False))
        policy.save(folder)
        return replace(config, model=str(folder), from_scratch=False, config_overrides=[])
    return config


@dataclass
class Steps:
    """Steps of a workload, one at a call, as `grpo_core.train` takes them."""

    learner: Learner
    source: train.PromptSource

    @classmethod
    def of(cls, config: GRPOConfig) -> Steps:
        job = prepare(config)
        assert job.source is not None, "with_start comes first"
        prompts, fit = train.PromptSource(job.task, config.seed), fitted(config, job.source)
        learner = replace(job, config=fit.config).learner(job.source, prompts, fit.micro_batch)
        learner.policy.model.train()
        return cls(learner, prompts)

    def __call__(self) -> StepReport:
        return grpo_step(self.learner, self.source(self.learner.config.prompts_per_step))
