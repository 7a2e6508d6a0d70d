"""Configuration: preset < --config < flags, one line for every mistake, and a resolved config that repeats a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import eval.__main__
import grpo_core.train
import sft_core.train
from eval.config import EvalConfig
from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.config import as_yaml
from sft_core.job import SFTConfig
from tests.helpers import yaml_file

ROOT = Path(__file__).parent.parent
CONFIGS: dict[str, Any] = {"sft_core": SFTConfig, "eval": EvalConfig, "grpo_core": GRPOConfig}
PRESETS = {package: ROOT / package / "presets" for package in CONFIGS}
EVERY_PRESET = [(package, file.stem) for package in CONFIGS for file in sorted(PRESETS[package].glob("*.yaml"))]


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """A folder of two presets."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "small.yaml").write_text("lr: 0.5\ngroup_size: 3\ntemperature: 0.5\n")
    (folder / "large.yaml").write_text("group_size: 32\n")
    return folder


# --- layers


def test_flags_override_the_config_file_and_the_config_file_overrides_the_preset(tmp_path: Path, presets: Path) -> None:
    file = yaml_file(tmp_path, "group_size: 4\nlr: 0.25\n")
    config = parse_config(GRPOConfig, ["--lr", "0.125", "--preset", "small", "--config", file], presets)
    assert (config.lr, config.group_size, config.temperature) == (0.125, 4, 0.5)
    assert config.beta == GRPOConfig().beta  # named nowhere: the dataclass's default


@pytest.mark.parametrize("argv", [["--model", "m"], ["--model=m"], ["--config", "FILE"], ["--config=FILE"]])
def test_the_default_preset_gives_way_to_a_model_or_a_config_file(
    tmp_path: Path, presets: Path, argv: list[str]
) -> None:
    file = yaml_file(tmp_path, "beta: 0.5\n")
    assert parse_config(GRPOConfig, ["--beta", "0.5"], presets, "small").group_size == 3
    argv = [arg.replace("FILE", file) for arg in argv]
    assert parse_config(GRPOConfig, argv, presets, "small").group_size == GRPOConfig().group_size
    assert parse_config(GRPOConfig, [*argv, "--preset", "large"], presets, "small").group_size == 32


@pytest.mark.parametrize(("package", "name"), EVERY_PRESET, ids=["/".join(preset) for preset in EVERY_PRESET])
def test_every_preset_is_a_valid_configuration(package: str, name: str) -> None:
    config = parse_config(CONFIGS[package], ["--preset", name], PRESETS[package])
    assert config != CONFIGS[package]()  # it sets something


def test_there_is_a_tiny_preset_for_learning_and_it_is_the_default() -> None:
    assert {("sft_core", "tiny"), ("grpo_core", "tiny")} <= set(EVERY_PRESET)
    for package in ("sft_core", "grpo_core"):
        by_default = parse_config(CONFIGS[package], [], PRESETS[package], "tiny")
        assert by_default == parse_config(CONFIGS[package], ["--preset", "tiny"], PRESETS[package])
        assert (by_default.model, by_default.task) == ("tiny", "arithmetic")


def test_presets_are_found_beside_the_code_that_reads_them() -> None:
    for module, package in ((sft_core.train, "sft_core"), (eval.__main__, "eval"), (grpo_core.train, "grpo_core")):
        assert PRESETS[package] == module.PRESETS


# --- values


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 1e-4", "lr", 1e-4),  # YAML 1.1 reads 1e-4 as a string, 1.0e-4 as a number
        ("lr: 1.0e-4", "lr", 1e-4),
        ("lr: 1", "lr", 1.0),
        ("group_size: '4'", "group_size", 4),
        ("progress: no", "progress", False),
        ("progress: false", "progress", False),
        ("tensorboard: true", "tensorboard", True),
        ("lora_dropout: null", "lora_dropout", 0.0),
        ("system_prompt: null", "system_prompt", None),
        ("system_prompt: ''", "system_prompt", ""),
        ("system_prompt: '--no_progress'", "system_prompt", "--no_progress"),
        ("system_prompt: |\n  two\n  lines\n", "system_prompt", "two\nlines\n"),
        ("rewards: [int_reward_func, a:b]", "rewards", ["int_reward_func", "a:b"]),
        ("rewards: int_reward_func", "rewards", ["int_reward_func"]),
        ("reward_weights: [1, -0.5, -1e-5]", "reward_weights", [1.0, -0.5, -1e-5]),
        ("reward_weights: []", "reward_weights", []),
        ("# nothing but a comment", "group_size", GRPOConfig().group_size),
    ],
)
def test_a_line_of_a_config_file_is_read_as_the_flag_of_that_name(
    tmp_path: Path, line: str, name: str, value: Any
) -> None:
    config = parse_config(GRPOConfig, ["--config", yaml_file(tmp_path, line)])
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_null_in_a_config_file_takes_back_what_the_preset_set(tmp_path: Path, presets: Path) -> None:
    config = parse_config(GRPOConfig, ["--preset", "small", "--config", yaml_file(tmp_path, "lr: null")], presets)
    assert (config.lr, config.group_size) == (GRPOConfig().lr, 3)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--no_progress"], "progress", False),
        (["--progress"], "progress", True),
        (["--progress", "false"], "progress", False),
        (["--lora"], "lora", True),
        (["--rewards", "int_reward_func", "a:b"], "rewards", ["int_reward_func", "a:b"]),
        (["--reward_weights", "-1e-5", "2"], "reward_weights", [-1e-5, 2.0]),
        (["--system_prompt", ""], "system_prompt", ""),
        (["--output_dir="], "output_dir", ""),
        (["--seed", "4294967295"], "seed", 2**32 - 1),
    ],
)
def test_flags_are_read_by_their_fields_types(argv: list[str], name: str, value: Any) -> None:
    config = parse_config(GRPOConfig, argv)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(SFTConfig, []).lr = 1.0  # type: ignore[misc]


# --- the resolved config


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--system_prompt", ""],
        ["--system_prompt", "two\nlines: 'and' more # than\t\"that\" ✓\n\n", "--no_progress", "--lr", "1e-7"],
        ["--system_prompt", "null", "--seed", "0", "--epochs", "0.1"],
        ["--rewards", "a:b", "int_reward_func", "--reward_weights", "-1e-05", "0.3333333333333333"],
        ["--from_scratch", "--config_overrides", "hidden_size=64", "layer_types=null"],
    ],
)
def test_the_resolved_config_passes_back_through_config_unchanged(tmp_path: Path, argv: list[str]) -> None:
    config = parse_config(GRPOConfig, argv)
    assert parse_config(GRPOConfig, ["--config", yaml_file(tmp_path, as_yaml(config))]) == config


@pytest.mark.parametrize(("package", "name"), EVERY_PRESET, ids=["/".join(preset) for preset in EVERY_PRESET])
def test_every_presets_resolved_config_repeats_it(tmp_path: Path, package: str, name: str) -> None:
    cls = CONFIGS[package]
    config = parse_config(cls, ["--preset", name], PRESETS[package])
    assert parse_config(cls, ["--config", yaml_file(tmp_path, as_yaml(config))], PRESETS[package], "tiny") == config


# --- the default preset


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        ([], "tiny"),
        (["--lr", "1"], "tiny"),
        (["--model", "tiny"], "tiny"),
        (["--model=tiny", "--task=arithmetic"], "tiny"),
        (["--task", "gsm8k"], GRPOConfig().model),
        (["--task=gsm8k"], GRPOConfig().model),
        (["--model", "some/model"], "some/model"),
        (["--preset", "t4"], "Qwen/Qwen2.5-0.5B-Instruct"),
    ],
)
def test_the_built_in_job_is_the_default_until_a_model_or_task_is_named(argv: list[str], model: str) -> None:
    assert parse_config(GRPOConfig, argv, PRESETS["grpo_core"], "tiny").model == model


# --- help


@pytest.mark.parametrize("package", CONFIGS)
def test_help_lists_every_flag_with_its_explanation(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(CONFIGS[package], ["--help", "all"], PRESETS[package])
    assert caught.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # without any white space: lines are broken at hyphens too
    for field in dataclasses.fields(CONFIGS[package]):
        assert f"--{field.name}" in text
        assert "".join(field.metadata["help"].split()) in text
    assert "--preset" in text and "--config" in text
    assert "(default:)" not in text and "(default:None)" not in text and "(default:False)" not in text
    assert "--prompt-format" not in text and "--rows_leave,--no_rows_leave" in text and "--shots" in text
