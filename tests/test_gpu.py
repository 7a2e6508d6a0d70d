"""What only a CUDA GPU can show; skipped elsewhere. `benchmarks/on_gpu.sh` runs these and makes the records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.workload import Steps, workload
from grpo_core.config import GRPOConfig
from grpo_core.metrics import Tally
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import load_policy
from sft_core.model.tiny import build_tiny
from tests.helpers import SHARED
from tests.kernels import CALLS, asked_for, kernel, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GIB = 2**30
QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"


def small(folder: Path, *flags: str) -> GRPOConfig:
    model = str(build_tiny(folder / "model", seed=0))
    return workload("tiny", ["--model", model, "--device=cuda", "--eval_problems=0", "--max_steps=5", *flags])


def weights(steps: Steps) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in steps.learner.policy.trainable()]


@pytest.fixture
def fifteen_gib() -> Iterator[None]:
    """What a T4 has to give."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 15 * GIB / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_forced_overflow_in_fp16_repeats_the_batch_and_then_learns(tmp_path: Path) -> None:
    # The bonus: an untrained model earns no reward, so that all advantages are 0.
    steps = Steps.of(small(tmp_path, "--precision=fp16", "--entropy_coef=0.1"))
    optimizer = steps.learner.optimizer
    optimizer.scaler = torch.amp.GradScaler(steps.learner.policy.device.type, init_scale=2.0**40)  # overflows
    before, report = weights(steps), steps()
    assert (
        Tally.of(report).updates > 1 and optimizer.scaler.get_scale() < 2.0**40
    )  # repeated, at half the factor each time
    assert optimizer.skipped == 0 and torch.isfinite(torch.tensor(report.grad_norm))
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(steps), strict=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
def test_the_sampler_and_the_learner_are_one_distribution(tmp_path: Path, precision: str) -> None:
    steps = Steps.of(small(tmp_path, f"--precision={precision}", "--beta=0.1"))
    means = Tally.of(steps()).means()
    assert means["ratio_min"] == means["ratio_max"] == 1 and means["kl"] == 0
    assert means["sampler_gap_max"] < (1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("way", ["compiled", "paged"])
@pytest.mark.parametrize("precision", ["fp16", "float32"])
def test_another_way_to_decode_is_taken_and_draws_from_the_learners_distribution(
    tmp_path: Path, way: str, precision: str
) -> None:
    steps = Steps.of(small(tmp_path, f"--precision={precision}", f"--decoding={way}"))
    assert steps.learner.policy.decoding == way
    for _ in range(3):
        assert Tally.of(steps()).means()["sampler_gap_max"] < (1e-4 if precision == "float32" else 0.1)


def test_offloaded_moments_take_the_same_steps(tmp_path: Path) -> None:
    ended = []
    for where in ("", "cpu"):
        steps = Steps.of(small(tmp_path / (where or "here"), f"--offload_optimizer={where}", "--precision=float32"))
        rows = pack_rows([[5, 6, 7]] * 4, [[8, 9, 2]] * 4, pad_id=0).to(steps.learner.policy.device)
        for _ in range(3):
            _learn(steps, rows)
        ended.append(weights(steps))
    for here, away in zip(*ended, strict=True):
        torch.testing.assert_close(here, away, rtol=0, atol=1e-6)


def _learn(steps: Steps, rows: Rows) -> None:
    """A step towards these rows."""
    from sft_core.train import sft_step

    sft_step(steps.learner.policy, steps.learner.optimizer, rows)


def test_out_of_memory_halves_the_micro_batch_and_the_run_continues(tmp_path: Path) -> None:
    steps = Steps.of(small(tmp_path, "--precision=float32", "--logit_chunk=0"))
    policy = steps.learner.policy
    prompts = [[5 + row % 50] * 100 for row in range(256)]  # no prompt is shared: 256 rows of 200 tokens
    rows = pack_rows(prompts, [[8] * 99 + [policy.eos_ids[0]]] * 256, pad_id=0).to(policy.device)
    steps.learner.optimizer.micro_batch = 256
    free = torch.cuda.memory_allocated() + GIB
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    try:
        _learn(steps, rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert steps.learner.optimizer.micro_batch < 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [33, 36, 64, 80, 128, 256])
def test_attention_gets_the_kernels_of_the_table(dtype: torch.dtype, size: int) -> None:
    capability = torch.cuda.get_device_capability()
    names = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN's"}
    for call in CALLS:
        masked, grouped = asked_for(call, capability, dtype)
        tokens = 1 if call.startswith("the next token") else 24
        given = tensors(size, dtype, masked, grouped, tokens)
        causal = not masked and tokens > 1
        found = names[torch._fused_sdp_choice(*given, is_causal=causal, enable_gqa=grouped)]
        expected = kernel(capability, dtype, size, masked, grouped)
        assert found == expected or (found == "cuDNN's" and capability[0] in (9, 10) and expected != "math"), call


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the config and tokenizer of Qwen2.5-0.5B-Instruct")
def test_the_t4_preset_at_its_true_shape_fits_into_fifteen_gib(fifteen_gib: None) -> None:
    flags = ["--model", str(QWEN), "--from_scratch", "--task=arithmetic", "--difficulty=8", "--max_steps=3"]
    config = workload("t4", [*flags, "--eval_problems=0", "--device=cuda"])
    assert config.precision == "fp16" and not config.lora
    steps = Steps.of(config)
    reset_peak(steps.learner.policy.device)
    for _ in range(3):
        report = steps()
    assert torch.isfinite(torch.tensor(report.grad_norm))
    assert steps.learner.optimizer.micro_batch == config.micro_batch  # memory never ran out
    assert peak_bytes(steps.learner.policy.device) < 15 * GIB


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the config and tokenizer of Qwen2.5-0.5B-Instruct")
def test_four_bit_weights_below_an_adapter_learn(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = small(tmp_path, "--precision=fp16")
    config = replace(config, lora=True, use_4bit=True)
    config.check()
    policy = load_policy(config)
    assert all("lora" in name for name, _ in policy.trainable())
    packed = [p for p in policy.model.parameters() if p.dtype == torch.uint8]
    assert packed
