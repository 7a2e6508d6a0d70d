"""The built-in model's supervised start: an SFT run of its own next to the GRPO run, made once and reused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import sft_core
from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.config import NEWEST, as_yaml
from sft_core.job import SFTConfig, prepare
from sft_core.learn import ranks
from sft_core.train import PRESETS, begin


def tiny_sft(config: GRPOConfig, run: Path | None = None) -> Path:
    """The final model of the built-in SFT run for this task and seed: trained now, or by an earlier run.

    Args:
        run: the run folder that it is the start of, and that --resume is to name if the start is interrupted.
    """
    folder = tiny_sft_folder(config)
    if ranks.by_first((folder / "final").is_dir, "earlier start"):
        print(f"starting from the SFT model of an earlier run: {folder}")
        return folder / "final"
    print(f"first, supervised fine-tuning of the built-in model, kept for next time in {folder}")
    sft, unfinished = _settings(config), folder.with_name(folder.name + ".unfinished")
    start = begin(prepare(replace(sft, output_dir=str(unfinished), resume=NEWEST, save_every=config.save_every)))
    if start:  # else a kill came between the end of training and the rename below
        start.progress.again = run or unfinished
        start.finish()
    return ranks.by_first(lambda: unfinished.rename(folder), "start") / "final"


def tiny_sft_folder(config: GRPOConfig) -> Path:
    """The folder of that run, next to the GRPO run."""
    # A changed setting or a changed line of sft_core makes another start.
    sources = b"".join(path.read_bytes() for path in sorted(Path(sft_core.__file__).parent.rglob("*.py")))
    settings = as_yaml(replace(_settings(config), progress=True, deterministic=False)).encode()
    runs = Path(config.output_dir).parent if config.output_dir else Path("runs")
    return runs / f"tiny-sft-{hashlib.sha256(settings + sources).hexdigest()[:8]}"


def _settings(config: GRPOConfig) -> SFTConfig:
    sft = parse_config(SFTConfig, ["--preset", config.sft_preset], PRESETS)
    same = (
        "task",
        "difficulty",
        "prompt_format",
        "shots",
        "system_prompt",
        "chat_template_kwargs",
        "max_prompt_tokens",
        "eval_problems",
        "seed",
        "device",
        "deterministic",
        "progress",
    )
    return replace(sft, **{name: getattr(config, name) for name in same})
