"""What a sitting consists of, the most telling first. Each part runs by itself; its limit kills it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Command = list[str]  # what follows `python`


@dataclass(frozen=True)
class Part:
    """`figure`: a pattern in what the commands print; its groups, wherever it is found, are the part's key figures.
    `packages`: what it needs beside torch and transformers; without them it is skipped. `proof`: a word that its
    figures hold unless everything in it was skipped."""

    name: str
    tells: str
    limit: float  # seconds, of all its commands together
    commands: list[Command]
    figure: str = r"^figure: (.*)$"
    packages: Sequence[str] = ()
    proof: str = ""

    def missing(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]

    def figures(self, printed: str) -> str:
        """
        >>> Part("", "", 1, [], r"median (\\d+) of (\\d+)").figures("median 3 of 5\\nmedian 4 of 5")
        '3 5; 4 5'
        """
        found = re.finditer(self.figure, printed, re.MULTILINE)
        return "; ".join(" ".join(filter(None, match.groups())) for match in found)


def python() -> str:
    """The interpreter of all parts: this one."""
    return sys.executable


def parts(work: Path, device: str, small: bool, model: Path | None) -> list[Part]:
    """The parts on this device, at their full size or at one that a CPU finishes in a minute each.

    Args:
        work: a folder for what the parts write.
        model: a folder with a config and a tokenizer of Qwen2.5-0.5B's kind; None: those that shape.py makes.
    """
    big, tiny = model or work / "shape", work / "tiny"
    there = ["--device", device, "--eval_problems", "0"]
    sizes = ["--prompts_per_step", "2", "--group_size", "4", "--max_completion_tokens", "8"] if small else []
    task = ["--task", "arithmetic", "--difficulty", "8"]
    if model is None:  # whose tokenizer has few words: with these, prompts have GSM8K's length, about 100 tokens
        task += ["--system_prompt", "Think about it step by step."]
    shape = ["--model", str(big), "--from_scratch", *task, *there, *sizes]
    embedded = ["-m", "grpo_core.train", "--device", device, "--overwrite", "--output_dir", str(work / "embedded")]
    gain = ["-m", "benchmarks.sitting.gain", str(work / "embedded")]
    few = ["--preset", "tiny", "--max_steps", "4", "--eval_problems", "16"]
    begun = ["-m", "sft_core.train", *few, "--device", device, "--overwrite", "--output_dir", str(work / "sft")]
    few = [*few, "--model", str(work / "sft" / "final"), *sizes]
    pairs, lengths = ("2", "8,16") if small else ("10", "64,256,512")
    trl, timed = ["-m", "benchmarks.compare_trl", "--speed"], ["-m", "benchmarks.step_time"]
    one_rank = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return [
        Part(
            "tests",
            "the tests marked gpu",
            300,
            # Warnings of other versions are no failures here, and pytest's plugins may be missing.
            [["-m", "pytest", "-o", "addopts=", "-o", "filterwarnings=", "-m", "gpu", "-rs", "tests/test_gpu.py"]],
            r"^=+ (.*\d+ (?:passed|failed|skipped|error).*?) =+$",
            ("pytest", "hypothesis"),
            "passed",
        ),
        Part(
            "t4",
            "the t4 preset's steps in fp16 with a T4's 15 GiB",
            300,
            [["-m", "benchmarks.sitting.t4", "--steps", "2" if small else "3", *shape]],
        ),
        Part(
            "embedded",
            "the first command of README: does it learn on this device, too?",
            480,
            [begun, [*embedded, *few], [*gain, "-100"]] if small else [embedded, [*gain, "20"]],
            packages=("tensorboard",),
        ),
        Part(
            "trl",
            "how many times as fast as TRL a step is, 0.5B shape and t4 preset",
            480,
            [
                [*trl, "qwen-0.5b", "--steps", pairs, *shape],
                [*trl, "t4", "--steps", "1" if small else "3", "--warm_up", "1", *shape],
            ],
            r"^# (Speed: `.*`)|(median) \*\*([\d.]+)\*\*.*(Peak memory): \*\*([\d.]+)\*\* of TRL",
            ("trl", "datasets"),
        ),
        Part(
            "plan",
            "the planner's forecast of memory over real peaks",
            480,
            [["-m", "benchmarks.plan", "--check", *shape]],
            r"^\| (?!configuration|---)(.*?)(?:,.*?)? \| .* GB \| .* GB \| ([\d.]+) \|",
            ("peft",),
        ),
        Part(
            "resume",
            "a run that is killed and resumed, beside one that nobody disturbed: equal to the bit?",
            300,
            [["-m", "benchmarks.sitting.resume", str(work / "resume"), "--model", str(tiny), *there, *sizes]],
        ),
        Part(
            "decode",
            "milliseconds a token in different ways of decoding",
            300,
            [["-m", "benchmarks.sitting.decode", "--tokens", "16" if small else "128", *shape]],
        ),
        Part(
            "lengths",
            "seconds a step of sampler and learner, by the completions' length in tokens",
            480,
            [[*timed, "qwen-0.5b", "--lengths", lengths, "--steps", "2", "--warm_up", "1", *shape]],
            r"^\| (\d+) \| \d+ \| ([\d.e+-]+ s).*? \| ([\d.e+-]+ s)",
        ),
        Part(
            "nccl",
            "what ranks exchange, over NCCL on one GPU",
            120,
            [[*one_rank, "-m", "benchmarks.sitting.collectives", device]],
        ),
    ]
