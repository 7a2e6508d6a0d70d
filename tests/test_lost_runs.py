"""Whole runs that lose their numbers: logged, saved, and named by their rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

import grpo_core.train
import sft_core.train
from sft_core.job import SFTConfig
from sft_core.model.tiny import build_tokenizer, model_config
from sft_core.text.example import Example
from sft_core.text.prompts import encode_prompt, prompt_messages
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
)
from tests.test_lost_numbers import NAN

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# --- whole runs

PROBLEMS = [*EXAMPLES, Example("Kim wants quartz. How many?", "#### 2", "2")]
PROMPTS = ["--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90", "--eval_problems", "0"]
QUIET = ["--device", "cpu", "--no_progress", "--precision", "float32", "--no_tensorboard", "--save_every", "0"]
GRPO = ["--prompts_per_step", "3", "--group_size", "2", "--max_completion_tokens", "6", "--show_every", "0"]
GRPO += ["--rewards", "tests.helpers:length_reward", "--log_every", "4"]
SFT = ["--batch_size", "3", "--max_completion_tokens", "40"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that cannot read a token of one of three problems, which are all in every step."""
    folder, tokenizer = tmp_path_factory.mktemp("poisoned"), build_tokenizer()
    config = SFTConfig(prompt_format="hash", system_prompt="")
    ids = [set(encode_prompt(tokenizer, prompt_messages(example, config))) for example in PROBLEMS]
    [token, *_] = sorted(ids[2] - ids[0] - ids[1] - set(tokenizer("#### 7 10")["input_ids"]))
    shape = model_config(tokenizer)
    shape.update({"tie_word_embeddings": False, "hidden_size": 32, "intermediate_size": 64})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(shape)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = NAN
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"question": example.question, "answer": example.solution}) for example in PROBLEMS]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return ["--model", str(folder / "model"), "--task", str(folder / "problems.jsonl")]


def lost_run(
    main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[str, list[str]]:
    """The lines on stderr of a run that ends with exit code 1."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1], lines


def records(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return all(torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7)) for name in one | other)


def test_a_grpo_run_that_loses_its_numbers_is_logged_saved_names_its_rows_and_can_resume(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = [*start, *PROMPTS, *QUIET, *GRPO, "--max_steps", "5", "--output_dir", str(run), "--max_skipped", "3"]
    error, lines = lost_run(grpo_core.train.main, argv, capsys)
    completions, log = records(run / "completions.jsonl"), records(run / "log.jsonl")
    at_fault = {
        number: [line["row"] for line in completions if line["step"] == number and "quartz" in line["question"]]
        for number in (1, 2, 3)
    }
    assert all(len(rows) == 2 for rows in at_fault.values())
    # All three are in the log, though it is to be written every four steps.
    assert [line["skipped_steps"] for line in log] == [1, 2, 3]
    assert [line["skipped_rows"] for line in log] == list(at_fault.values())
    assert all(line["grpo_loss"] is None and line["grad_norm"] is None for line in log)
    assert [line["row"] for line in completions] == [0, 1, 2, 3, 4, 5] * 3
    assert (
        "3 steps in a row had a loss or gradient that is not finite; in the last, step 3, by itself each of its "
        in error
    )
    assert f"rows {', '.join(map(str, at_fault[3]))} (completions.jsonl holds their texts)" in error
    checkpoint = run / "checkpoints" / "step-000003"
    assert lines[-2] == f"saved: {checkpoint}; go on with --resume {run}"
    assert same_weights(checkpoint, Path(start[1])) and not (run / "final").exists()

    error, _ = lost_run(grpo_core.train.main, ["--resume", str(run), "--max_skipped", "4"], capsys)
    assert "4 steps in a row" in error and "step 4" in error
    grpo_core.train.main(["--resume", str(run), "--max_skipped", "9"])
    log = records(run / "log.jsonl")
    assert [(line["step"], line["skipped_steps"]) for line in log] == [(n, n) for n in (1, 2, 3, 4, 5)]
    assert same_weights(run / "final", Path(start[1]))


def test_an_sft_run_that_is_lost_names_its_questions(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = [*start, *PROMPTS, *QUIET, *SFT, "--max_steps", "4", "--output_dir", str(run), "--max_skipped", "2"]
    error, lines = lost_run(sft_core.train.main, argv, capsys)
    log = records(run / "log.jsonl")
    [row] = log[-1]["skipped_rows"]
    assert f"step 2, by itself each of its rows {row} ('Kim wants quartz. How many?')" in error
    assert [(line["step"], line["skipped_steps"], line["loss"]) for line in log] == [(1, 1, None), (2, 2, None)]
    assert lines[-2].startswith(f"saved: {run / 'checkpoints' / 'step-000002'}")
    assert same_weights(run / "checkpoints" / "step-000002", Path(start[1]))
    sft_core.train.main(["--resume", str(run), "--max_skipped", "9"])
    assert len(records(run / "log.jsonl")) == 4 and same_weights(run / "final", Path(start[1]))
