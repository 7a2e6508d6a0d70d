"""What `sft_core.precision` claims: half precision where the hardware has it, and float32 where it matters.

That log-softmax is float32 under autocast is in `test_logprobs`; what a skipped step does is in `test_optim`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from grpo_core.metrics import Tally
from grpo_core.step import grpo_step
from sft_core.model import policy
from sft_core.model.tiny import build_tiny
from sft_core.precision import Precision, pick_device, pick_precision
from tests.helpers import EXAMPLES, ends_often, grpo_config, learner, tiny_policy

Name = Literal["float32", "bf16", "fp16"]
names = pytest.mark.parametrize("name", ["float32", "bf16", "fp16"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "card, capability, expected",
    [
        ("V100", (7, 0), "float16"),
        ("T4", (7, 5), "float16"),
        ("A100", (8, 0), "bfloat16"),
        ("H100", (9, 0), "bfloat16"),
    ],
)
def test_auto_picks_bf16_from_capability_8_on(
    card: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what a T4 says of itself
    assert pick_precision("auto", CUDA).name == expected


@pytest.mark.parametrize("capability, notes", [((7, 5), 1), ((8, 0), 0)])
def test_bf16_is_noted_where_a_gpu_only_emulates_it(
    capability: tuple[int, int], notes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(policy, "pick_device", lambda name: CUDA)
    config = grpo_config(model=str(build_tiny(tmp_path, seed=0)), precision="bf16")
    with pytest.raises((RuntimeError, AssertionError)):  # there is no such device to put the weights on
        policy.load_policy(config)
    assert capsys.readouterr().err.count("note: this GPU only emulates bf16") == notes


@pytest.mark.parametrize("has_bf16, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_picks_bf16_on_cpus_that_have_it(has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    assert pick_precision("auto", CPU).name == expected


def test_auto_is_float32_on_other_devices() -> None:
    assert pick_precision("auto", torch.device("mps")).name == "float32"


def test_a_device_that_is_not_there_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match="--device abacus: not available here"):
        pick_device("abacus")


@names
def test_autocast_runs_matrix_products_in_the_chosen_precision(name: Name) -> None:
    precision = pick_precision(name, CPU)
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (precision.autocast_dtype or torch.float32)


@names
def test_only_fp16_scales_its_loss(name: Name) -> None:
    assert pick_precision(name, CPU).grad_scaler().is_enabled() == (name == "fp16")


@names
def test_weights_gradients_and_optimizer_state_stay_float32(name: Name) -> None:
    policy = ends_often(tiny_policy(precision=name))
    parts = learner(policy, grpo_config(beta=0.1, mu=2))
    gradients = []
    parts.optimizer.adamw.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.dtype for p in parts.optimizer.parameters)
    )
    before = {name: p.clone() for name, p in policy.trainable()}
    grpo_step(parts, EXAMPLES)
    assert any(not torch.equal(before[name], p) for name, p in policy.trainable())
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert set(gradients) == {torch.float32}
    state = [value for values in parts.optimizer.adamw.state.values() for value in values.values()]
    assert state and {value.dtype for value in state} == {torch.float32}


@names
def test_the_first_update_has_ratio_exactly_one(name: Name) -> None:
    report = grpo_step(learner(ends_often(tiny_policy(precision=name)), grpo_config(micro_batch=4)), EXAMPLES)
    means = Tally.of(report).means()
    assert means["ratio_min"] == means["ratio_max"] == 1


@names
def test_sampler_and_learner_agree_up_to_the_rounding_of_the_precision(name: Name) -> None:
    report = grpo_step(learner(ends_often(tiny_policy(precision=name)), grpo_config(temperature=0.7)), EXAMPLES)
    assert Tally.of(report).gap["sampler_gap_max"] < {"float32": 1e-5, "bf16": 0.2, "fp16": 0.02}[name]


def test_a_precision_has_a_name() -> None:
    assert Precision(CPU, None).name == "float32"
    assert Precision(CPU, torch.bfloat16).name == "bfloat16"
