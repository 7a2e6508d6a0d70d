"""Every option of the GRPO step is a flag and a line of a config file, and its bad values are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.config import as_yaml
from tests.helpers import message_of, yaml_file


def choices_of(flag: str) -> list[str]:
    hint = get_type_hints(GRPOConfig)[flag]
    literals = [part for part in get_args(hint) if get_args(part)] or [hint]  # without the None of an optional one
    return list(get_args(literals[0]))


@pytest.mark.parametrize("flag", ["loss", "ratio_level", "token_loss", "aggregation", "reward_aggregation"])
def test_every_choice_of_the_objective_is_reached_from_the_command_line(flag: str) -> None:
    assert len(choices_of(flag)) > 1
    for choice in choices_of(flag):
        assert getattr(parse_config(GRPOConfig, [f"--{flag}", choice]), flag) == choice
    default = getattr(GRPOConfig(), flag)
    assert getattr(parse_config(GRPOConfig, []), flag) == default


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("delta", 4.0, ["--mu", "2"]),
        ("sapo_temperature_pos", 0.5, ["--loss", "sapo"]),
        ("sapo_temperature_neg", 2.0, ["--loss", "sapo"]),
        ("vespo_k_pos", 0.0, ["--loss", "vespo"]),
        ("vespo_lambda_pos", 0.5, ["--loss", "vespo"]),
        ("vespo_k_neg", 0.5, ["--loss", "vespo"]),
        ("vespo_lambda_neg", 0.0, ["--loss", "vespo"]),
        ("kl_correction", True, ["--beta", "0.1"]),
        ("ref_sync_every", 64, ["--beta", "0.1"]),
        ("ref_sync_mix", 1.0, []),
        ("mask_truncated", True, []),
        ("top_entropy", 0.2, []),
        ("entropy_coef", 0.01, []),
        ("off_policy_threshold", 0.5, ["--mu", "2"]),
        ("overlong_buffer", 256, []),
        ("dynamic_sampling", 3, []),
        ("shuffle_rewards", True, []),
    ],
)
def test_every_option_of_the_objective_is_a_flag_and_a_line_of_a_config_file(
    tmp_path: Path, name: str, value: Any, more: list[str]
) -> None:
    assert getattr(GRPOConfig(), name) != value  # off, or another number
    typed = parse_config(GRPOConfig, [f"--{name}", str(value), *more])
    read = parse_config(GRPOConfig, ["--config", yaml_file(tmp_path, f"{name}: {value}\n"), *more])
    assert getattr(typed, name) == getattr(read, name) == value
    assert parse_config(GRPOConfig, ["--config", yaml_file(tmp_path, as_yaml(typed))]) == typed


@pytest.mark.parametrize(
    ("argv", "accepted"),
    [
        (["--epsilon_high", "-0.1"], "0 or more"),
        (["--delta", "1.2"], "more than 1 + epsilon_high (1.2), or 0 for none"),
        (["--delta", "-1.0"], "more than 1 + epsilon_high (1.2), or 0 for none"),
        (["--sapo_temperature_pos", "0.0"], "more than 0"),
        (["--sapo_temperature_neg", "-1.0"], "more than 0"),
        (["--vespo_k_pos", "-0.1"], "0 or more"),
        (["--vespo_lambda_pos", "-0.1"], "0 or more"),
        (["--vespo_k_neg", "-0.1"], "0 or more"),
        (["--vespo_lambda_neg", "nan"], "0 or more"),
        (["--top_entropy", "0.0"], "above 0, up to 1"),
        (["--top_entropy", "1.1"], "above 0, up to 1"),
        (["--entropy_coef", "-0.1"], "0 or more"),
        (["--off_policy_threshold", "-0.1"], "0 or more"),
        (["--ref_sync_every", "-1"], "0 or more"),
        (["--ref_sync_every", "5"], "0 if --beta is 0"),
        (["--ref_sync_mix", "0.0"], "above 0, up to 1"),
        (["--ref_sync_mix", "1.1"], "above 0, up to 1"),
        (["--overlong_buffer", "-1"], "0 to --max_completion_tokens (256)"),
        (["--overlong_buffer", "257"], "0 to --max_completion_tokens (256)"),
        (["--dynamic_sampling", "-1"], "0 or more"),
    ],
)
def test_an_options_value_out_of_range_is_named_with_its_flag_and_what_is_accepted(
    argv: list[str], accepted: str
) -> None:
    flag, value = argv
    message = message_of(argv)
    assert message.startswith(f"{flag} {value}")
    assert f": expected {accepted}" in message


@pytest.mark.parametrize("flag", ["loss", "ratio_level", "token_loss", "aggregation", "reward_aggregation"])
def test_a_choice_that_there_is_not_is_answered_with_those_that_there_are(flag: str) -> None:
    message = message_of([f"--{flag}", "median"])
    assert message.startswith(f"--{flag}: invalid choice: 'median'")
    assert all(choice in message for choice in choices_of(flag))


def test_options_of_the_objective_that_exclude_or_need_each_other_say_so() -> None:
    assert message_of(["--kl_correction"]) == "--kl_correction True: expected False if --beta is 0"
    assert message_of(["--delta", "1.25", "--epsilon_high", "0.28"]).endswith("(1.28), or 0 for none")
    for scale in ("batch", "none"):
        message = message_of(["--reward_aggregation", "normalize_then_sum", "--scale_rewards", scale])
        assert message.startswith(f"--scale_rewards {scale}: expected group: ") and "normalize_then_sum" in message
    assert message_of(["--loss", "cispo", "--delta", "4.0", "--mu", "2"]) == (
        "--delta 4.0: expected 0.0, its default: the token loss cispo does not use it (clip does)"
    )
    assert message_of(["--loss", "vespo", "--epsilon_high", "0.3"]).endswith("(clip, cispo does)")
    for flag in ("delta", "off_policy_threshold"):
        assert message_of([f"--{flag}", "2.0"]).startswith(f"--{flag} 2.0: expected 0 if --mu is 1")
    assert message_of(["--dynamic_sampling", "2", "--shuffle_rewards"]).startswith("--dynamic_sampling 2: expected 0")
    with_lora = message_of(["--lora", "--beta", "0.1", "--ref_sync_every", "5"])
    assert with_lora.startswith("--ref_sync_mix 0.6: expected 1 with LoRA")
