"""TRL's side: the real `GRPOTrainer.train()`, held up before each step until its turn comes."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer

from benchmarks.memory import peak_bytes
from benchmarks.parity.theirs import arguments
from grpo_core.config import GRPOConfig
from grpo_core.job import GRPOJob, prepare
from rewards import score
from sft_core.learn.clock import now
from sft_core.model.allocator import keep_freed_memory
from sft_core.model.policy import load_tokenizer
from sft_core.precision import pick_device, pick_precision
from sft_core.text.prompts import prompt_messages

# Completions, their tokens, what they earned, the right answers.
Sampled = Callable[[list[str], list[list[int]], list[float], list[str]], None]


class Turns(TrainerCallback):  # type: ignore[misc]
    """Waits before each step for a message, and answers it after the step with what that took."""

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self.connection, self.device = connection, device
        self.seen: dict[str, Any] = {}

    def sampled(self, completions: list[str], ids: list[list[int]], rewards: list[float], answers: list[str]) -> None:
        self.seen["tokens"] = sum(map(len, ids))
        self.seen["reward"] = sum(rewards) / len(rewards)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.connection.recv() is None:
            raise KeyboardInterrupt  # the trainer has no other way out before its step
        self.began = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = now(self.device) - self.began
        self.connection.send({"seconds": seconds, **self.seen, "peak_bytes": peak_bytes(self.device)})


def serve(connection: Connection, config: GRPOConfig, threads: int, same_allocator: bool) -> None:
    """A step for each message, answered with what it took; an end for None."""
    warnings.simplefilter("ignore")
    for name in ("trl", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    if same_allocator:
        keep_freed_memory()
    job = prepare(config)
    turns = Turns(connection, pick_device(config.device))
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(job, output, turns.sampled)
        trainer.add_callback(turns)
        with_timer(trainer, turns)
        connection.send({"ready": True})
        try:
            trainer.train()
        except KeyboardInterrupt:
            return


def trainer_of(job: GRPOJob, output: str, sampled: Sampled, **more: Any) -> GRPOTrainer:
    """TRL's trainer with the settings of this project's job. `sampled` is told of each batch of completions; `more` are
    TRL's own arguments."""
    config = job.config
    rows = config.prompts_per_step * config.group_size
    own = {
        **arguments(config, accumulation=-(-rows // config.micro_batch)),
        **_like(config, pick_device(config.device)),
        "output_dir": output,
        "max_steps": config.max_steps,
        "warmup_steps": round(config.warmup_ratio * config.max_steps),
        "seed": config.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10**6,
        "disable_tqdm": True,
        "shuffle_dataset": False,  # the problems come in this project's order
    }
    trainer = GRPOTrainer(
        model=config.model,
        processing_class=load_tokenizer(job.source),
        reward_funcs=[_reward(job, sampled)],
        train_dataset=_dataset(job),
        args=TRLConfig(**own | more),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _like(config: GRPOConfig, device: torch.device) -> dict[str, Any]:
    """Precision and checkpointing as this project's side has them: float32 masters under autocast."""
    dtype = pick_precision(config.precision, device).autocast_dtype
    return {
        "reward_weights": None,  # the one reward function is this project's weighted sum
        "use_cpu": device.type == "cpu",
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "model_init_kwargs": {"dtype": "float32"},
        "top_k": config.top_k,
        "top_p": config.top_p,
    }


def _dataset(job: GRPOJob) -> Dataset:
    """The problems that this project's side meets, in its order."""
    config, tokenizer = job.config, load_tokenizer(job.source)
    examples = job.task.draw(0, config.max_steps * config.prompts_per_step, config.seed)
    prompts = [
        tokenizer.apply_chat_template(
            prompt_messages(example, config), add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        for example in examples
    ]
    columns = {name: [getattr(e, name) for e in examples] for name in ("question", "answer", "solution")}
    return Dataset.from_dict({"prompt": prompts, **columns})


def _reward(job: GRPOJob, sampled: Sampled) -> Any:
    """This project's weighted sum of rewards as one TRL reward function, which also tells what was sampled."""

    def total(prompts: Any, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        known = {name: columns[name] for name in ("question", "answer", "solution")}
        known["completion_ids"] = completion_ids
        known["max_completion_tokens"] = [job.config.max_completion_tokens] * len(completions)
        totals = score(job.rewards, known["question"], completions, known).total
        sampled(completions, completion_ids, list(totals), known["answer"])
        return list(totals)

    return total


def with_timer(trainer: GRPOTrainer, turns: Turns) -> None:
    """Note how long sampling takes."""
    generate = trainer._generate_single_turn

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = now(turns.device)
        out = generate(*args, **kwargs)
        turns.seen["generation_seconds"] = now(turns.device) - began
        return out

    trainer._generate_single_turn = timed
