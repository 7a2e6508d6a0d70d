"""Every command of docs/checklist.md, word for word and in its order, with a stand-in for the hub that has a small
model under each name and small data as GSM8K."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM

from rewards.jsonl import read_jsonl
from sft_core.arithmetic import ArithmeticStream
from tests.helpers import PEFT_IS_BEHIND, tiny_model, tokenizer
from tests.hub import Hub, serving, take_for_the_hub
from tests.test_hub import HUB_IS_BEHIND
from tests.test_trackers import StandIn

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), pytest.mark.filterwarnings(HUB_IS_BEHIND)]

PAGE = Path(__file__).parent.parent / "docs" / "checklist.md"
NAMES = ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen3-0.6B"]
COMMANDS = re.findall(r"`((?:[A-Z_]+=\S+ )*python -m [^`]+)`", PAGE.read_text(encoding="utf-8"))

# What makes a command small, behind what it says itself. Data and models are small by what the hub has.
SMALL = {
    "sft_core.train": ["--max_steps", "2"],
    "grpo_core.train": ["--max_steps", "2", "--max_completion_tokens", "6"],
    "eval": ["--max_completion_tokens", "6"],
    "grpo_core.pipeline": ["--max_completion_tokens", "6"],
    "eval.ask": ["--max_completion_tokens", "6"],
}


@dataclass(frozen=True)
class Done:
    """A command that has run in this folder."""

    code: int
    out: str
    errors: str
    folder: Path


def run(command: str, folder: Path, patch: pytest.MonkeyPatch) -> Done:
    words = shlex.split(command)
    environment = [word for word in words[: words.index("python")]]
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
            main([*argv, *SMALL.get(program, [])])
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), errors.getvalue(), folder)
