"""The pipeline: which flag goes to which stage, what each stage starts from, and that it goes on where it was left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from grpo_core.pipeline.__main__ import main
from grpo_core.pipeline.stages import Settings, stages_of, understood
from tests.helpers import PEFT_IS_BEHIND

TASK = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt=", "--max_prompt_tokens", "90"]
SMALL = [*TASK, "--eval_problems", "2", "--max_completion_tokens", "4", "--precision", "float32", "--no_progress"]
SMALL += ["--tensorboard=False", "--sft.max_steps", "2", "--sft.batch_size", "2", "--sft.lr", "1e-2"]
SMALL += ["--grpo.max_steps", "2", "--grpo.prompts_per_step", "1", "--grpo.group_size", "2", "--grpo.lr", "1e-2"]
SMALL += ["--rewards", "tests.helpers:length_reward", "--show_every", "0"]


def settings(*argv: str, environ: dict[str, str] | None = None) -> Settings:
    return understood(argv, environ or {})


def refusal(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        understood(argv, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(run / "final" / "model.safetensors").items()}


def evaluation(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "eval")


# --- flags


def test_a_plain_flag_goes_to_every_stage_and_one_with_a_stages_name_to_that_one_alone() -> None:
    found = settings(
        "--max_samples", "7", "--sft.lr", "0.5", "--grpo.lr=0.25", "--sft.seed", "4", "--seed", "3"
    ).configs
    assert (found["sft"].max_samples, found["grpo"].max_samples) == (7, 7)
    assert (found["sft"].lr, found["grpo"].lr) == (0.5, 0.25)
    assert (found["sft"].seed, found["grpo"].seed) == (4, 3)  # whatever their order


def test_a_file_holds_the_same_flags_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("mode: sft\npreset: tiny\nsft.lr: 0.5\ngrpo.lr: 0.25\nseed: 3\nsft.batch_size: 5\n")
    found = settings("--config", str(file), "--seed", "9")
    assert found.mode == "sft" and [stage.name for stage in found.stages] == ["sft"]
    config = found.configs["sft"]
    assert (config.lr, config.seed, config.batch_size, config.task) == (0.5, 9, 5, "arithmetic")
    assert settings("--config", str(file), "--mode", "both").configs["grpo"].lr == 0.25


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--sft.lrr", "1"], "--sft.lrr: no such flag; did you mean --sft.lr?"),
        (["--grup_size", "1"], "--grup_size: no such flag; did you mean --group_size?"),
        (["--sfd.lr", "1"], "--sfd.lr: no such flag; did you mean --sft.lr?"),
        (["--lr", "1"], "--lr: sft and grpo each have their own; expected --sft.lr or --grpo.lr"),
        (["--mode", "sft", "--group_size", "4"], "--group_size: no stage of --mode sft has it; grpo would"),
        (["--mode", "sft", "--grpo.lr", "1"], "--grpo.lr: --mode sft has no grpo stage"),
        (["--grpo.model", "m"], "--grpo.model: with --mode both this stage takes the model of an earlier one"),
        (["--preset", "oneshot-grpo"], "--mode both: the preset oneshot-grpo has no sft stage; it has grpo and eval"),
        (["--sft.output_dir", "x"], "--sft.output_dir: no such flag; did you mean"),
        (["--resume", "--overwrite", "--output_dir", "x"], "--overwrite: expected either"),
        (["--resume"], "--resume: expected --output_dir as well"),
        (["--mode", "all", "--model", "x", "--sft.from_scratch"], "--from_scratch: its random weights are in no file"),
        (["--resume", "nowhere"], "--resume nowhere: holds no pipeline.yaml"),
        (["--mode", "most"], "--mode: invalid choice: 'most'"),
        (["--grpo.group_size", "1"], "--grpo.group_size 1: expected 2 or more"),
        (["--grpo.lr", "much"], "--grpo.lr: invalid float value: 'much'"),
        (["--eval_problems", "few"], "--eval_problems: invalid int value: 'few'"),
        (["word"], "word: expected a flag"),
    ],
)
def test_a_mistake_is_named(argv: list[str], line: str) -> None:
    assert refusal(*argv).startswith(line)


def test_the_file_of_one_stage_counts_for_more_than_that_of_all(tmp_path: Path) -> None:
    file, mine = tmp_path / "settings.yaml", tmp_path / "sft.yaml"
    file.write_text("preset: tiny\nmax_samples: 7\nsft.lr: 0.1\ngrpo.lr: 0.2\n")
    outer = ["--config", str(file)]
    mine.write_text("lr: 0.7\nmax_samples: 5\n")
    found = settings(*outer, "--sft.config", str(mine)).configs
    assert (found["sft"].lr, found["grpo"].lr, found["sft"].max_samples, found["grpo"].max_samples) == (0.7, 0.2, 5, 7)
    assert settings(*outer, f"--sft.config={mine}", "--sft.lr", "0.3").configs["sft"].lr == 0.3


def test_a_flag_that_two_stages_mean_differently_is_taken_where_one_stage_has_it() -> None:
    assert settings("--mode", "sft", "--lr", "0.5", "--epochs", "2").configs["sft"].lr == 0.5


def test_a_preset_without_sft_leaves_it_out_of_all() -> None:
    assert [stage.name for stage in stages_of("all", with_sft=False)] == ["zero-shot", "grpo", "grpo-eval"]
    assert stages_of("all", with_sft=False)[1].origin == ""


def test_the_resolved_settings_pass_back_through_config_unchanged(tmp_path: Path, model: Path) -> None:
    out = ["--output_dir", str(tmp_path / "run")]
    for argv in (["--mode", "all"], ["--mode", "all", *SMALL, "--model", str(model), "--sft.lora"]):
        found = settings(*argv, *out)
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(found.as_values()))
        again = settings("--config", str(tmp_path / "settings.yaml"), *out)
        assert (again.configs, again.stages, again.start) == (found.configs, found.stages, found.start)


# --- what a stage starts from


def test_grpo_starts_from_the_model_of_sft_and_each_evaluation_asks_the_one_before_it(model: Path) -> None:
    found = settings("--mode", "all", "--model", str(model), *SMALL, "--output_dir", "out").configs
    assert {name: (c.model, c.adapter_path) for name, c in found.items()} == {
        "zero-shot": (str(model), None),
        "sft": (str(model), None),
        "sft-eval": ("out/sft/final", None),
        "grpo": ("out/sft/final", None),
        "grpo-eval": ("out/grpo/final", None),
    }


def test_grpo_trains_the_adapter_of_sft_further_and_its_base_stays_the_start(model: Path) -> None:
    found = settings("--mode", "all", "--model", str(model), *SMALL, "--lora", "--output_dir", "out").configs
    assert {name: (c.model, c.adapter_path, c.lora) for name, c in found.items()} == {
        "zero-shot": (str(model), None, False),
        "sft": (str(model), None, True),
        "sft-eval": (str(model), "out/sft/final", False),
        "grpo": (str(model), "out/sft/final", False),
        "grpo-eval": (str(model), "out/grpo/final", False),
    }
    full = settings("--model", str(model), *SMALL, "--grpo.lora", "--output_dir", "out").configs["grpo"]
    assert (full.model, full.adapter_path, full.lora) == ("out/sft/final", None, True)  # a new one on SFT's weights


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_the_adapter_that_sft_has_trained_is_the_one_that_grpo_trains(model: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing GRPO leaves the adapter as SFT left it: trained, so not one that adds 0."""
    out = tmp_path / "out"
    main(["--model", str(model), *SMALL, "--lora", "--grpo.lr", "1e-12", "--output_dir", str(out)])
    taught, rewarded = (load_file(out / kind / "final" / "adapter_model.safetensors") for kind in ("sft", "grpo"))
    assert max(float((taught[name] - rewarded[name]).abs().max()) for name in taught) < 1e-6
    assert all(float(weight.abs().max()) > 0 for name, weight in taught.items() if "lora_B" in name)


# --- checked before the first stage


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--grpo.rewards", "no_such"], "no such reward"),
        (["--grpo.max_completion_tokens", "1000"], "--max_completion_tokens 1000: more than the 128 tokens"),
        (["--eval.task", "no.jsonl"], "--eval.task no.jsonl"),
        (["--max_prompt_tokens", "3"], "prompts are longer"),
        (["--model", "/no/such/model"], "--model /no/such/model: no such folder"),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_one_starts(
    flags: list[str], line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--mode", "all", "--model", str(model), *SMALL, "--output_dir", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and line in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--model", str(model), *SMALL, "--output_dir", str(tmp_path)])
    assert contents(tmp_path) == {"mine.txt": b"mine"}
