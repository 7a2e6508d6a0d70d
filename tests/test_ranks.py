"""N ranks do what one does: the same completions, gradients, weights and log, whatever the setting."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core.dynamic import replacing_equal_groups
from grpo_core.metrics import step_record
from grpo_core.step import Learner, grpo_step, sample_and_score
from rewards import Reward
from sft_core.learn import ranks
from sft_core.learn.shards import whole
from sft_core.model.policy import Policy
from sft_core.run.joined import joined, meet
from sft_core.text.example import Example
from tests.faulty import FORKS
from tests.helpers import PEFT_IS_BEHIND, adapted, ends_often, grpo_config, learner, tiny_policy
from tests.together import together

pytestmark = [FORKS, pytest.mark.filterwarnings(PEFT_IS_BEHIND)]

B, STEPS, SEED = 5, 2, 3  # 5 prompts: no number of ranks divides them
QUESTIONS = [
    "Tom has 3 apples. Tom buys 4. How many?",
    "Sue has 9 pens. Sue loses 1. Sue finds 2. How many pens does Sue have now?",
    "Leo has 2 cups. How many?",
    "Mia has 8 cards. Mia gets 4. Mia sells 5. How many cards?",
    "Ann has 5 cards. Ann sells 5. Ann buys 6. Ann finds 1. How many cards does Ann have now?",
]
EXAMPLES = [Example(question, "#### 7", "7") for question in QUESTIONS]

SETTINGS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "mu 2 with KL": {"mu": 2, "beta": 0.04},
    "a micro-batch for each row": {"micro_batch": 1},
    "micro-batches by tokens": {"micro_batch": 0},
    "grpo, scaled by the batch": {"loss": "grpo", "scale_rewards": "batch"},
    "dr_grpo, not scaled": {"loss": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss": "gspo", "mu": 2},
    "luspo": {"loss": "luspo"},
    "cispo": {"loss": "cispo", "mu": 2},
    "gdpo": {"reward_aggregation": "normalize_then_sum"},
    "dynamic sampling": {"dynamic_sampling": 2},
    "top entropy": {"top_entropy": 0.3},
    "entropy bonus": {"entropy_coef": 0.1},
    "mask truncated": {"mask_truncated": True},
    "shuffled rewards": {"shuffle_rewards": True},
    "rows apart": {"share_prompts": False},
    "a reference that moves": {"beta": 0.04, "ref_sync_every": 1},
    "LoRA": {"beta": 0.04, "mu": 2},
}


def by_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Some groups of a few completions are of equal rewards."""
    return [float(len(text) % 3) for text in completions]


def by_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if not text else sum(map(ord, text)) % 5 / 4 for text in completions]


def policy_for(name: str, dtype: torch.dtype) -> Policy:
    policy = ends_often(tiny_policy(dtype=dtype, initializer_range=0.2))
    if name == "LoRA":
        return adapted(policy)
    return replace(policy, layout="rows", prefill=False) if name == "rows apart" else policy


def parts_for(name: str, dtype: torch.dtype, parallel: str = "ddp") -> Learner:
    """All that a step works with, and further prompts for --dynamic_sampling."""
    config = grpo_config(prompts_per_step=B, micro_batch=4, lr=1e-2, parallel=parallel)
    config = replace(config, **SETTINGS[name])
    parts = learner(policy_for(name, dtype), config)
    more = iter(range(1000))

    def further(count: int) -> list[Example]:
        return [Example(f"Tom has {next(more)} apples. How many?", "#### 7", "7") for _ in range(count)]

    roll_out = replacing_equal_groups(further) if config.dynamic_sampling else sample_and_score
    rewards = [Reward("by_length", by_length), Reward("by_letters", by_letters, 0.5)]
    return replace(parts, rewards=rewards, roll_out=roll_out)


def found(name: str, dtype: torch.dtype, parallel: str = "ddp") -> dict[str, Any]:
    """What a few steps of this setting come to."""
    parts, gradients = parts_for(name, dtype, parallel), list[dict[str, Tensor]]()
    optimizer, policy = parts.optimizer, parts.policy
    clip_and_step = optimizer.clip_and_step

    def caught() -> tuple[float, bool]:
        gradients.append({name: whole(p.grad).clone() for name, p in policy.trainable()})
        return clip_and_step()

    optimizer.clip_and_step = caught  # type: ignore[method-assign]
    torch.manual_seed(SEED)
    reports = [grpo_step(parts, EXAMPLES) for _ in range(STEPS)]
    records = [step_record(report) for report in reports]
    return {
        "texts": [report.rollout.samples.texts for report in reports],
        "ids": [report.rollout.samples.rows.completion_ids() for report in reports],
        "scores": [report.rollout.scores.by_function for report in reports],
        "advantages": torch.stack([report.advantage_BG for report in reports]),
        "log": [{key: value for key, value in record.items() if not key.endswith("_s")} for record in records],
        "gradients": gradients,
        "weights": {name: whole(p.detach()).clone() for name, p in policy.trainable()},
        "random": torch.get_rng_state(),
    }


def save_all_found(folder: Path, parallel: str) -> None:
    """Save what this rank finds of each setting."""
    with joined():
        meet(60)
        result = {name: found(name, torch.float64, parallel) for name in SETTINGS}
        torch.save(result, folder / f"{ranks.rank()}.pt")


def largest(these: dict[str, Tensor], those: dict[str, Tensor]) -> float:
    """The largest difference, over the largest number."""
    off = max(float((these[name] - those[name]).abs().max()) for name in those)
    return off / max(float(tensor.abs().max()) for tensor in those.values())


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: found(name, torch.float64) for name in SETTINGS}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_what_one_process_does(world: int, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    check(world, "ddp", alone, tmp_path)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_parts_of_the_weights_do_too(world: int, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    check(world, "fsdp", alone, tmp_path)


def check(world: int, parallel: str, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    codes = together(world, partial(save_all_found, tmp_path, parallel), tmp_path)
    assert codes == [0] * world, (tmp_path / "0.err").read_text()
    of_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    # With torch 2.8 AdamW steps of parts are 1e-7 off; the first gradient comes before any.
    rounds = parallel == "fsdp" and torch.__version__.startswith("2.8.")
    for name, expected in alone.items():
        for these in (result[name] for result in of_rank):
            for exact in ("texts", "ids", "scores"):
                assert these[exact] == expected[exact], name
            assert torch.equal(these["advantages"], expected["advantages"]), name
            assert torch.equal(these["random"], expected["random"]), name
            for update, (gradient, its) in enumerate(zip(these["gradients"], expected["gradients"], strict=True)):
                assert largest(gradient, its) < (1e-6 if rounds and update else 1e-12), name
            # AdamW divides a gradient by its own size, so rounding counts for more where that is small.
            assert largest(these["weights"], expected["weights"]) < (1e-5 if rounds else 1e-10), name
            for line, its in zip(these["log"], expected["log"], strict=True):
                assert line == pytest.approx(its, rel=1e-6, abs=1e-6), name  # the sampler's part is float32
