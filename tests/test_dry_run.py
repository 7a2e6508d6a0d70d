"""--dry_run: everything is loaded and planned, no step is taken, nothing is written; and the environment's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval.__main__
import grpo_core.train
import sft_core.train
from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.config import as_yaml
from sft_core.learn.optim import Optimizer
from sft_core.model.policy import load_policy
from sft_core.run.plan_lines import UNTOUCHED
from tests.faulty import GRPO, SFT, SMALL, command
from tests.helpers import yaml_file

Program = Callable[[list[str]], None]
PROGRAMS: dict[str, tuple[Program, list[str]]] = {
    "sft": (sft_core.train.main, [*SMALL, *SFT]),
    "grpo": (grpo_core.train.main, [*SMALL, *GRPO]),
    "eval": (
        eval.__main__.main,
        [
            "--task",
            "arithmetic",
            "--system_prompt=",
            "--eval_problems",
            "3",
            "--max_prompt_tokens",
            "100",
            "--max_completion_tokens",
            "9",
        ],
    ),
}


@pytest.fixture
def nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, a program that can take no step, and the weights that were loaded are counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Optimizer, "clip_and_step", lambda *_: pytest.fail("a step was taken"))
    return tmp_path


def lines_of(text: str) -> dict[str, str]:
    """A plan's lines by their subject."""
    return {line.split()[0].rstrip(":"): line for line in text.splitlines()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_loads_everything_and_writes_nothing(
    name: str, nothing_happens: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []

    def load(*args: Any) -> Any:
        loaded.append(load_policy(*args))
        return loaded[-1]

    monkeypatch.setattr("sft_core.run.plan_lines.load_policy", load)
    main, flags = PROGRAMS[name]
    main(["--model", str(model), *flags, "--output_dir", "run", "--dry_run"])
    shown = capsys.readouterr().out
    assert len(loaded) == 1 and shown.endswith(UNTOUCHED + "\n")
    assert {"settings", "task", "model", "tokens", "memory", "folder"} <= set(lines_of(shown))
    assert "run (new)" in lines_of(shown)["folder"]
    assert list(nothing_happens.iterdir()) == []


def test_the_plan_of_grpo_has_the_numbers_of_the_run(
    model: Path, whole: Path, nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`whole` is the run that this command made."""
    grpo_core.train.main([*command(model, nothing_happens / "new"), "--eval_every", "2", "--dry_run"])
    plan = lines_of(capsys.readouterr().out)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log if line["kind"] == "train"]
    assert f"{len(steps)} of 2 prompts x 2 completions" in plan["steps"]
    assert "up to 16 a step, 48 in all" in plan["tokens"]  # 2 x 2 completions of 4 tokens, 3 steps
    assert "of 2 held-out problems, a greedy answer to each, 3 times: at steps 0, 2, 3" in plan["evaluations"]
    assert "1 x length_reward" in plan["rewards"]
    assert "GB at its peak" in plan["memory"] and plan["memory"].endswith("on cpu")


def test_the_plan_of_a_finite_task_counts_its_problems_and_epochs(
    model: Path, nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1\n#### {i + 1}"} for i in range(12)]
    (nothing_happens / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", "task.jsonl", "--max_steps", "0", "--epochs", "3", "--eval_problems", "2", "--dry_run"]
    sft_core.train.main(["--model", str(model), *SMALL, *SFT, *flags])
    plan = lines_of(capsys.readouterr().out)
    assert "10 training problems, 2 held out" in plan["task"]
    assert "8 of 4 demonstrations (3.20 epochs)" in plan["steps"]  # 30 of them, the last batch whole
    (nothing_happens / "task.jsonl").unlink()


def test_the_plan_of_an_evaluation_counts_its_samples(
    model: Path, nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, flags = PROGRAMS["eval"]
    main(["--model", str(model), *flags, "--samples", "8", "--dry_run"])
    assert (
        "of 9 at most, a greedy answer and 8 samples of each, 32 at once" in lines_of(capsys.readouterr().out)["tokens"]
    )


def test_a_dry_run_of_the_embedded_job_says_that_its_sft_comes_first(
    nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grpo_core.train.main(["--dry_run"])
    shown = capsys.readouterr().out
    assert shown.startswith("settings: defaults < preset tiny\n")
    assert "after its SFT (to be done first, runs/tiny-sft-" in shown
    assert list(nothing_happens.iterdir()) == []


def test_a_dry_run_of_a_finished_run_says_that_nothing_is_left(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grpo_core.train.main(["--resume", str(whole), "--dry_run"])
    assert "finished: nothing is left to do" in capsys.readouterr().out


def test_a_mistake_is_found_by_a_dry_run_too(
    model: Path, nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (nothing_happens / "model").mkdir()
    (nothing_happens / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    (nothing_happens / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        sft_core.train.main(["--model", "model", *SMALL, *SFT, "--dry_run"])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: --model model")


# --- MODEL_NAME, OUTPUT_DIR, RUN_NAME


def test_the_environment_stands_above_a_preset_and_below_a_config_file_and_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ, presets = {"MODEL_NAME": "its/own"}, grpo_core.train.PRESETS

    def model_of(*argv: str) -> str:
        return parse_config(GRPOConfig, argv, presets, "tiny", environ).model

    assert model_of() == model_of("--preset", "t4") == "its/own"
    assert capsys.readouterr().err.count("set by the environment (MODEL_NAME, OUTPUT_DIR, RUN_NAME): --model its/own\n")
    file = yaml_file(tmp_path, as_yaml(GRPOConfig(model="the/files")))
    assert model_of("--config", file) == "the/files"
    assert model_of("--config", file, "--model", "a/flag") == model_of("--model", "a/flag") == "a/flag"
    assert capsys.readouterr().err == ""  # it has set nothing


def test_a_model_of_the_environment_is_no_embedded_job() -> None:
    environ = {"MODEL_NAME": "its/own"}
    assert parse_config(GRPOConfig, [], grpo_core.train.PRESETS, "tiny", environ).task == "gsm8k"
    assert parse_config(GRPOConfig, [], grpo_core.train.PRESETS, "tiny", {"MODEL_NAME": ""}).task == "arithmetic"


@pytest.mark.parametrize(
    ("environ", "argv", "folder"),
    [
        ({"RUN_NAME": "first"}, [], "runs/first"),
        ({"RUN_NAME": "first", "OUTPUT_DIR": "outputs/it"}, [], "outputs/it"),
        ({"RUN_NAME": "first", "OUTPUT_DIR": "outputs/it"}, ["--output_dir", "mine"], "mine"),
        ({"OUTPUT_DIR": "outputs/it"}, ["--output_path", "mine"], "mine"),
    ],
)
def test_run_name_is_a_folder_below_runs_where_nothing_else_says_one(
    environ: dict[str, str], argv: list[str], folder: str
) -> None:
    assert parse_config(GRPOConfig, [*argv, "--model", "m"], environ=environ).output_dir == folder


@pytest.mark.parametrize("name", ["a/b", "..", "/root"])
def test_a_run_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^RUN_NAME {name}: expected the name of a folder below runs/"):
        parse_config(GRPOConfig, [], environ={"RUN_NAME": name})


def test_a_run_resumed_by_name_does_not_read_the_environment(whole: Path) -> None:
    environ = {"OUTPUT_DIR": "elsewhere", "MODEL_NAME": "its/own"}
    config = parse_config(GRPOConfig, ["--resume", str(whole)], environ=environ)
    assert config.output_dir == str(whole) and config.model != "its/own"


@pytest.mark.parametrize("environ", [{}, {"OUTPUT_DIR": "elsewhere"}], ids=["alone", "above the environment"])
def test_resume_continues_in_the_folder_that_the_config_file_names(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, lr in (("elsewhere", 0.5), ("mine", 0.25)):
        Path(folder).mkdir()
        Path(folder, "config.yaml").write_text(as_yaml(GRPOConfig(model="m", lr=lr)))
    argv = ["--resume", "--config", yaml_file(tmp_path, "model: m\noutput_dir: mine\n")]
    assert parse_config(GRPOConfig, [*argv, "--lr", "0.25"], environ=environ).output_dir == "mine"
    with pytest.raises(ValueError, match=r"^--lr 0.5: the run in mine was begun with 0.25"):
        parse_config(GRPOConfig, [*argv, "--lr", "0.5"], environ=environ)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_reads_its_environment(
    name: str, nothing_happens: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, flags = PROGRAMS[name]
    monkeypatch.setenv("MODEL_NAME", str(model))
    monkeypatch.setenv("RUN_NAME", "mine")
    main([*flags, "--dry_run"])
    out, err = capsys.readouterr()
    assert str(model) in lines_of(out)["model"] and "runs/mine (new)" in lines_of(out)["folder"]
    assert err.count("\n") == 1 and "< environment <" in lines_of(out)["settings"]


@pytest.mark.parametrize(
    ("prompt_format", "reward", "paid"),
    [
        ("hash", "numeric_reward_func", True),
        ("xml", "numeric_reward_func", False),
        ("xml", "correctness_reward_func", True),
        ("hash", "correctness_reward_func", False),
        ("xml", "strict_format_reward_func", True),
        ("hash", "xmlcount_reward_func", False),
        ("hash", "soft_overlong_reward_func", True),  # looks at lengths alone
        ("hash", "tests.helpers:length_reward", True),  # a reward of one's own may look for anything
    ],
)
def test_a_reward_that_looks_for_another_format_than_the_prompt_asks_for_is_named(
    prompt_format: str, reward: str, paid: bool, model: Path, nothing_happens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, *GRPO, "--prompt_format", prompt_format, "--rewards", reward]
    grpo_core.train.main(["--model", str(model), *flags, "--output_dir", "run", "--dry_run"])
    line = lines_of(capsys.readouterr().out)["rewards"]
    note = f"{reward} pays nothing for the first problem's own solution in --prompt_format {prompt_format}"
    assert (note in line) == (not paid)
