"""A run says, once and while it trains, what the doctor would say of it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import grpo_core.train
from grpo_core.config import GRPOConfig
from grpo_core.doctor.readlog import LEAST_LINES, read_run
from grpo_core.doctor.watch import Watch
from sft_core.model.tiny import build_tiny
from tests.helpers import grpo_config
from tests.runs import QUIET
from tests.test_doctor import HEALTHY, SICK


def lines_of(run: Path) -> list[str]:
    """What is said of a recorded run, step by step."""
    recorded = read_run(run)
    fields = {name: value for name, value in recorded.config.items() if name in GRPOConfig.__dataclass_fields__}
    watch = Watch(grpo_config(), "runs/x")
    watch.config = fields
    return [line for train in recorded.train if (line := watch.of(train["step"], train))]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("everything_truncated", "Completions do not end"),
        ("never_rewarded", "Every completion gets the same reward"),
        ("format_never_earned", "Every completion gets the same reward"),
        ("too_hard", "The task is too hard"),
        ("too_easy", "The task is too easy"),
        ("entropy_collapse", "The entropy has collapsed"),
    ],
)
def test_a_sick_run_is_told_once_with_a_flag_to_try(name: str, words: str) -> None:
    said = [line for line in lines_of(SICK / name) if words in line]
    assert len(said) == 1 and "\n" not in said[0] and "--" in said[0].partition("Try: ")[2]
    assert said[0].endswith("python -m grpo_core.doctor runs/x")


@pytest.mark.parametrize("run", [run for run in HEALTHY if "sft" not in run.name], ids=lambda run: run.name)
def test_of_a_healthy_run_nothing_is_said(run: Path) -> None:
    assert lines_of(run) == []


def never(prompts: Any, **_: Any) -> list[float]:
    return [0.0] * len(prompts)


def test_a_run_that_cannot_learn_says_so_at_its_tenth_step_and_names_what_to_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--max_steps", str(2 * LEAST_LINES + 1), "--prompts_per_step", "1", "--group_size", "2"]
    job = ["--task", "arithmetic", "--eval_problems", "0", "--max_completion_tokens", "3", "--show_every", "0"]
    out = tmp_path / "run"
    job += ["--rewards", "tests.test_watch:never", "--model", str(build_tiny(tmp_path / "model", seed=0))]
    grpo_core.train.main([*QUIET, *steps, *job, "--max_prompt_tokens", "250", "--output_dir", str(out)])
    said = "".join(capsys.readouterr())
    assert said.count("step 10: ") == 1 and said.count("Try: ") == 1 and "Completions do not end" in said
    assert f"python -m benchmarks.browse {out}" in said and f"python -m grpo_core.doctor {out}" in said
