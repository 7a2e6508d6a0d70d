"""Names of TRL and transformers: an alias means what our own name means, any other is answered with the flag to use."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.ask import AskConfig
from eval.config import EvalConfig
from eval.export import ExportConfig
from grpo_core.config import GRPOConfig
from grpo_core.pipeline.stages import Settings, understood
from sft_core.cli import parse_config
from sft_core.config import as_yaml
from sft_core.job import SFTConfig
from sft_core.names import REFUSED, SAME, SHARED
from tests.helpers import message_of, yaml_file

CONFIGS: tuple[Any, ...] = (SFTConfig, GRPOConfig, EvalConfig, AskConfig, ExportConfig)
FIELDS = {cls: {field.name for field in dataclasses.fields(cls)} for cls in CONFIGS}
START = ["--model", "m"]  # else the pipeline trains the built-in model, and eval has none
OWN = ("output_dir", "resume", "overwrite", "dry_run")  # of the pipeline itself

# Their name: the value that is typed, what our names say for it, and what the combination needs besides.
EXAMPLES: dict[str, tuple[str, str, str]] = {
    "model_name_or_path": ("some/model", "--model some/model", ""),
    "use_peft": ("True", "--lora", ""),
    "dataset_name": ("some/data", "--task some/data", ""),
    "dataset_config": ("main", "--config_name main", ""),
    "dataset_train_split": ("dev", "--train_split dev", ""),
    "dataset_test_split": ("dev", "--eval_split dev", ""),
    "lora_target_modules": ("q_proj v_proj", "--lora_targets q_proj v_proj", ""),
    "use_cpu": ("True", "--device cpu", ""),
    "full_determinism": ("True", "--deterministic", ""),
    "num_generations": ("4", "--group_size 4", ""),
    "use_vllm": ("True", "--vllm", ""),
    "vllm_gpu_memory_utilization": ("0.5", "--vllm_memory 0.5", ""),
    "vllm_importance_sampling_mode": ("sequence_mask", "--sampler_mode sequence_mask", ""),
    "vllm_importance_sampling_clip_max": ("2.0", "--sampler_cap 2.0", ""),
    "max_completion_length": ("99", "--max_completion_tokens 99", ""),
    "reward_funcs": ("int_reward_func a:b", "--rewards int_reward_func a:b", ""),
    "loss_type": ("grpo", "--loss grpo", ""),
    "importance_sampling_level": ("sequence", "--ratio_level sequence", ""),
    "multi_objective_aggregation": ("normalize_then_sum", "--reward_aggregation normalize_then_sum", ""),
    "epsilon": ("0.1", "--epsilon_low 0.1 --epsilon_high 0.1", ""),
    "num_iterations": ("2", "--mu 2", ""),
    "mask_truncated_completions": ("True", "--mask_truncated", ""),
    "use_bias_correction_kl": ("True", "--kl_correction", "--beta 0.1"),
    "off_policy_mask_threshold": ("0.5", "--off_policy_threshold 0.5", "--mu 2"),
    "ref_model_mixup_alpha": ("0.5", "--ref_sync_mix 0.5", ""),
    "learning_rate": ("1e-4", "--lr 1e-4", ""),
    "lr_scheduler_type": ("cosine", "--lr_schedule cosine", ""),
    "num_train_epochs": ("2", "--epochs 2", ""),
    "max_steps": ("-1", "--max_steps 0", ""),
    "scale_rewards": ("False", "--scale_rewards none", ""),
    "logging_steps": ("5", "--log_every 5", ""),
    "save_steps": ("50", "--save_every 50", ""),
    "eval_steps": ("50", "--eval_every 50", ""),
    "save_total_limit": ("3", "--keep_last 3", ""),
    "resume_from_checkpoint": ("True", "--resume", "--output_dir none"),
    "report_to": ("none", "--track none --no_tensorboard", ""),
    "disable_tqdm": ("True", "--no_progress", ""),
    "hub_private_repo": ("True", "--private", ""),
}
PAIRS = [(cls, name) for name, same in SAME.items() for cls in CONFIGS if set(same.ours.split()) <= FIELDS[cls]]


def parsed(cls: Any, argv: list[str]) -> Any:
    more = ["--output", "new"] if cls is ExportConfig else []
    return parse_config(cls, [*more, *argv])


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_core.config.find_spec", lambda _: object())


def in_file(folder: Path, name: str, value: str) -> str:
    values = [yaml.safe_load(part) for part in value.split()]
    return yaml_file(folder, yaml.safe_dump({name: values if len(values) > 1 else values[0]}))


def test_there_is_an_example_of_every_alias() -> None:
    assert EXAMPLES.keys() == SAME.keys() == {name for _, name in PAIRS}


@pytest.mark.parametrize(("cls", "name"), PAIRS, ids=[f"{cls.__name__}: {name}" for cls, name in PAIRS])
def test_an_alias_gives_the_config_that_our_own_name_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value, ours, needed = EXAMPLES[name]
    more = [*needed.split(), *(START if name != "model_name_or_path" else [])]
    expected = parsed(cls, [*ours.split(), *more])
    if name not in ("max_steps", "model_name_or_path"):  # or nothing is tested
        assert expected != parsed(cls, more)
    assert parsed(cls, [f"--{name}", *value.split(), *more]) == expected
    assert parsed(cls, [f"--{name.replace('_', '-')}", *value.split(), *more]) == expected
    assert parsed(cls, ["--config", in_file(tmp_path, name, value), *more]) == expected
    assert " " in value or parsed(cls, [f"--{name}={value}", *more]) == expected
    assert value != "True" or parsed(cls, [f"--{name}", *more]) == expected
    assert {line.split(":")[0] for line in as_yaml(expected).splitlines() if line[0].isalpha()} == FIELDS[cls]


def configs(argv: list[str]) -> tuple[Any, ...]:
    settings: Settings = understood([*argv, "--output_dir", "out"], {})
    return (settings.mode, settings.configs, settings.start)


@pytest.mark.parametrize(
    "name", [name for name in SAME if name not in ("resume_from_checkpoint", "model_name_or_path")]
)
def test_the_pipeline_takes_an_alias_with_and_without_a_stages_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value, ours, needed = EXAMPLES[name]
    steps = [] if name in ("max_steps", "num_train_epochs") else ["--grpo.max_steps", "3"]
    (tmp_path / "task.jsonl").write_text('{"question": "What is 1?", "answer": "#### 1"}\n')
    task = [] if name == "dataset_name" else ["--task", "task.jsonl"]
    base = ["--mode", "grpo", "--preset", "tiny", *task, *steps, *needed.split()]
    for stage in ("", "grpo."):
        expected = configs([*base, *ours.replace("--", f"--{stage}").split()])
        assert configs([*base, f"--{stage}{name}", *value.split()]) == expected
        assert configs([*base, "--config", in_file(tmp_path, stage + name, value)]) == expected


def test_what_stages_mean_differently_needs_the_stages_name_by_its_alias_too() -> None:
    with pytest.raises(ValueError, match=r"^--lr: sft and grpo each have their own; expected --sft.lr or --grpo.lr"):
        configs(["--learning_rate", "1"])


# --- values


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--epsilon 0.1 --epsilon_high 0.3", "--epsilon_low 0.1 --epsilon_high 0.3"),
        ("--epsilon_high 0.3 --epsilon 0.1", "--epsilon_low 0.1 --epsilon_high 0.3"),
        ("--epsilon-high=0.3 --epsilon=0.1", "--epsilon_low 0.1 --epsilon_high 0.3"),
        ("--report_to wandb", "--track wandb --no_tensorboard"),
        ("--report_to wandb tensorboard", "--track wandb"),
        ("--report_to tensorboard", "--track none"),
        ("--lr_scheduler_type constant_with_warmup", "--lr_schedule constant"),
        ("--scale_rewards True", "--scale_rewards group"),
        ("--disable_tqdm no", "--progress"),
        ("--use_cpu", "--device cpu"),
        ("--learning_rate 1 --lr 2", "--lr 2"),
        ("--lr 2 --learning_rate 1", "--lr 1"),
    ],
)
def test_values_that_are_written_differently_mean_the_same(
    monkeypatch: pytest.MonkeyPatch, typed: str, ours: str
) -> None:
    monkeypatch.setattr("sft_core.config.find_spec", lambda name: sys.__spec__ or __spec__)  # wandb as if it were here
    assert parse_config(GRPOConfig, typed.split()) == parse_config(GRPOConfig, ours.split())


@pytest.mark.parametrize(
    ("lines", "more", "low", "high"),
    [
        ("epsilon: 0.1", [], 0.1, 0.1),
        ("epsilon: 0.1\nepsilon_high: null", [], 0.1, 0.1),
        ("epsilon_high: null\nepsilon: 0.1", [], 0.1, 0.1),
        ("epsilon_high: 0.3\nepsilon: 0.1", [], 0.1, 0.3),
        ("epsilon_high: 0.3", ["--epsilon", "0.1"], 0.1, 0.3),
        ("epsilon: 0.1", ["--epsilon_high", "0.3"], 0.1, 0.3),
        ("epsilon: 0.1", ["--epsilon", "0.05"], 0.05, 0.05),
    ],
)
def test_epsilon_sets_both_bounds_unless_the_upper_one_is_given(
    tmp_path: Path, lines: str, more: list[str], low: float, high: float
) -> None:
    config = parse_config(GRPOConfig, ["--config", yaml_file(tmp_path, lines), *more])
    assert (config.epsilon_low, config.epsilon_high) == (low, high)


def test_null_means_in_a_file_what_it_means_in_theirs(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "save_total_limit: null\nreport_to: null\nresume_from_checkpoint: false\nmin_p: null\n")
    assert parse_config(GRPOConfig, ["--config", file]) == parse_config(GRPOConfig, ["--keep_last", "0"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report_to", "mlflow"], "--report_to mlflow: expected none, tensorboard, wandb, tensorboard wandb"),
        (["--lr_scheduler_type", "polynomial"], "--lr_scheduler_type polynomial: expected linear, cosine, constant"),
        (["--disable_tqdm", "maybe"], "--disable_tqdm maybe: expected true, false"),
        (["--learning_rat", "1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
        (["--gradient_acumulation_steps", "1"], "did you mean --gradient_accumulation_steps?"),
    ],
)
def test_a_value_or_name_that_there_is_not_is_answered_with_those_that_there_are(argv: list[str], message: str) -> None:
    assert message in message_of(argv)


def test_a_file_that_sets_one_thing_under_two_names_is_refused(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "lr: 1.0\nlearning_rate: 2.0\n")
    assert message_of(["--config", file]) == f"--config {file}: learning_rate: is lr here, which the file sets already"
    file = yaml_file(tmp_path, "learning_rat: 2.0\n")
    assert message_of(["--config", file]).endswith("unknown key learning_rat; did you mean learning_rate?")


# --- refused names


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_means_something_else_is_answered_with_the_flag_to_use(tmp_path: Path, name: str) -> None:
    flags = set(re.findall(r"--(\w+)", REFUSED[name]))
    assert flags and flags <= set().union(*FIELDS.values())
    told = f"--{name}: {REFUSED[name].replace('`', '')}"
    for cls in CONFIGS:
        assert name not in FIELDS[cls]
        if flags & FIELDS[cls]:
            assert message_of([f"--{name}", "1"], cls) == told
            assert message_of([f"--{name.replace('_', '-')}=1"], cls) == told.replace(name, name.replace("_", "-"), 1)
            file = yaml_file(tmp_path, f"{name}: 1\n")
            assert message_of(["--config", file], cls) == f"--config {file}: {told}"
        else:
            assert "no such flag" in message_of([f"--{name}", "1"], cls)
    stage = "grpo." if flags & FIELDS[GRPOConfig] else "sft."
    for prefix in ("", stage):
        with pytest.raises(ValueError, match=re.escape(told.replace(name, prefix + name, 1))):
            understood([f"--{prefix}{name}", "1"], {})


def test_every_name_is_trls_or_transformers_own() -> None:
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments
    from trl.scripts.grpo import GRPOScriptArguments

    theirs = {
        field.name
        for cls in (TrainingArguments, trl.GRPOConfig, trl.SFTConfig, trl.ModelConfig, GRPOScriptArguments)
        for field in dataclasses.fields(cls)
    }
    older = {"max_prompt_length", "warmup_ratio", "overwrite_output_dir", "logging_dir", "torch_dtype"}
    assert {*SAME, *REFUSED, *SHARED} - theirs == older
    assert theirs & set().union(*FIELDS.values()) <= {*SAME, *SHARED}  # one name in both is told about
    assert not (set(SAME) & set(REFUSED) | set(SAME) & set(SHARED) | set(REFUSED) & set(SHARED))
