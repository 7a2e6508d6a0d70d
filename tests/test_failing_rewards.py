"""Whole runs whose reward function fails: saved first, then ended by name and row."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo_core.train
from sft_core.model.tiny import build_tiny

# --- in a run


MODULE = """
import time
calls = 0

def judge(text):
    {body}
    return 1.0

def mine(prompts, completions, **columns):
    global calls
    calls += 1
    if calls < 3:
        return [len(text) % 7 / 4 for text in completions]
    {whole}
    return [judge(text) for text in completions]
"""
FAILURES = {
    "raises": ("1 / 0", "", r"raised ZeroDivisionError: division by zero for row 0 of 8, whose completion is '"),
    "short": ("", "return [1.0] * 7", r"returned 7 values for 8 completions: "),
    "nan": ("return float('nan')", "", r"returned nan for row 0; .* That is row 0 of 8, whose completion is '"),
    "none": ("", "return None", r"returned None, not a list of 8 values$"),
    "tensor": ("import torch; return torch.zeros(2)", "", r"returned tensor\(\[0\., 0\.\]\) for row 0; "),
    "hangs": ("time.sleep(60)", "", r"did not return within 0\.5 seconds \(--reward_timeout\) for row 0 of 8, "),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


def failing_run(folder: Path, model: Path, *flags: str) -> int:
    """The exit code of `python -m grpo_core.train`, small, whose reward fails at step 3."""
    argv = ["--model", str(model), "--task", "arithmetic", "--max_steps", "5", "--eval_problems", "0", "--lr", "1e-2"]
    argv += ["--prompt_format", "hash", "--system_prompt", "", "--prompts_per_step", "2", "--group_size", "4"]
    argv += [
        "--max_completion_tokens",
        "6",
        "--max_prompt_tokens",
        "90",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--no_progress",
    ]
    argv += ["--rewards", "numeric_reward_func", "failing_module:mine", "--output_dir", str(folder)]
    with pytest.raises(SystemExit) as caught:
        grpo_core.train.main([*argv, *flags])
    return int(str(caught.value.code))


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, whole: str) -> None:
    (folder / "failing_module.py").write_text(MODULE.format(body=body or "pass", whole=whole or "pass"))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "failing_module", raising=False)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_is_saved_before_a_failing_reward_function_ends_it_by_name_and_row(
    kind: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body, whole, message = FAILURES[kind]
    write_module(tmp_path, monkeypatch, body, whole)
    assert failing_run(tmp_path / "run", model, "--reward_timeout", "0.5") == 1
    lines = capsys.readouterr().err.splitlines()
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert lines[:2] == ["", f"saved: {saved}; go on with --resume {tmp_path / 'run'}"]
    assert re.match("error: reward function mine: " + message, lines[-1])
    own = 'failing_module.py", line' in "".join(lines)
    assert own == (kind in ("raises", "hangs")) and len(lines) == (3 if not own else len(lines))
    assert not any("rewards/call.py" in line or "grpo_core" in line for line in lines[2:])  # the user's own lines alone

    trained, start = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (saved, model))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"kind": "train"') == 2


def test_a_step_that_was_saved_already_is_not_saved_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, monkeypatch, "1 / 0", "")
    assert failing_run(tmp_path / "run", model, "--save_every", "1") == 1
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
