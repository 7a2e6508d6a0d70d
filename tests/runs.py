"""Small whole runs of GRPO and SFT, read back."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo_core.job
import grpo_core.train
import grpo_core.warmstart
import sft_core.train
from tests.helpers import SHARED

REAL_QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"
REAL_GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"

B, G, STEPS = 2, 4, 6  # prompts in a step, completions of each, steps
PROMPTS = ["--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
QUIET = ["--device", "cpu", "--no_progress"]
SMALL = ["--prompts_per_step", str(B), "--group_size", str(G), "--micro_batch", "3", "--max_completion_tokens", "12"]
# length_reward pays by the length of the text: a hardly trained model earns it, unlike the answer's own reward.
REWARDS = ["--rewards", "tests.helpers:length_reward", "numeric_reward_func", "tests.runs:row_reward"]
REWARDS += ["--reward_weights", "2", "1", "0.5"]


def row_reward(prompts: list[str], completions: list[str], answer: list[str], **columns: list[Any]) -> list[float]:
    """Says which row it was called for."""
    assert prompts == columns["question"]
    return [len(question) + int(gold) / 100 for question, gold in zip(prompts, answer, strict=True)]


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    path: Path
    out: str

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} in {name} is not JSON")

        lines = (self.path / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    @property
    def train(self) -> list[dict[str, Any]]:
        return [line for line in self.jsonl("log.jsonl") if line["kind"] == "train"]

    @property
    def eval(self) -> list[dict[str, Any]]:
        return [line for line in self.jsonl("log.jsonl") if line["kind"] == "eval"]

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self.jsonl("completions.jsonl")


def grpo(folder: Path, *flags: str) -> Run:
    """`python -m grpo_core.train`, small."""
    out = io.StringIO()
    argv = [*PROMPTS, *SMALL, *REWARDS, *QUIET, "--precision", "float32", "--lr", "1e-3", "--eval_batch_size", "4"]
    with contextlib.redirect_stdout(out):
        grpo_core.train.main([*argv, "--output_dir", str(folder), *flags])
    return Run(folder, out.getvalue())


def sft(folder: Path, *flags: str) -> Path:
    """`python -m sft_core.train`, small; its final/ folder."""
    argv = [*PROMPTS, *QUIET, "--no_tensorboard", "--precision", "float32", "--max_completion_tokens", "48"]
    sft_core.train.main([*argv, "--batch_size", "4", "--eval_problems", "2", "--output_dir", str(folder), *flags])
    return folder / "final"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
