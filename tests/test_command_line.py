"""Bad input ends in one line and exit code 2 before any model is loaded, and leaves what is on disk alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedConfig

import eval.__main__
import grpo_core.job
import grpo_core.train
import sft_core.train
from sft_core.model.tiny import build_tiny

ROOT = Path(__file__).parent.parent
PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "sft_core.train": sft_core.train.main,
    "grpo_core.train": grpo_core.train.main,
    "eval": eval.__main__.main,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model folder with a context of 256 tokens."""
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@dataclass
class Workplace:
    """A folder to stand in, with an earlier run in it and one file for each mistake."""

    path: Path
    model: Path

    def argv(self, program: str, *more: str) -> list[str]:
        """A command that would work, and what is wrong with it."""
        good = ["--model", str(self.model), "--task", "good.jsonl", "--system_prompt="]
        good += ["--max_prompt_tokens", "100", "--max_completion_tokens", "50"]
        steps = [] if program == "eval" else ["--max_steps", "1"]
        return [*good, *steps, *more]

    def snapshot(self) -> dict[str, bytes | None]:
        found = sorted(self.path.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture
def workplace(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    rows = [json.dumps({"question": f"What is {i}?", "answer": f"#### {i}"}) + "\n" for i in range(20)]
    files = {
        "good.jsonl": "".join(rows),
        "line17.jsonl": "".join(rows[:16]) + "{'single': 'quotes'}\n" + "".join(rows[17:]),
        "no-gold.jsonl": "".join(rows[:16]) + json.dumps({"question": "What?", "answer": "seventeen"}) + "\n",
        "empty.jsonl": "\n",
        "malformed.yaml": "lr: [1\nbeta: }\n",
        "unknown-key.yaml": "max_promt_tokens: 4\n",
        "wrong-type.yaml": "micro_batch: many\n",
        "not-json/config.json": "{nope",
        "no-type/config.json": "{}",
        "no-weights/config.json": (model / "config.json").read_text(),
        "bad-adapter/adapter_config.json": "{}",
        "runs/old/log.jsonl": "{}\n",
        "runs/old/config.yaml": "seed: 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, model)


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read or made: not the named model's, not the built-in one's."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    for module in (sft_core.train, grpo_core.job, eval.__main__, sft_core.model.policy):
        monkeypatch.setattr(module, "load_policy", loaded)
    monkeypatch.setattr(sft_core.train, "build_tiny", loaded)
    monkeypatch.setattr(grpo_core.train, "tiny_sft", loaded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", loaded)


def the_error_line(argv: list[str], program: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[program](argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
    return err.removeprefix("error: ").rstrip("\n")


MISTAKES: dict[str, tuple[list[str], list[str]]] = {  # what: the flags, and what the line must hold
    "unknown flag": (["--max_promt_tokens", "4"], ["--max_promt_tokens: no such flag", "--max_prompt_tokens?"]),
    "missing file": (["--task", "none.jsonl"], ["--task none.jsonl", "existing file"]),
    "missing eval file": (["--eval_file", "none.jsonl"], ["--eval_file none.jsonl", "existing file"]),
    "malformed line 17": (["--task", "line17.jsonl"], ["line17.jsonl, line 17: not JSON"]),
    "no answer in line 17": (["--task", "no-gold.jsonl"], ["no-gold.jsonl, line 17:", "####"]),
    "empty file": (["--task", "empty.jsonl"], ["empty.jsonl: holds no problems"]),
    "no such model": (["--model", "/no/such/model"], ["--model /no/such/model: no such folder"]),
    "no such model here": (["--model", "./runs/new/final"], ["--model ./runs/new/final: no such folder"]),
    "a run folder instead of its final/": (["--model", "runs/old"], ["--model runs/old: holds no config.json"]),
    "a config.json that is not JSON": (["--model", "not-json"], ["--model not-json", "not a valid JSON file"]),
    "a config.json without a type": (["--model", "no-type"], ["--model no-type", "model_type"]),
    "a model without weights": (["--model", "no-weights"], ["--model no-weights", "--from_scratch"]),
    "no such config entry": (
        ["--from_scratch", "--config_overrides", "hiden_size=8"],
        ["--config_overrides hiden_size=8"],
    ),
    "a config entry of the wrong type": (
        ["--from_scratch", "--config_overrides", "hidden_size=big"],
        ["hidden_size", "int"],
    ),
    "no such adapter": (["--adapter_path", "/no/such/adapter"], ["--adapter_path /no/such/adapter: no such folder"]),
    "an adapter that is none": (["--adapter_path", "runs/old"], ["--adapter_path runs/old", "not a LoRA adapter"]),
    "an adapter without a base": (["--model", "bad-adapter"], ["bad-adapter", "base_model_name_or_path"]),
    "budget over the context": (
        ["--max_completion_tokens", "157"],
        ["--max_prompt_tokens 100 + --max_completion_tokens 157", "256 tokens"],
    ),
    "every prompt too long": (["--max_prompt_tokens", "5"], ["--max_prompt_tokens 5: all", "prompts are longer"]),
    "output folder in use": (["--output_dir", "runs/old"], ["--output_dir runs/old", "new or empty"]),
    "output folder below a file": (["--output_dir", "good.jsonl/run"], ["--output_dir good.jsonl/run"]),
    "bad device": (["--device", "gpu"], ["--device gpu: not available here"]),
    "bad choice": (["--prompt_format", "json"], ["--prompt_format: invalid choice: 'json'"]),
    "malformed YAML": (["--config", "malformed.yaml"], ["--config malformed.yaml: not YAML"]),
    "unknown key": (["--config", "unknown-key.yaml"], ["unknown-key.yaml", "max_promt_tokens", "max_prompt_tokens?"]),
    "missing config": (["--config", "none.yaml"], ["--config none.yaml: no such file"]),
}
REWARD_MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such reward": (["--rewards", "numeric"], ["--rewards 'numeric': no such reward", "numeric_reward_func"]),
    "no such reward module": (["--rewards", "no_module:reward"], ["--rewards 'no_module:reward'", "cannot import"]),
    "a reward called otherwise": (["--rewards", "math:gcd"], ["reward function gcd", "prompts, completions"]),
    "weights for other rewards": (["--reward_weights", "1", "2"], ["--reward_weights: 2 weights"]),
    "group size 1 with scaling": (["--group_size", "1"], ["--group_size 1: expected 2 or more"]),
    "wrong type in YAML": (["--config", "wrong-type.yaml"], ["wrong-type.yaml: --micro_batch", "'many'"]),
}


def everything_wrong() -> Iterator[Any]:
    for program in PROGRAMS:
        more = REWARD_MISTAKES if program == "grpo_core.train" else {}
        for name, (flags, parts) in {**MISTAKES, **more}.items():
            yield pytest.param(program, flags, parts, id=f"{program}: {name}")


@pytest.mark.parametrize(("program", "flags", "parts"), list(everything_wrong()))
def test_a_mistake_is_one_line_and_exit_code_2_and_loads_and_writes_nothing(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    flags: list[str],
    parts: list[str],
) -> None:
    forbid_models(monkeypatch)
    before = workplace.snapshot()
    line = the_error_line(workplace.argv(program, *flags), program, capsys)
    assert all(part in line for part in parts), line
    assert workplace.snapshot() == before


def test_the_command_that_the_mistakes_are_made_in_would_work(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, every test above could pass for one and the same wrong reason."""

    class ModelLoaded(Exception):
        pass

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise ModelLoaded

    for module in (sft_core.train, grpo_core.job, eval.__main__):
        monkeypatch.setattr(module, "load_policy", loaded)
    for program, main in PROGRAMS.items():
        with pytest.raises(ModelLoaded):
            main(workplace.argv(program, "--max_completion_tokens", "156"))  # 100 + 156: all that the model can hold


@pytest.mark.parametrize("program", ["sft_core.train", "grpo_core.train"])
def test_a_budget_over_the_built_in_models_context_is_refused_too(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    forbid_models(monkeypatch)
    before = workplace.snapshot()
    line = the_error_line(["--max_completion_tokens", "1000"], program, capsys)
    assert "--max_completion_tokens 1000: more than the 256 tokens that the built-in model can hold" in line
    assert workplace.snapshot() == before


@pytest.mark.parametrize("flags", [["--model", "bad-adapter"], ["--lora"]])
def test_an_adapter_without_peft_is_one_line_that_says_what_to_install(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    forbid_models(monkeypatch)
    monkeypatch.setitem(sys.modules, "peft", None)
    for program in PROGRAMS:
        assert "pip install '.[lora]'" in the_error_line(workplace.argv(program, *flags), program, capsys)


@pytest.mark.parametrize("flags", [["--adapter_path", "/no/such/adapter"], ["--from_scratch"]])
@pytest.mark.parametrize("program", ["sft_core.train", "grpo_core.train"])
def test_the_built_in_model_takes_no_adapter_and_no_other_shape(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    flags: list[str],
) -> None:
    """An --adapter_path without its --model is easily typed, and must not wait for the built-in model's SFT."""
    forbid_models(monkeypatch)
    assert the_error_line(flags, program, capsys).startswith("--model tiny: expected a model folder or hub name")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_model_that_the_hub_does_not_give_is_one_line(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)  # of each attempt
        raise OSError("We couldn't connect to the hub.\nSee how to run at some address.")

    forbid_models(monkeypatch)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", offline)
    line = the_error_line(workplace.argv(program, "--model", "nobody/no-model"), program, capsys)
    reason = "neither a model folder here nor to be had from the hub (We couldn't connect to the hub.)"
    assert line == f"--model nobody/no-model: {reason}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_gsm8k_without_the_hub_is_one_line_that_names_local_files(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    forbid_models(monkeypatch)
    monkeypatch.setattr("datasets.load_dataset", offline)
    line = the_error_line(workplace.argv(program, "--task", "gsm8k"), program, capsys)
    assert line.startswith("--task gsm8k: cannot load") and "local file" in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_error_inside_a_run_keeps_its_traceback(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """One line is for what the user got wrong; a fault of the program must not be dressed up as that."""

    def faulty(*args: Any, **kwargs: Any) -> None:
        raise ValueError("tensors of unlike sizes")

    monkeypatch.setattr(sft_core.train, "sft_step", faulty)
    monkeypatch.setattr(grpo_core.train, "grpo_step", faulty)
    monkeypatch.setattr(eval.__main__, "evaluate", faulty)
    with pytest.raises(ValueError, match="tensors of unlike sizes"):
        PROGRAMS[program](workplace.argv(program))


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_ends_a_run_in_one_line(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for module in (sft_core.train, grpo_core.job, eval.__main__):
        monkeypatch.setattr(module, "load_policy", interrupted)
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[program](workplace.argv(program))
    assert caught.value.code == 130  # what a shell reports for Ctrl-C
    err = capsys.readouterr().err
    assert err.strip().startswith("interrupted") and err.strip().count("\n") == 0


@pytest.mark.slow
def test_a_shell_sees_one_line_and_exit_code_2(tmp_path: Path) -> None:
    argv, env = [sys.executable, "-m", "grpo_core.train", "--modle", "x"], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout, [*tmp_path.iterdir()]) == (2, "", [])
    assert process.stderr == "error: --modle: no such flag; did you mean --model?\n"
