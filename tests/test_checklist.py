"""Every command of docs/checklist.md, word for word and in its order, with a stand-in for the hub that has a small
model under each name and small data as GSM8K."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import AutoModelForCausalLM

import sft_core.train
from rewards.jsonl import read_jsonl
from sft_core.text.arithmetic import ArithmeticStream
from tests.helpers import PEFT_IS_BEHIND, tiny_model, tokenizer
from tests.hub import Hub, serving, take_for_the_hub
from tests.test_hub import HUB_IS_BEHIND
from tests.test_trackers import StandIn

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), pytest.mark.filterwarnings(HUB_IS_BEHIND)]

PAGE = Path(__file__).parent.parent / "docs" / "checklist.md"
NAMES = ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen3-0.6B"]
COMMANDS = dict(re.findall(r"^\| (.+) \| `(.+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))  # by promise

ANN = "Ann has 2 coins and gets 3. How many has she?"

# What makes a command small, behind what it says itself. Data and models are small by what the hub has.
FEW_WORDS = ["--max_prompt_tokens", "1500"]  # the small tokenizer has few words, and prompts many tokens
SMALL = {
    "sft_core.train": [*FEW_WORDS, "--max_completion_tokens", "200"],
    "grpo_core.train": [*FEW_WORDS, "--max_completion_tokens", "6"],
    "eval": [*FEW_WORDS, "--max_completion_tokens", "6"],
    "grpo_core.pipeline": [*FEW_WORDS, "--max_completion_tokens", "200"],
    "eval.ask": [*FEW_WORDS, "--max_completion_tokens", "200"],
}


@dataclass(frozen=True)
class Done:
    """A command that has run in this folder."""

    code: int
    out: str
    errors: str
    runs: Path
    hub: Hub

    def config(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.runs / name / "config.yaml").read_text())
        return found

    def steps(self, name: str) -> list[int]:
        """That were trained."""
        return [line["step"] for line in read_jsonl(self.runs / name / "log.jsonl") if line["kind"] == "train"]

    def adapter(self, name: str) -> bool:
        return (self.runs / name / "final" / "adapter_model.safetensors").is_file()


def run(command: str, folder: Path, hub: Hub, patch: pytest.MonkeyPatch) -> Done:
    unquoted = lambda quoted: shlex.quote(quoted[1].encode().decode("unicode_escape"))  # noqa: E731
    words = shlex.split(re.sub(r"\$'([^']*)'", unquoted, command))
    environment = words[: words.index("python")]
    _, _, program, *argv = words[len(environment) :]
    main: Callable[[list[str]], None]
    try:
        main = importlib.import_module(f"{program}.__main__").main
    except ImportError:
        main = importlib.import_module(program).main
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with patch.context() as its, redirect_stdout(out), redirect_stderr(errors):
        for word in environment:
            its.setenv(*word.split("=", 1))
        try:
            grpo_stage = program == "grpo_core.pipeline" and not {"sft", "eval"} & {*argv}
            main([*argv, *SMALL.get(program, []), *(["--grpo.max_completion_tokens", "6"] if grpo_stage else [])])
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), errors.getvalue(), folder / "runs", hub)


def taught(folder: Path) -> Path:
    """A small model that has learned by heart to answer one question, in the XML format."""
    start, task = folder / "start", folder / "task.jsonl"
    tiny_model(max_position_embeddings=2048).save_pretrained(start)
    tokenizer().save_pretrained(start)
    task.write_text(json.dumps({"question": ANN, "answer": "2+3=5\n#### 5"}) + "\n")
    flags = [
        *FEW_WORDS,
        "--max_completion_tokens",
        "200",
        "--eval_problems",
        "0",
        "--batch_size",
        "1",
        "--device",
        "cpu",
    ]
    flags += ["--max_steps", "150", "--lr", "1e-2", "--precision", "float32", "--save_every", "0", "--no_progress"]
    sft_core.train.main(["--model", str(start), "--task", str(task), *flags, "--output_dir", str(folder / "taught")])
    return folder / "taught" / "final"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Done]]:
    """All commands, each after those before it."""
    folder = tmp_path_factory.mktemp("checklist")
    problems = [ArithmeticStream("train", seed=0, difficulty=2)[i] for i in range(8)]
    gsm8k = {"train": datasets.Dataset.from_list(problems[:4]), "test": datasets.Dataset.from_list(problems[4:])}
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        take_for_the_hub(hub, folder / "cache", patch)
        patch.setattr(datasets, "load_dataset", lambda path, name, split: gsm8k[split])
        patch.setitem(sys.modules, "wandb", StandIn(folder / "told.jsonl"))
        patch.chdir(folder)
        files = {path.name: path.read_bytes() for path in taught(folder).iterdir()}
        hub.repositories |= {f"Qwen/{name}": dict(files) for name in NAMES}
        yield {promise: run(command, folder, hub, patch) for promise, command in COMMANDS.items()}


def answered(done: Done, name: str, count: int = 4) -> bool:
    """An evaluation of so many problems, with its table."""
    rows = read_jsonl(done.runs / name / "answers.jsonl")
    return len(rows) == count and "accuracy" in done.out and (done.runs / name / "summary.md").is_file()


def zipped(done: Done) -> bool:
    with zipfile.ZipFile(done.runs / "exported.zip") as file:
        names = {Path(name).name for name in file.namelist()}
    AutoModelForCausalLM.from_pretrained(done.runs / "exported")
    return {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names


def asked(done: Done) -> bool:
    [row] = read_jsonl(done.runs / "asked.jsonl")
    return row["question"] == ANN and row["answer"].endswith("2+3=5\n#### 5") and "Answer: 5" in done.out


FIVE = ["correctness", "int", "strict_format", "soft_format", "xmlcount"]
SHEETS = ["losses", "rewards", "timing", "tokens", "curve"]

# What the command leaves or says, by its promise in the page.
SHOWN: dict[str, Callable[[Done], bool]] = {
    "zero-shot evaluation, SFT, GRPO, in order, and a test": lambda done: (
        re.findall(r"zero-shot|sft-eval|grpo-eval", (done.runs / "atnlp" / "summary.md").read_text())[:3]
        == ["zero-shot", "sft-eval", "grpo-eval"]
    ),
    "stage 1: zero-shot evaluation": lambda done: answered(done, "zero-shot"),
    "stage 2: SFT on 3,000 problems, LoRA": lambda done: (
        done.adapter("sft") and done.config("sft")["max_samples"] == 3000
    ),
    "stage 3: GRPO on 500 problems, from the SFT adapter": lambda done: (
        done.adapter("sft-grpo") and done.config("sft-grpo")["max_samples"] == 500 and done.steps("sft-grpo")[0] == 1
    ),
    "test on 100 problems": lambda done: answered(done, "test") and done.config("test")["eval_problems"] == 100,
    "the base model instead of its -Instruct version": lambda done: answered(done, "zero-shot-base"),
    "what each stage would do, before it costs anything": lambda done: (
        "steps" in done.out and "memory" in done.out and not (done.runs / "plan").exists()
    ),
    "W&B by flag or environment": lambda done: '"call": "log"' in (done.runs.parent / "told.jsonl").read_text(),
    "its run: five rewards, 16 samples, its optimizer; questions, expected answers, responses and extracted "
    "answers are printed": lambda done: all(
        word + ":" in done.out for word in ("Question", "Expected", "Response", "Extracted")
    ),
    "its rewards on recorded completions": lambda done: all(f"{name}_reward_func" in done.out for name in FIVE),
    "save, zip, and load again": zipped,
    "push weights, tokenizer and config to the hub": lambda done: (
        {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= done.hub.repositories["me/model"].keys()
    ),
    "ask the trained model in the terminal; query and reasoning are appended to a JSONL": asked,
    "those answers as training data": lambda done: done.adapter("synthetic"),
    "SFT and GRPO in one command": lambda done: done.adapter("g5/sft") and done.adapter("g5/grpo"),
    "SFT alone, 4-bit where there is a GPU (`--sft.use_4bit`)": lambda done: done.adapter("g5-sft/sft"),
    "GRPO alone, from an SFT model": lambda done: done.adapter("g5-grpo/grpo") and done.steps("g5-grpo/grpo")[0] == 1,
    "evaluation": lambda done: answered(done, "g5-eval/eval"),
    "the exact numeric reward, by itself": lambda done: bool(re.search(r"numeric_reward_func +1\n", done.out)),
    "losses, rewards, timing, tokens as pictures, and a summary": lambda done: (
        "reward" in done.out
        and all((done.runs / f"g5/grpo/plots/{name}.png").stat().st_size > 9_000 for name in SHEETS)
    ),
    "what is wrong with a run": lambda done: "grpo" in done.out and len(done.out.splitlines()) > 3,
    "one-shot prompt, its rewards, model and folder from the environment": lambda done: (
        done.config("script") | {"model": "Qwen/Qwen2.5-1.5B-Instruct", "shots": 1} == done.config("script")
    ),
    "the same with LoRA": lambda done: done.adapter("script-lora"),
    "extra content after the answer costs reward": lambda done: bool(
        re.search(r"xmlcount_reward_func +0\.49", done.out)
    ),
    "pass@k, maj@k, intervals, accuracy by solution steps": lambda done: (
        all(name in done.out for name in ("pass@4", "maj@4", "lenient", "steps")) and answered(done, "sampled")
    ),
    "two models on the same problems": lambda done: "McNemar" in done.out,
    "every group over time, token by token, in a browser": lambda done: (
        {row["question"] for row in read_jsonl(done.runs / "oneshot" / "completions.jsonl")}
        <= set(re.findall(r'"([^"]+)"', (done.runs / "oneshot" / "completions.html").read_text()))
    ),
    "resuming after a disconnect": lambda done: "this run is finished" in done.out,
}


def test_every_promise_has_a_command_and_every_command_a_claim() -> None:
    assert list(COMMANDS) == list(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("promise", SHOWN)
def test_the_command_keeps_the_promise(promise: str, done: dict[str, Done]) -> None:
    assert done[promise].code == 0, done[promise].out + done[promise].errors
    assert SHOWN[promise](done[promise]), done[promise].out + done[promise].errors
