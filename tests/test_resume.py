"""Exact resume: runs that are killed, interrupted and gone on with end as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch

import grpo_core.train
import sft_core.train
from sft_core.config import OptimConfig
from sft_core.learn.optim import Optimizer
from sft_core.model.policy import Policy
from sft_core.model.tiny import build_tiny
from sft_core.run.checkpoint import load_state, save_state
from tests.faulty import FORKS
from tests.helpers import PEFT_IS_BEHIND, tiny_policy
from tests.killing import Program, child, differences, finished_in, log, run_killed

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), FORKS]

STEPS = 6
TASK = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
QUIET = ["--device", "cpu", "--no_progress", "--precision", "float32", "--max_steps", str(STEPS), "--lr", "1e-2"]
GRPO = ["--prompts_per_step", "2", "--group_size", "4", "--max_completion_tokens", "6", "--eval_problems", "3"]
GRPO += ["--rewards", "tests.helpers:length_reward", "--show_every", "0", "--eval_every", "2"]
SFT = ["--batch_size", "4", "--max_completion_tokens", "40", "--eval_problems", "3", "--eval_every", "2"]

# What a run keeps between its steps, each in a case of its own.
CASES: dict[str, tuple[Program, list[str]]] = {
    "as it comes": (grpo_core.train.main, [*GRPO, "--eval_samples", "2"]),
    "mu and a reference": (grpo_core.train.main, [*GRPO, "--mu", "2", "--beta", "0.1", "--lr_schedule", "cosine"]),
    "accumulation, a reference that moves": (
        grpo_core.train.main,
        [*GRPO, "--micro_batch", "3", "--beta", "0.1", "--ref_sync_every", "2", "--warmup_ratio", "0.3"],
    ),
    "LoRA with a reference": (grpo_core.train.main, [*GRPO, "--lora", "--lora_r", "4", "--beta", "0.1"]),
    "fp16 with its scaler": (grpo_core.train.main, [*GRPO, "--precision", "fp16"]),
    "further prompts, random rewards": (
        grpo_core.train.main,
        [*GRPO, "--dynamic_sampling", "2", "--rewards", "tests.test_resume:lottery"],
    ),
    "shuffled rewards": (grpo_core.train.main, [*GRPO, "--shuffle_rewards"]),
    "moments in a file": (grpo_core.train.main, [*GRPO, "--offload_optimizer", "HERE"]),
    "SFT": (sft_core.train.main, [*SFT, "--micro_batch", "3"]),
    "SFT with LoRA and dropout": (sft_core.train.main, [*SFT, "--lora", "--lora_r", "4", "--lora_dropout", "0.2"]),
    "SFT in fp16": (sft_core.train.main, [*SFT, "--precision", "fp16"]),
}

# The other cases differ in what a checkpoint holds, which the first test looks at.
KILLED = ["accumulation, a reference that moves", "SFT"]


def lottery(completions: Sequence[str], **columns: object) -> list[float]:
    """Draws from every random generator that a reward function may use; groups are often of equal rewards."""
    return [float(random.random() + numpy.random.random() + torch.rand(()).item() > 1.8) for _ in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("start") / "model", seed=0)


def command(flags: Sequence[str], model: Path, folder: Path) -> list[str]:
    here = [str(folder.parent) if flag == "HERE" else flag for flag in flags]
    return ["--model", str(model), *TASK, *QUIET, *here, "--output_dir", str(folder)]


def started(program: Program, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the program here, to its end; what it says on stderr."""
    program(argv)
    return capsys.readouterr().err


@pytest.mark.parametrize("case", [case for case in CASES if "fp16" not in case])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on_from([1, 3, STEPS] if case in ("as it comes", "SFT") else [3], case, model, tmp_path, capsys)


@pytest.mark.parametrize("case", [case for case in CASES if "fp16" in case])  # slow on a CPU
def test_a_run_resumed_in_fp16_ends_with_the_same_bits(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on_from([3], case, model, tmp_path, capsys)


def goes_on_from(
    steps: Sequence[int], case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, flags = CASES[case]
    whole = tmp_path / "whole"
    argv = [*command(flags, model, whole), "--save_every", "1", "--keep_last", "0"]
    started(program, argv, capsys)
    for step in steps:
        again = tmp_path / f"from-{step}"
        shutil.copytree(whole, again)
        shutil.rmtree(again / "final")
        said = started(program, ["--resume", str(again / "checkpoints" / f"step-{step:06d}")], capsys)
        assert said.count("is later: it is set aside") == STEPS - step
        assert differences(whole, again) == []


@pytest.mark.parametrize("before", ["", "cpu", "HERE"])
@pytest.mark.parametrize("after", ["", "cpu", "HERE"])
def test_an_optimizer_resumes_in_the_state_that_was_saved(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it has kept its moments, and wherever it keeps them now."""
    monkeypatch.setattr("sft_core.learn.offload.PIECE", 64)  # parameters have many pieces

    def optimizer(policy: Policy, where: str) -> Optimizer:
        config = OptimConfig(lr=1e-2, offload_optimizer=str(tmp_path) if where == "HERE" else where, micro_batch=4)
        return Optimizer(policy, config, 10)

    def step(learn: Optimizer, seed: int, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        loss = sum((torch.randn(p.shape, generator=generator) * p).sum() for p in learn.parameters)
        learn.backward(factor * loss)
        learn.clip_and_step()

    policy = tiny_policy(precision="fp16")
    left = optimizer(policy, before)
    step(left, 0, factor=float("inf"))  # the scaler's factor is another than at the start
    for seed in range(3):
        step(left, seed)
    left.micro_batch, left.skipped = 2, 1
    state = {"numbers": left.numbers(), "tensors": left.tensors(), "weights": policy.model.state_dict()}
    state["weights"] = {name: weight.clone() for name, weight in state["weights"].items() if name != "lm_head.weight"}
    save_state(tmp_path, state)
    found = load_state(tmp_path)

    other = tiny_policy(precision="fp16", seed=1)
    other.model.load_state_dict(found["weights"], strict=False)
    goes_on = optimizer(other, after)
    goes_on.load(found["numbers"], found["tensors"])
    assert (goes_on.lr, goes_on.numbers()) == (left.lr, left.numbers())
    for learn in (left, goes_on):
        step(learn, 3)
        step(learn, 4)
    assert goes_on.numbers() == left.numbers() and goes_on.scaler.get_scale() == 2.0**15
    assert all(torch.equal(mine, its) for mine, its in zip(goes_on.parameters, left.parameters, strict=True))


def test_a_run_does_not_resume_in_another_precision(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, flags = CASES["SFT"]
    started(program, [*command(flags, model, tmp_path / "run"), "--save_every", "1"], capsys)
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(SystemExit) as caught:
        program(["--resume", str(tmp_path / "run"), "--precision", "bf16"])
    assert caught.value.code == 2
    changed = "the precision is not what it was when the run began (float32; now bfloat16)"
    assert capsys.readouterr().err == f"error: --resume {tmp_path / 'run'}: {changed}\n"


def end_of(program: Program, argv: Sequence[str], out: Path) -> int:
    code = finished_in(child(program, argv, out), 600)
    assert code is not None
    return code


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(case: str, model: Path, tmp_path: Path) -> None:
    program, flags = CASES[case]
    whole, killed, out = tmp_path / "whole", tmp_path / "killed", tmp_path / "out.txt"
    start = time.monotonic()
    assert end_of(program, command(flags, model, whole), out) == 0, out.read_text()
    took = time.monotonic() - start
    argv = [*command(flags, model, killed), "--save_every", "1"]
    kills, code = run_killed(program, argv, out, kills=4, longest=took / 2, seed=len(case))
    assert code == 0, out.read_text()
    assert kills >= 2
    assert differences(whole, killed) == []
    assert [line["step"] for line in log(killed) if line["kind"] == "train"] == list(range(1, STEPS + 1))
