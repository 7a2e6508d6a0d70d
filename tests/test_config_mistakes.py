"""A mistake in flags or config files is one line that names it and what is accepted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eval.config import EvalConfig
from sft_core.job import SFTConfig
from tests.helpers import message_of, yaml_file


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """A folder of two presets."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "small.yaml").write_text("lr: 0.5\ngroup_size: 3\ntemperature: 0.5\n")
    (folder / "large.yaml").write_text("group_size: 32\n")
    return folder


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--grup_size", "4"], "--group_size"),
        (["--group", "4"], "--group_size"),  # an abbreviation is not the flag: a later flag could make it ambiguous
        (["--reward_weigths=1"], "--reward_weights"),
        (["--learning_rat", "1"], None),
        (["--xyzzy"], None),
        (["positional"], None),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_known_one(argv: list[str], nearest: str | None) -> None:
    message = message_of(argv)
    assert message.startswith(f"{argv[0].split('=')[0]}: no such flag")
    assert nearest is None or message.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(("key", "nearest"), [("grup_size", "group_size"), ("epsilon_hihg", "epsilon_high")])
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_known_one(
    tmp_path: Path, key: str, nearest: str
) -> None:
    file = yaml_file(tmp_path, f"lr: 0.1\n{key}: 4\n")
    assert message_of(["--config", file]) == f"--config {file}: unknown key {key}; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lr: fast", "--lr: invalid float value: 'fast'"),
        ("group_size: 2.5", "--group_size: invalid int value: '2.5'"),
        ("max_steps: true", "--max_steps: invalid int value: 'True'"),
        ("progress: maybe", "--progress: "),
        ("precision: fp8", "--precision: invalid choice: 'fp8'"),
        ("- lr", "expected `flag: value` lines"),
        ("lr", "expected `flag: value` lines"),
        ("lr: [1\nbeta: }", "not YAML"),
        ("lr: 1\n\tbeta: 2", "not YAML"),
    ],
)
def test_a_mistake_in_a_config_file_names_the_file_the_key_and_the_value(
    tmp_path: Path, line: str, complaint: str
) -> None:
    file = yaml_file(tmp_path, line)
    assert message_of(["--config", file]).startswith(f"--config {file}: {complaint}")


def test_a_config_file_that_is_missing_or_not_text_is_named(tmp_path: Path) -> None:
    assert message_of(["--config", str(tmp_path / "none.yaml")]) == f"--config {tmp_path / 'none.yaml'}: no such file"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message_of(["--config", str(binary)]).startswith(f"--config {binary}: not YAML")


def test_an_unknown_preset_is_answered_with_the_known_ones(presets: Path) -> None:
    message = message_of(["--preset", "medium"], presets=presets)
    assert message.startswith("--preset: invalid choice: 'medium'") and "large" in message and "small" in message


@pytest.mark.parametrize(
    ("argv", "accepted"),
    [
        (
            ["--task", "nowhere.jsonl"],
            "gsm8k, arithmetic, ordering, the path of an existing file or folder",
        ),
        (["--eval_file", "nowhere.jsonl"], "an existing file"),
        (["--difficulty", "9"], "1 to 8"),
        (["--shots", "2"], "0 or 1"),
        (["--max_samples", "-1"], "0 or more"),
        (["--eval_problems", "-1"], "0 or more"),
        (["--max_prompt_tokens", "0"], "1 or more"),
        (["--lora_r", "0"], "1 or more"),
        (["--lora_dropout", "1"], "0 or more and below 1"),
        (["--lr", "0"], "more than 0"),
        (["--lr", "nan"], "more than 0"),
        (["--warmup_ratio", "1"], "0 or more and below 1"),
        (["--adam_beta1", "1"], "0 or more and below 1"),
        (["--adam_beta2", "-0.1"], "0 or more and below 1"),
        (["--weight_decay", "-1"], "0 or more"),
        (["--max_grad_norm", "-1"], "0 or more"),
        (["--epochs", "0"], "more than 0 (or --max_steps)"),
        (["--micro_batch", "-1"], "auto, or 1 or more"),
        (["--seed", "-1"], "0 to 2**32 - 1"),
        (["--log_every", "0"], "1 or more"),
        (["--keep_last", "-1"], "0 or more"),
        (["--prompts_per_step", "0"], "1 or more"),
        (["--mu", "0"], "1 or more"),
        (["--temperature", "0"], "more than 0"),
        (["--top_p", "0"], "above 0, up to 1"),
        (["--min_p", "1"], "0 or more and below 1"),
        (["--epsilon_low", "1.5"], "0 to 1"),
        (["--beta", "-0.1"], "0 or more"),
        (["--group_size", "1"], "2 or more"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag_and_what_is_accepted(argv: list[str], accepted: str) -> None:
    flag, value = argv
    message = message_of(argv)
    assert message.startswith(f"{flag} {value}")
    assert f": expected {accepted}" in message


def test_flags_that_exclude_or_need_each_other_say_so(tmp_path: Path) -> None:
    both = message_of(["--lora", "--adapter_path", str(tmp_path)])
    assert both.startswith("--lora") and "--adapter_path" in both
    assert "--from_scratch" in message_of(["--config_overrides", "hidden_size=8"])
    assert "no end" in message_of(["--task", "arithmetic"]) and "--max_steps" in message_of(["--task", "arithmetic"])
    assert "no end" in message_of(["--task", "arithmetic"], SFTConfig)
    assert "no end" in message_of(["--task", "arithmetic", "--eval_problems", "0"], EvalConfig)
    assert "a trained model" in message_of(["--model", "tiny"], EvalConfig)


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = message_of(["--lora"])
    assert message.startswith("--lora") and "pip install '.[lora]'" in message


def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded() -> None:
    for name in ("gpu", "cuda:99"):
        assert message_of(["--device", name]).startswith(f"--device {name}: not available here")
