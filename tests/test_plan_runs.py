"""The memory forecast beside real models, real runs and the programs that print it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import benchmarks.plan.__main__
import grpo_core.memory.forecast
from benchmarks.machine import GPUS, Ceilings, machine, measured
from benchmarks.plan.check import run
from benchmarks.plan.question import answer, question_of
from benchmarks.roofline import Phase, phases
from benchmarks.workload import workload
from grpo_core.memory.forecast import GB, Batch, forecast, kept_bytes
from sft_core.model.shapes import shapes_of
from sft_core.model.tiny import build_tiny
from tests.helpers import PEFT_IS_BEHIND, SHARED, tiny_model
from tests.test_plan import LENGTHS, REAL_QWEN, ROUND, small, source_of

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# What autograd keeps of an attention, and what the allocator holds, are torch's own business and were measured there.
MEASURED_WITH = (2, 13)
as_measured = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < MEASURED_WITH,
    reason=f"the forecast was measured with torch {'.'.join(map(str, MEASURED_WITH))}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


# -------------------------------------------------------------------------------------------- shapes and real tensors


@pytest.mark.parametrize("lora", [False, True])
def test_shapes_are_those_of_the_loaded_model(folder: Path, lora: bool) -> None:
    config, source = source_of(folder)
    config = replace(config, lora=lora, lora_r=3)
    model: Any = AutoModelForCausalLM.from_config(source.model_config)
    base = sum(p.numel() for p in model.parameters())
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    shapes = shapes_of(config, source)
    assert shapes.base == base
    assert sorted(shapes.trained) == sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert shapes == shapes_of(config, None), "the built-in model's"


def test_named_lora_targets_are_the_ones_that_count(folder: Path) -> None:
    config, source = source_of(folder)
    config = replace(config, lora=True, lora_r=2, lora_targets=["q_proj", "down_proj"])
    assert shapes_of(config, source).adapter == 3 * 2 * (128 + 128 + 384 + 128)


@as_measured
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_activations_are_what_autograd_saves(family: Any, packed: bool, half: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    shapes = shapes_of(*source_of(tmp_path))
    R, L = 2, 60
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used twice
        return tensor

    mask = torch.ones(R, 1, L, L, dtype=torch.bool).tril() if packed else torch.ones(R, L, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model.base_model(input_ids=torch.ones(R, L, dtype=torch.long), attention_mask=mask, use_cache=False)
    predicted = kept_bytes(small(), shapes, half, Batch(R * L, L, 0, packed))
    assert predicted == pytest.approx(sum(size for size, _ in saved.values()), rel=0.15)


@pytest.mark.slow
@as_measured
@pytest.mark.parametrize(
    "flags",
    [
        ["--beta", "0.1", "--keep_freed_memory", "False"],
        ["--beta", "0", "--micro_batch", "2", "--gradient_checkpointing", "False"],
    ],
    ids=["a reference, freed memory given back", "micro-batches, freed memory kept"],
)
def test_the_peak_of_a_real_run_is_the_forecasts(folder: Path, flags: list[str]) -> None:
    shape = ["hidden_size=512", "intermediate_size=2048", "vocab_size=40000"]
    common = ["--prompt_format", "hash", "--system_prompt=", "--max_completion_tokens", "8", "--device", "cpu"]
    common += ["--precision", "float32"]
    config = workload("qwen-0.5b", ["--model", str(folder), "--config_overrides", *shape, *common, *flags])
    found = run(config, steps=2)
    forecast = question_of(config, "this", int(found["prompt"]), int(found["completion"])).plan
    # So small a process differs by 0.2 GB from run to run; large ones are held to 10% by `benchmarks.plan --check`.
    assert forecast.peak == pytest.approx(found["peak_bytes"], rel=0.2)


# ------------------------------------------------------------------------------------------------------- the programs


def test_the_t4_preset_fits_a_t4() -> None:
    if not REAL_QWEN.is_dir():
        pytest.skip(f"needs {REAL_QWEN}; GRPO_SHARED names the folder that holds models/")
    data = str(SHARED / "data" / "gsm8k" / "train.jsonl")
    config = workload("t4", ["--model", str(REAL_QWEN), "--from_scratch", "--task", data])
    question = question_of(config, "t4", 0, 0)
    assert question.dtype == torch.float16
    assert 8 * GB < question.plan.peak < 15 * 2**30
    assert "fits" in answer(question)
    assert "NOT fit" in answer(replace(question, where=replace(GPUS["t4"], memory=8 * GB)))


def test_an_unknown_gpu_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmarks.plan.__main__.main(["tiny", "--gpu", "t5"])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err == f"error: --gpu t5: expected one of {', '.join(GPUS)}, or this (measured here)\n"


def test_the_program_answers_for_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks.plan.__main__.main(["tiny", "--gpu", "L4", "--prompt_tokens", "30"])
    out = capsys.readouterr().out
    assert "L4, float32, prompts of 30 tokens, completions of 48" in out
    for word in ("it fits", "weights", "AdamW", "prefill", "decode", "learner", "optimizer", "a step"):
        assert word in out


def test_a_forecast_reads_no_weights_and_never_stops_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = source_of(folder)
    config = small(model=str(folder), device="cpu")
    only_its_config = replace(source, base="no such folder")
    assert forecast(config, only_its_config).startswith("memory: about 0.")
    monkeypatch.setattr(grpo_core.memory.forecast, "shapes_of", lambda *_: {}["a recurrent model"])
    assert forecast(config, only_its_config) == "memory: no forecast for this model (KeyError: 'a recurrent model')"


# ------------------------------------------------------------------------------------------------------------- machine


def test_a_phase_takes_as_long_as_what_it_waits_for() -> None:
    ceilings = Ceilings(flops=100, bytes=10)
    assert Phase(200, 10).seconds(ceilings) == 2
    assert Phase(200, 50).seconds(ceilings) == 5
    assert (Phase(200, 10).bound(ceilings), Phase(200, 50).bound(ceilings)) == ("arithmetic", "memory")
    assert Phase(1, 2) + Phase(3, 4) * 2 == Phase(7, 10)


def test_phases_by_hand() -> None:
    found = phases(small(mu=3), ROUND, False, LENGTHS)
    assert set(found) == {"prefill", "decode", "learner", "optimizer"}
    assert found["prefill"] == Phase(2 * 6 * (2 * 2 * 700 + 2 * 4 * 10 * 6), 4 * 1400)
    assert found["decode"].flops == 4 * 8 * (2 * 2 * 700 + 2 * 4 * 10 * 8 + 2 * 10_000)
    assert found["decode"].bytes == 4 * (4 * 11_400 + 6 * 4 * 8 * 1000 + 2 * 4 * 5 * 2 * 8 * 8)
    layers, head = 44 * (2 * 2 * 700 + 2 * 4 * 10 * 22), 32 * 2 * 10_000
    assert found["learner"].flops == 3 * (3 * layers + 4 * head)
    assert phases(small(gradient_checkpointing=True), ROUND, False, LENGTHS)["learner"].flops == 4 * layers + 4 * head
    assert phases(small(beta=0.1), ROUND, False, LENGTHS)["reference"].flops == layers + head


def test_half_precision_moves_fewer_bytes_and_a_t4_has_no_bf16() -> None:
    single, half = (phases(small(), ROUND, half, LENGTHS)["decode"].bytes for half in (False, True))
    assert half < single
    t4 = machine("t4")
    assert t4.best == torch.float16
    assert t4.ceilings(torch.bfloat16).flops == t4.ceilings(torch.float32).flops < t4.ceilings(torch.float16).flops


def test_this_machine_is_measured_once_for_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.cache_clear()
    monkeypatch.setattr("benchmarks.machine._best_seconds", lambda work, device: 2.0)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(1, 1))
    ceilings = measured(torch.device("cpu"), torch.float32)
    assert ceilings == Ceilings(flops=2048**3, bytes=2**26 * 4)
    measured.cache_clear()
