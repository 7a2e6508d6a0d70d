"""Runs that go wrong, each for one reason: what the doctor (`python -m grpo_core.doctor`) is tested on.

    python -m tests.sick.record                    record every run again (ten minutes on one CPU core)
    python -m tests.sick.record kl_explodes ...    only these
    python -m tests.sick.record --list             the command of each

Each run is a real one, of the built-in model after its SFT, with the flags below. A folder keeps what the doctor reads:
config.yaml, with the last component of an absolute path alone; log.jsonl, without clocks and with numbers rounded to
six digits; and of completions.jsonl, where it is kept, the first rows of each step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import grpo_core.step
import grpo_core.train
import sft_core.train
from grpo_core.config import GRPOConfig
from grpo_core.warmstart import tiny_sft
from sft_core.cli import parse_config
from sft_core.learn.optim import Optimizer
from sft_core.text.arithmetic import ArithmeticStream

HERE = Path(__file__).parent
SMALL = "--preset tiny --prompts_per_step 8 --group_size 8 --eval_problems 128 --eval_every 0 --show_every 0"
FEW = "--model {sft} --task {few} --eval_problems 0 --prompts_per_step 4"
UNREAD = (
    "timestamp_iso",
    "epoch",
    "device",
    "seed",
    "tokens_generated",
    "replaced_groups",
    "adv_mean",
    "seconds",
    "tokens",
)


# --- rewards that can be earned without an answer


def even_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Pays for an even last digit."""
    return [float(text.strip()[-1:] in tuple("02468")) for text in completions]


def tag_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Pays for the mark of an answer."""
    return [float("####" in text) for text in completions]


def seven_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Pays for each 7."""
    return [text.count("7") / 10 for text in completions]


# --- code that is broken


def sampled_hotter() -> Any:
    """The sampler's temperature is not the learner's."""
    sample = grpo_core.step.sample
    return mock.patch.object(
        grpo_core.step,
        "sample",
        lambda policy, prompts, sampling: sample(policy, prompts, replace(sampling, temperature=1.5)),
    )


def old_logprobs_in_bf16() -> Any:
    """What the ratio is taken to has been kept in half precision."""
    ratio = grpo_core.step.importance_ratio
    return mock.patch.object(
        grpo_core.step,
        "importance_ratio",
        lambda logp_NT, old_logp_NT, mask_NT, level: ratio(logp_NT, old_logp_NT.bfloat16().float(), mask_NT, level),
    )


def gradients_not_finite() -> Any:
    """Three steps in four have a NaN in their loss."""
    backward, calls = Optimizer.backward, iter(range(10**6))
    return mock.patch.object(
        Optimizer, "backward", lambda self, loss: backward(self, loss * (float("nan") if next(calls) % 4 else 1))
    )


@dataclass(frozen=True)
class Case:
    """`flags` behind those of SMALL; {sft}, {better} and {few} stand for what is prepared below."""

    flags: str
    fault: Callable[[], Any] = contextlib.nullcontext
    completions: int = 0  # rows of each step that are kept
    sft: bool = False

    @property
    def all_flags(self) -> str:
        return self.flags if self.sft else f"{SMALL} {self.flags}"


CASES = {
    "healthy": Case("--prompts_per_step 16 --max_steps 60 --eval_every 20 --log_every 2"),
    "healthy_mu2_beta": Case("--max_steps 40 --mu 2 --beta 0.04 --lr 2e-5 --log_every 2"),
    "too_short": Case("--max_steps 3"),
    "shuffled_rewards": Case("--max_steps 30 --shuffle_rewards"),
    "everything_truncated": Case("--max_steps 12 --max_completion_tokens 2", completions=2),
    "never_rewarded": Case("--max_steps 12 --rewards correctness_reward_func int_reward_func", completions=2),
    "format_never_earned": Case(
        "--model {sft} --prompt_format xml --max_steps 12 --rewards correctness_reward_func soft_format_reward_func",
        completions=2,
    ),
    "dead_reward": Case("--max_steps 20 --rewards numeric_reward_func strict_format_reward_func"),
    "saturated_reward": Case("--max_steps 20 --rewards numeric_reward_func tests.sick.record:tag_reward"),
    "too_easy": Case(f"{FEW} --model {{better}} --temperature 0.7 --lr 1e-6 --max_steps 15"),
    "too_hard": Case("--model {sft} --difficulty 8 --temperature 0.2 --group_size 4 --max_steps 20"),
    "lr_too_high": Case("--lr 3e-3 --max_steps 30"),
    "lr_too_low": Case("--lr 1e-9 --max_steps 30"),
    "entropy_collapse": Case("--temperature 0.5 --lr 5e-5 --max_steps 60 --eval_every 20 --log_every 2"),
    "kl_explodes": Case(
        "--lr 1e-4 --beta 0.0001 --max_steps 60 --log_every 2 --rewards tests.sick.record:seven_reward"
    ),
    "clipped": Case("--lr 1e-3 --mu 8 --max_steps 20"),
    "sampler_gap": Case("--max_steps 15", fault=sampled_hotter),
    "first_ratio": Case("--max_steps 15", fault=old_logprobs_in_bf16),
    "skipped_steps": Case("--max_steps 20", fault=gradients_not_finite),
    "reward_hacking": Case(
        "--lr 1e-4 --max_steps 40 --log_every 2 --rewards numeric_reward_func tests.sick.record:even_reward"
        " --reward_weights 0.2 1"
    ),
    "length_to_budget": Case("--lr 1e-4 --max_steps 60 --log_every 2 --rewards tests.sick.record:seven_reward"),
    "heldout_falls": Case(
        f"{FEW} --eval_file {{few_heldout}} --eval_problems 256 --lr 1e-4 --max_steps 60 --eval_every 20 --log_every 2"
    ),
    "sft_healthy": Case("--preset tiny --max_steps 200 --log_every 10 --eval_problems 64", sft=True),
    "sft_lr_too_high": Case("--preset tiny --lr 1 --max_steps 60 --log_every 2 --eval_problems 64", sft=True),
    "sft_loss_flat": Case("--preset tiny --lr 1e-8 --max_steps 40 --log_every 2 --eval_problems 64", sft=True),
}


def prepared(flags: str, scratch: Path) -> list[str]:
    """The flags with the models and files that they name, made where they are missing."""
    given: dict[str, Any] = {}
    if "{sft}" in flags or "{better}" in flags:
        given["sft"] = tiny_sft(
            parse_config(GRPOConfig, [*SMALL.split(), "--output_dir", str(scratch / "none")], grpo_core.train.PRESETS)
        )
    if "{better}" in flags:
        given["better"] = scratch / "better" / "final"
        if not given["better"].is_dir():
            run(f"{SMALL} {FEW} --lr 1e-4 --max_steps 100", scratch / "better")
    for name, split, count in (("few_heldout", "heldout", 256), ("few", "train", 8)):
        if f"{{{name}}}" in flags:
            given[name], stream = scratch / f"{name}.jsonl", ArithmeticStream(split, seed=0, difficulty=4)  # type: ignore
            given[name].write_text("".join(json.dumps(stream[i]) + "\n" for i in range(count)))
    return flags.format(**given).split()


def run(flags: str, folder: Path, module: Any = grpo_core.train) -> None:
    scratch = folder.parent
    module.main([*prepared(flags, scratch), "--no_progress", "--no_tensorboard", "--output_dir", str(folder)])


def command(case: Case) -> str:
    """What a person would type."""
    module, fault = "sft_core.train" if case.sft else "grpo_core.train", ""
    if case.fault is not contextlib.nullcontext:
        fault = f"    (with {case.fault.__name__})"
    return f"python -m {module} {case.all_flags}{fault}"


def record(name: str, scratch: Path) -> None:
    """Run a case and keep what the doctor reads of it."""
    case, folder, kept = CASES[name], scratch / name, HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    with case.fault(), contextlib.suppress(FloatingPointError):
        run(case.all_flags, folder, sft_core.train if case.sft else grpo_core.train)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config = {key: Path(value).name if str(value).startswith("/") else value for key, value in config.items()}
    (kept / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write(kept / "log.jsonl", read(folder / "log.jsonl"))
    if case.completions:
        rows: dict[int, list[Any]] = {}
        for row in read(folder / "completions.jsonl"):
            rows.setdefault(row["step"], []).append(row)
        write(kept / "completions.jsonl", (row for step in rows.values() for row in step[: case.completions]))


def read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        values = json.loads(line, parse_float=lambda text: float(f"{float(text):.6g}"))
        yield {
            key: value
            for key, value in values.items()
            if key not in UNREAD and not key.endswith("_time_s") and not key.startswith(("time_", "ended_"))
        }


def write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--scratch", type=Path, help="where whole runs are made; default: a folder of no name")
    parser.add_argument("--list", action="store_true", help="print each run's command")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{name}: {command(case)}" for name, case in CASES.items()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.names or CASES:
            record(name, (given.scratch or Path(temporary)).resolve())


if __name__ == "__main__":
    main()
