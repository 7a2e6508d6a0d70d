"""What `sft_core.learn.offload` claims: AdamW's own arithmetic to the bit, with its moments elsewhere between steps."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_core.train
import sft_core.train
from sft_core.config import OptimConfig
from sft_core.learn import offload
from sft_core.learn.optim import Optimizer
from sft_core.model.policy import Policy
from tests.helpers import (
    PEFT_IS_BEHIND,
    adapted,
    ends_often,
    grpo_config,
    learner,
    step,
    tiny_policy,
    weights,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

KINDS = ("qwen2", "gpt2", "lora")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", "folder"])
def where(request: Any, tmp_path: Path) -> str:
    return "cpu" if request.param == "cpu" else str(tmp_path)


def policy_of(kind: str, precision: Any = "float32") -> Policy:
    policy = tiny_policy("gpt2" if kind == "gpt2" else "qwen2", precision=precision)
    return adapted(policy) if kind == "lora" else policy


def optimizer(policy: Policy, where: str, **config: Any) -> Optimizer:
    settings = {"lr": 1e-2, "lr_schedule": "cosine", "weight_decay": 0.1, "warmup_ratio": 0.2}
    return Optimizer(policy, OptimConfig(**(settings | config), offload_optimizer=where), total_steps=10)


def random_gradients(learn: Optimizer, seed: int, without: int = 0) -> None:
    """A gradient for each parameter but every `without`-th, as large as the scaler's factor makes it."""
    generator, factor = torch.Generator().manual_seed(seed), float(learn.scaler.scale(torch.ones(())))
    for number, p in enumerate(learn.parameters):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if without and number % without == 0 else gradient * factor


@kinds
@pytest.mark.parametrize("piece", [2**24, 1000])
def test_every_weight_is_that_of_a_plain_adamw_to_the_bit(
    kind: str, piece: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "PIECE", piece)
    policies = [policy_of(kind), policy_of(kind)]
    optimizers = [optimizer(policy, place) for policy, place in zip(policies, ("", where), strict=True)]
    start = weights(policies[0])
    for number in range(6):
        for learn in optimizers:
            random_gradients(learn, number, without=3 * (number % 2))  # in every other step some have none
        norms = [learn.clip_and_step() for learn in optimizers]
        assert norms[0] == norms[1] and optimizers[0].lr == optimizers[1].lr
        plain, offloaded = map(weights, policies)
        assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    moved = [name for name in start if not torch.equal(start[name], plain[name])]
    assert len(moved) == len(policies[0].trainable())


def test_an_overflow_moves_neither_weights_nor_moments(where: str) -> None:
    policies = [policy_of("qwen2", "fp16"), policy_of("qwen2", "fp16")]
    optimizers = [optimizer(policy, place) for policy, place in zip(policies, ("", where), strict=True)]
    for number, factor in enumerate((math.inf, 1.0, math.nan, 1.0, 1.0)):
        for learn in optimizers:
            random_gradients(learn, number)
            learn.parameters[3].grad[0] *= factor  # type: ignore[index]
        plain, offloaded = (learn.clip_and_step()[1] for learn in optimizers)
        assert plain == offloaded == (factor != 1.0)
        assert optimizers[0].scaler.get_scale() == optimizers[1].scaler.get_scale()
        assert all(torch.equal(a, b) for a, b in zip(*(weights(p).values() for p in policies), strict=True))


def test_steps_of_grpo_are_the_same_to_the_bit(where: str) -> None:
    found = []
    for place in ("", where):
        policy = ends_often(tiny_policy())
        parts = learner(policy, grpo_config(mu=2, beta=0.1, lr=1e-2, offload_optimizer=place))
        for seed in range(2):
            step(parts, seed)
        found.append(weights(policy))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_first_step_without_any_gradient_moves_the_schedule_as_plain_adamw_does(where: str) -> None:
    """torch warns, and a warning is an error here, of a schedule that moves before its optimizer."""
    for place in ("", where):
        learn = optimizer(policy_of("qwen2"), place, warmup_ratio=0.0)
        lr = learn.lr
        assert learn.clip_and_step() == (0.0, False) and learn.lr < lr


def test_a_first_step_that_is_skipped_is_no_step_of_the_schedule(where: str) -> None:
    policy = policy_of("qwen2")
    learn = optimizer(policy, where, warmup_ratio=0.0)
    for factor in (math.nan, 1.0):
        lr = learn.lr
        random_gradients(learn, seed=0)
        learn.parameters[0].grad *= factor  # type: ignore[operator]
        learn.clip_and_step()
        assert (learn.lr < lr) == (factor == 1.0)


# --- memory ---


def mapped(folder: Path) -> int:
    """How many files below the folder this process has in its address space."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    return sum(f" {folder}/" in line for line in maps.read_text().splitlines())


def test_one_piece_of_moments_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 1000)
    policy = policy_of("qwen2")
    learn = optimizer(policy, str(tmp_path))
    counts: list[tuple[int, int]] = []
    learn.adamw.register_step_post_hook(lambda *_: counts.append((len(learn.adamw.state), mapped(tmp_path))))
    for number in range(2):
        random_gradients(learn, number)
        learn.clip_and_step()
        assert mapped(tmp_path) == len(learn.adamw.state) == 0
        assert all(p.grad is None for p in learn.parameters)
    pieces = sum(-(-p.numel() // 1000) for p in learn.parameters)
    assert pieces > len(learn.parameters)
    assert counts == 2 * [(0, 0), *[(1, 1)] * pieces]  # first a step of nothing, for the schedule


def test_the_gradient_of_a_parameter_that_has_moved_is_given_up() -> None:
    learn = optimizer(policy_of("qwen2"), "cpu")
    random_gradients(learn, 0)
    seen = [weakref.ref(p.grad) for p in learn.parameters if p.grad is not None]
    alive: list[int] = []
    learn.adamw.register_step_post_hook(lambda *_: alive.append(sum(gradient() is not None for gradient in seen)))
    learn.clip_and_step()
    assert alive == [len(seen), *range(len(seen), 0, -1)]


def test_the_optimizers_groups_are_whole_again_after_a_step(where: str) -> None:
    learn = optimizer(policy_of("qwen2"), where)
    before = [list(map(id, group["params"])) for group in learn.adamw.param_groups]
    random_gradients(learn, 0)
    learn.clip_and_step()
    assert [list(map(id, group["params"])) for group in learn.adamw.param_groups] == before


def test_the_file_has_room_for_two_numbers_a_weight_and_no_name(tmp_path: Path) -> None:
    policy = policy_of("qwen2")
    learn = optimizer(policy, str(tmp_path))
    random_gradients(learn, 0)
    learn.clip_and_step()
    assert learn.offloaded and learn.offloaded.file is not None
    file, pages = learn.offloaded.file, [-(-8 * p.numel() // 4096) for _, p in policy.trainable()]
    assert os.fstat(file).st_size == os.fstat(file).st_blocks * 512 == 4096 * sum(pages)
    assert list(tmp_path.iterdir()) == []
    del learn
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=rf"^--offload_optimizer {tmp_path}: no room for .* GB there \(No space left"):
        optimizer(policy_of("qwen2"), str(tmp_path))


def test_two_runs_in_one_folder_do_not_share_files(tmp_path: Path) -> None:
    first, second = (optimizer(policy_of("qwen2"), str(tmp_path)) for _ in range(2))
    alone = optimizer(policy_of("qwen2"), "")
    for learn, seed in ((first, 0), (second, 1), (second, 2), (first, 3), (alone, 0), (alone, 3)):
        random_gradients(learn, seed)
        learn.clip_and_step()
    pairs = zip(first.parameters, alone.parameters, strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in pairs)


LEAVES_AT_ONCE = """
import sys, torch
from sft_core.learn.offload import OffloadedAdamW
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
kept = OffloadedAdamW(torch.optim.AdamW([weight], fused=True), [weight], sys.argv[1])
kept.step()
raise SystemExit(3)
"""


def test_a_program_that_ends_with_its_optimizer_says_nothing_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", LEAVES_AT_ONCE, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode == 3 and ended.stderr == ""


@pytest.mark.parametrize("main", [sft_core.train.main, grpo_core.train.main])
@pytest.mark.parametrize("name", ["no-such-folder", "a-file"])
def test_a_place_that_is_no_folder_is_refused_in_one_line(
    main: Callable[[list[str]], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["--offload_optimizer", str(tmp_path / name), "--max_steps", "1"])
    assert caught.value.code == 2
    expected = f"error: --offload_optimizer {tmp_path / name}: expected cpu, or an existing folder on a disk"
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [expected]
