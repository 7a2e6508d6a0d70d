"""The presets: the values of the systems that they are named after, and a run of each with each of its programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eval.__main__
import grpo_core.train
import sft_core.train
from sft_core.cli import parse_config
from tests.helpers import PEFT_IS_BEHIND, tiny_model, tokenizer
from tests.test_config import CONFIGS, EVERY_PRESET, PRESETS

MAINS: dict[str, Any] = {
    "sft_core": sft_core.train.main,
    "eval": eval.__main__.main,
    "grpo_core": grpo_core.train.main,
}
FIVE = ["xmlcount", "soft_format", "strict_format", "int", "correctness"]
SMALL, INSTRUCT = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"

# What the systems' own descriptions say, and nothing that was chosen here.
SAID: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"grpo_core": {"task": "arithmetic", "model": "tiny"}, "sft_core": {"task": "arithmetic", "model": "tiny"}},
    "learns": {
        "grpo_core": {"task": "arithmetic", "model": "tiny", "sft_preset": "learns"},
        "sft_core": {"task": "arithmetic", "model": "tiny", "slips": 0.6},
        "eval": {"task": "arithmetic"},
    },
    "t4": {
        "sft_core": {"model": INSTRUCT, "precision": "fp16", "gradient_checkpointing": True},
        "grpo_core": {"model": INSTRUCT, "precision": "fp16", "gradient_checkpointing": True},
        "eval": {"model": INSTRUCT, "precision": "fp16"},
    },
    "atnlp": {
        "sft_core": {"model": INSTRUCT, "max_samples": 3000, "lora": True},
        "grpo_core": {"model": INSTRUCT, "max_samples": 500, "eval_problems": 100},
        "eval": {"model": INSTRUCT, "eval_problems": 100},
    },
    "oneshot-grpo": {
        "grpo_core": {
            "model": INSTRUCT,
            "rewards": [f"{name}_reward_func" for name in FIVE],
            "group_size": 16,
            "lr": 5e-6,
            "adam_beta1": 0.9,
            "adam_beta2": 0.99,
            "weight_decay": 0.1,
            "warmup_ratio": 0.1,
            "lr_schedule": "cosine",
            "prompts_per_step": 4,  # a prompt at a time, accumulated over 4
            "max_prompt_tokens": 256,
            "max_completion_tokens": 200,
            "max_grad_norm": 0.1,
            "save_every": "100",
            "epochs": 1.0,
        },
        "eval": {"model": INSTRUCT, "max_prompt_tokens": 256, "max_completion_tokens": 200, "prompt_format": "xml"},
    },
    "g5-grpo": {
        "sft_core": {
            "model": "Qwen/Qwen3-0.6B",
            "lr": 2e-4,
            "epochs": 3.0,
            "batch_size": 4,
            "lora": True,
            "lora_r": 16,
        },
        "grpo_core": {
            "model": "Qwen/Qwen3-0.6B",
            "temperature": 0.7,
            "beta": 0.01,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "group_size": 4,
            "prompts_per_step": 4,  # 4 completions at a time, accumulated over 4
            "lr": 1e-6,
            "rewards": ["numeric_reward_func"],
            "prompt_format": "hash",
        },
        "eval": {"model": "Qwen/Qwen3-0.6B", "prompt_format": "hash"},
    },
    "train-grpo-script": {
        "grpo_core": {
            "model": "Qwen/Qwen2.5-1.5B-Instruct",
            "shots": 1,
            "rewards": [f"{name}_reward_func" for name in FIVE],
            "lora": False,
            "lora_r": 16,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
        },
        "eval": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "shots": 1},
    },
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that holds every preset's prompts in a tokenizer of few words, and a task."""
    folder = tmp_path_factory.mktemp("presets")
    tiny_model(max_position_embeddings=2048).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(8)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder / "task.jsonl"


@pytest.mark.parametrize("name", SAID)
def test_a_preset_has_the_values_of_the_system_that_it_is_named_after(name: str) -> None:
    for package, said in SAID[name].items():
        config = parse_config(CONFIGS[package], ["--preset", name], PRESETS[package])
        assert {field: getattr(config, field) for field in said} == said


def test_every_preset_of_the_design_is_there_for_each_program_that_it_makes_sense_for() -> None:
    assert {(package, name) for name, packages in SAID.items() for package in packages} <= set(EVERY_PRESET)
    assert {name for _, name in EVERY_PRESET} == set(SAID)
    assert {name for package, name in EVERY_PRESET if package == "eval"} == set(SAID)


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
@pytest.mark.parametrize(("package", "name"), EVERY_PRESET, ids=["/".join(preset) for preset in EVERY_PRESET])
def test_every_preset_runs(
    package: str, name: str, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another model and task, and sizes that a test has time for."""
    model, task = places
    sizes = {"eval": ["--batch_size", "2"], "sft_core": ["--batch_size", "2", "--max_steps", "2"]}
    sizes["grpo_core"] = ["--prompts_per_step", "1", "--group_size", "2", "--max_steps", "2"]
    budget = ["--max_prompt_tokens", "1200", "--max_completion_tokens", "5"]
    more = ["--eval_problems", "2", "--no_progress", "--tensorboard=False", "--output_dir", str(tmp_path / "run")]
    if (package, name) == ("sft_core", "learns"):
        more += ["--slips", "0"]  # which only the arithmetic task has
    MAINS[package](["--preset", name, "--model", str(model), "--task", str(task), *sizes[package], *budget, *more])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (
        kinds.count("train") == {"eval": 0, "sft_core": 1 if name in ("tiny", "learns") else 2, "grpo_core": 2}[package]
    )
    assert (tmp_path / "run" / "final").is_dir() == (package != "eval")
