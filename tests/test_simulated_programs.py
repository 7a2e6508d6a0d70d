"""Whole programs on the simulated device, and slips that would only show on a GPU: planted, and found there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import grpo_core.train
import sft_core.train
from eval.samples import Sheet
from sft_core.learn import layout, logprobs
from sft_core.learn.rows import Rows
from tests.helpers import grpo_config, learner, step, tiny_policy
from tests.killing import differences, log
from tests.simulated import NEEDS_THE_HOOKS, moved, on_the_device

pytestmark = NEEDS_THE_HOOKS

THERE = ["--device", "simulated", "--no_progress", "--max_steps", "2", "--lr", "1e-2"]
TASK = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
GRPO = ["--prompts_per_step", "2", "--group_size", "3", "--max_completion_tokens", "6", "--eval_problems", "2"]
GRPO += ["--rewards", "tests.helpers:length_reward", "--eval_samples", "2", "--beta", "0.1", "--precision", "fp16"]
SFT = ["--batch_size", "4", "--max_completion_tokens", "38", "--eval_problems", "2", "--precision", "float32"]


@pytest.mark.parametrize(
    "adapter", [[], ["--lora", "--lora_r", "4", "--offload_optimizer", "cpu"]], ids=["all", "lora"]
)
@on_the_device
def test_a_run_resumed_on_the_device_ends_with_the_same_bits(adapter: list[str], model: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    saving = ["--save_every", "1", "--keep_last", "0", "--output_dir", str(whole)]
    grpo_core.train.main(["--model", str(model), *THERE, *TASK, *GRPO, *adapter, *saving])
    shutil.copytree(whole, again)
    shutil.rmtree(again / "final")
    grpo_core.train.main(["--resume", str(again / "checkpoints" / "step-000001")])
    assert differences(whole, again) == []


@on_the_device
def test_sft_ends_on_the_device_where_it_ends_on_the_cpu(model: Path, tmp_path: Path) -> None:
    losses = []
    for device in ("simulated", "cpu"):
        folder = tmp_path / device
        sft_core.train.main(
            ["--model", str(model), *THERE, *TASK, *SFT, "--device", device, "--output_dir", str(folder)]
        )
        losses.append([line["loss"] for line in log(folder) if line["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


# --- planted slips


def steps_on_the_device() -> None:
    step(learner(moved(tiny_policy()), grpo_config()))


@on_the_device
def test_a_mask_made_on_the_cpu_is_found() -> None:
    def mask_NT(self: Rows) -> Tensor:
        return torch.arange(self.completion_NT.shape[1]) < self.completion_len_N.cpu()[:, None]

    with patch.object(Rows, "mask_NT", property(mask_NT)), pytest.raises(RuntimeError, match="same device"):
        steps_on_the_device()


@on_the_device
def test_an_index_on_the_wrong_device_is_found() -> None:
    def pack(rows: Rows, by: layout.Layout) -> layout.Packed:
        packed = layout.pack(rows, by)
        return replace(packed, predictor_M=packed.predictor_M.cpu())

    with patch.object(logprobs, "pack", pack), pytest.raises(RuntimeError, match="same device"):
        steps_on_the_device()


@on_the_device
def test_a_generator_of_the_wrong_device_is_found() -> None:
    def numbers(self: Sheet, place_N1: Tensor, column_NT: Tensor) -> Tensor:
        return torch.rand(column_NT.shape, device=self.policy.device, generator=torch.Generator())

    with patch.object(Sheet, "numbers", numbers), pytest.raises(RuntimeError, match="device type for generator"):
        steps_on_the_device()
