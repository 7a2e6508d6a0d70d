"""The forecast of benchmarks.plan beside the measured peak of real runs, a process for each."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from benchmarks.memory import outside_bytes, peak_bytes
from benchmarks.plan.question import question_of
from benchmarks.workload import Steps, workload
from grpo_core.config import GRPOConfig
from rewards.tables import markdown
from sft_core.learn.footprint import GB
from sft_core.run.provenance import as_line, provenance

STEPS = 2  # AdamW's moments appear in the first; the second is the peak
FOLDER = "FOLDER"  # in CASES: an empty one, made for the run
MEDIUM = ["num_hidden_layers=6", "hidden_size=512", "intermediate_size=2048", "num_attention_heads=8"]

# Flags of the qwen-0.5b workload that make its memory up of different things.
CASES: dict[str, list[str]] = {
    "full fine-tuning, bf16, reference": [],
    "moments on disk": ["--offload_optimizer", FOLDER],
    "LoRA, no reference": ["--lora", "--beta", "0"],
    "6 layers, float32, no checkpointing, micro-batches of 4": [
        *["--config_overrides", *MEDIUM, "--precision", "float32"],
        *["--gradient_checkpointing", "False", "--micro_batch", "4", "--beta", "0"],
    ],
    "LoRA, no reference, freed memory given back": ["--lora", "--beta", "0", "--keep_freed_memory", "False"],
}

Measured = dict[str, float]  # peak_bytes, prompt and completion tokens (the longest)


def check(flags: Sequence[str], steps: int = STEPS) -> str:
    """Every case run for a few steps and forecast with the lengths that it had, as Markdown. About a minute a case."""
    memory = [["configuration", "forecast", "measured", "forecast / measured", "the peak is in"]]
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = workload("qwen-0.5b", [*(folder if word == FOLDER else word for word in case), *flags])
            found = run(config, steps)
            question = question_of(config, "this", int(found["prompt"]), int(found["completion"]))
            forecast = question.plan
        ratio = forecast.peak / found["peak_bytes"]
        row = [f"{forecast.peak / GB:.2f} GB", f"{found['peak_bytes'] / GB:.2f} GB", f"{ratio:.2f}", forecast.worst]
        memory.append([name, *row])
        print(f"{name}: {row}", file=sys.stderr)
    about = provenance(seed=None)
    commands = "\n".join(f"- {name}: `{' '.join(case)}`" for name, case in CASES.items() if case)
    return "\n\n".join(
        [
            f"{steps} steps of the qwen-0.5b workload a case, in a process of its own; peak: the resident "
            "set's, on CUDA the allocator's and the context.",
            as_line(about),
            markdown(memory),
            commands,
        ]
    )


def run(config: GRPOConfig, steps: int) -> Measured:
    """A few steps in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, config, steps, torch.get_num_threads()))
    process.start()
    there.close()  # so that a process that dies is the end of the pipe
    try:
        return here.recv()
    finally:
        process.join()


def _serve(connection: Connection, config: GRPOConfig, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    taken = Steps.of(config)
    prompt = completion = 0
    for _ in range(steps):
        report = taken()
        rows = report.rollout.samples.rows
        prompt = max(prompt, int(rows.prompt_len_N.max()))
        completion = max(completion, int(rows.completion_len_N.max()))
    device = taken.learner.policy.device
    peak = peak_bytes(device) + outside_bytes(device)
    connection.send({"peak_bytes": peak, "prompt": prompt, "completion": completion})
