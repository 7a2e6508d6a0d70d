"""--recipe: a paper's settings, above the preset's and below one's own; told by --dry_run with what differs."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import grpo_core.train
from grpo_core.config import GRPOConfig
from grpo_core.recipes import RECIPES, objective_line, settings_of
from grpo_core.train import PRESETS
from sft_core.cli import parse_config
from sft_core.config import as_yaml


def parsed(*argv: str) -> GRPOConfig:
    return parse_config(GRPOConfig, ["--model", "m", "--preset", "t4", *argv], PRESETS)


def test_the_flag_takes_every_recipe() -> None:
    (names, _) = get_args(get_type_hints(GRPOConfig)["recipe"])
    assert list(get_args(names)) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_config_whose_settings_are_in_force(name: str) -> None:
    config = parsed("--recipe", name)
    for flag, value in settings_of(name).items():
        assert flag in {field.name for field in fields(GRPOConfig)} and getattr(config, flag) == value
    assert config.task == "gsm8k" and config.prompts_per_step == 4  # the preset's own
    assert all(source for _, source in RECIPES[name].settings.values())


def test_own_flags_stand_above_a_recipe_and_a_recipe_above_the_preset(tmp_path: Path) -> None:
    assert parsed().epsilon_high == 0.2 and parsed("--recipe", "dapo").epsilon_high == 0.28
    assert parsed("--recipe", "dapo", "--epsilon_high", "0.3").epsilon_high == 0.3
    assert parsed("--recipe", "r1_zero").lr == 3e-6 != parsed().lr
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"recipe": "dapo", "epsilon_high": 0.25}))
    config = parsed("--config", str(file))
    assert (config.epsilon_high, config.dynamic_sampling, config.recipe) == (0.25, 8, "dapo")
    again = tmp_path / "config.yaml"
    again.write_text(as_yaml(config))
    assert parse_config(GRPOConfig, ["--config", str(again)]) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipe", "dr_grpo"], "advantages divided by no standard deviation; no KL; at --mu 1 the ratio is 1"),
        (["--loss", "dr_grpo"], "dr_grpo: .*divided by the group's standard deviation"),
        (["--recipe", "gspo", "--mu", "2"], r"each completion's ratio \(geometric mean\) clipped to 0.9997..1.0004"),
        (
            ["--recipe", "dapo", "--epsilon_high", "0.3"],
            r"recipe dapo of .*, but --epsilon_high 0.3 \(the paper: 0.28\)",
        ),
        (["--recipe", "sapo", "--mu", "2"], "through the gate of sapo; mean over each completion"),
        (["--recipe", "grpo"], "KL 0.04"),
    ],
)
def test_the_objective_is_told_in_words_with_what_differs(argv: list[str], words: str) -> None:
    line = objective_line(parsed(*argv))
    assert re.search(words, line) and "\n" not in line
    assert ("no effect" in line) == ("--mu" not in argv)


def test_a_dry_run_tells_the_objective_and_the_first_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv: list[Any] = ["--preset", "tiny", "--recipe", "dr_grpo", "--lr", "1e-5", "--dry_run"]
    grpo_core.train.main([*argv, "--output_dir", str(tmp_path / "run")])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "no standard deviation" in told["objective"] and "(the paper: 1e-06)" in told["objective"]
    assert "How many" in told["first"] and "is expected" in told["first"]
