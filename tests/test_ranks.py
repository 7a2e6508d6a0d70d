"""N ranks do what one does: the same completions, gradients, weights and log, whatever the setting."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eval.trust import trusted
from grpo_core.dynamic import replacing_equal_groups
from grpo_core.metrics import step_record
from grpo_core.step import Learner, grpo_step, sample_and_score
from rewards import Reward
from sft_core.learn import ranks
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.run.joined import joined, meet
from sft_core.text.example import Example
from tests.faulty import FORKS
from tests.helpers import PEFT_IS_BEHIND, adapted, ends_often, grpo_config, learner, tiny_policy
from tests.together import together

pytestmark = [FORKS, pytest.mark.filterwarnings(PEFT_IS_BEHIND)]

WORLDS = (2, 4)
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


def parts_for(name: str, dtype: torch.dtype) -> Learner:
    """All that a step works with, and further prompts for --dynamic_sampling."""
    config = grpo_config(prompts_per_step=B, micro_batch=4, lr=1e-2)
    config = replace(config, **{key: value for key, value in SETTINGS[name].items() if key != "share_prompts"})
    parts = learner(policy_for(name, dtype), config)
    more = iter(range(1000))

    def further(count: int) -> list[Example]:
        return [Example(f"Tom has {next(more)} apples. How many?", "#### 7", "7") for _ in range(count)]

    roll_out = replacing_equal_groups(further) if config.dynamic_sampling else sample_and_score
    rewards = [Reward("by_length", by_length), Reward("by_letters", by_letters, 0.5)]
    return replace(parts, rewards=rewards, roll_out=roll_out)


def found(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a few steps of this setting come to."""
    parts, gradients = parts_for(name, dtype), list[dict[str, Tensor]]()
    optimizer, policy = parts.optimizer, parts.policy
    clip_and_step = optimizer.clip_and_step

    def caught() -> tuple[float, bool]:
        gradients.append({name: p.grad.clone() for name, p in policy.trainable()})
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
        "weights": {name: p.detach().clone() for name, p in policy.trainable()},
        "random": torch.get_rng_state(),
    }


def save_all_found(folder: Path, dtype: torch.dtype) -> None:
    """Save what this rank finds of each setting."""
    with joined():
        meet(60)
        result = {name: found(name, dtype) for name in SETTINGS}
        torch.save(result, folder / f"{ranks.rank()}.pt")


def largest(these: dict[str, Tensor], those: dict[str, Tensor]) -> float:
    """The largest difference, over the largest number."""
    off = max(float((these[name] - those[name]).abs().max()) for name in those)
    return off / max(float(tensor.abs().max()) for tensor in those.values())


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: found(name, torch.float64) for name in SETTINGS}


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_do_what_one_process_does(world: int, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    codes = together(world, partial(save_all_found, tmp_path, torch.float64), tmp_path)
    assert codes == [0] * world, (tmp_path / "0.err").read_text()
    of_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for name, expected in alone.items():
        for these in (result[name] for result in of_rank):
            for exact in ("texts", "ids", "scores"):
                assert these[exact] == expected[exact], name
            assert torch.equal(these["advantages"], expected["advantages"]), name
            assert torch.equal(these["random"], expected["random"]), name
            for gradient, its in zip(these["gradients"], expected["gradients"], strict=True):
                assert largest(gradient, its) < 1e-12, name
            # AdamW divides a gradient by its own size, so rounding counts for more where that is small.
            assert largest(these["weights"], expected["weights"]) < 1e-10, name
            for line, its in zip(these["log"], expected["log"], strict=True):
                assert line == pytest.approx(its, rel=1e-6, abs=1e-6), name  # the sampler's part is float32


# --- what goes wrong on one rank


def in_ranks(world: int, check: Callable[[], None], folder: Path) -> None:
    """`check` in so many ranks; an assertion that fails in one fails here."""

    def program() -> None:
        with joined():
            meet(60)
            check()

    codes = together(world, program, folder)
    assert codes == [0] * world, "".join((folder / f"{rank}.err").read_text() for rank in range(world))


ROWS = pack_rows([[5, 6]] * 6, [[7, 8, 2]] * 6, pad_id=0)  # three for each of two ranks


def optimizer_of(precision: Literal["float32", "fp16"] = "float32") -> Optimizer:
    return Optimizer(tiny_policy(precision=precision), grpo_config(micro_batch=3), 10)


def learning(optimizer: Optimizer, factor: Callable[[int], float] = lambda row: 1.0) -> Callable[[slice, Rows], int]:
    """A loss whose gradient is the sum of the rows' factors in each weight."""

    def learn(at: slice, micro: Rows) -> int:
        total = sum(p.sum() for p in optimizer.parameters)
        optimizer.backward(torch.as_tensor(total * sum(map(factor, range(at.start, at.stop)))))
        return at.start

    return learn


def test_a_row_that_is_not_finite_on_one_rank_is_skipped_and_named_by_all(tmp_path: Path) -> None:
    def check() -> None:
        optimizer = optimizer_of()
        before = [p.detach().clone() for p in optimizer.parameters]
        optimizer.accumulate(ROWS, learning(optimizer, lambda row: math.nan if row == 4 else 1.0))
        assert optimizer.clip_and_step()[1] is False
        assert (optimizer.skipped, optimizer.skipped_rows) == (1, [4])
        assert all(map(torch.equal, before, optimizer.parameters))

    in_ranks(2, check, tmp_path)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    """Though its gradient is: the loss of rank 1 is infinite by a constant."""

    def check() -> None:
        optimizer = optimizer_of()

        def learn(at: slice, micro: Rows) -> None:
            loss = torch.stack([p.sum() for p in optimizer.parameters]).sum()
            optimizer.backward(loss + math.inf * ranks.rank() if ranks.rank() else loss)

        optimizer.accumulate(ROWS, learn)
        optimizer.clip_and_step()
        assert optimizer.skipped == 1

    in_ranks(2, check, tmp_path)


def test_memory_that_runs_out_on_one_rank_changes_no_gradient_and_no_other_rank(tmp_path: Path) -> None:
    def check() -> None:
        optimizer = optimizer_of()
        learn = learning(optimizer, float)

        def learn_little(at: slice, micro: Rows) -> int:
            if ranks.rank() == 1 and len(micro) > 1:
                raise torch.OutOfMemoryError("too much")
            return learn(at, micro)

        assert optimizer.accumulate(ROWS, learn_little) == [0, 3, 4, 5]  # where micro-batches began, in order
        assert all((p.grad == sum(range(6))).all() for p in optimizer.parameters)
        assert optimizer.micro_batch == (3, 1)[ranks.rank()]

    in_ranks(2, check, tmp_path)


def test_a_weight_that_no_rank_has_used_is_left_alone_and_one_that_a_rank_has_used_is_not(tmp_path: Path) -> None:
    """A gradient of zeros would have AdamW decay the weight."""

    def check() -> None:
        optimizer = optimizer_of()
        first, second, *others = optimizer.parameters

        def learn(at: slice, micro: Rows) -> None:
            optimizer.backward((first.sum() if ranks.rank() else first.sum() + second.sum()) * len(micro))

        optimizer.accumulate(ROWS, learn)
        assert (first.grad == 6).all() and (second.grad == 3).all()
        assert all(parameter.grad is None for parameter in others)

    in_ranks(2, check, tmp_path)


def test_a_gradient_that_overflows_on_one_rank_halves_the_loss_scale_of_all(tmp_path: Path) -> None:
    def check() -> None:
        optimizer = optimizer_of("fp16")
        scale = optimizer.scaler.get_scale()
        optimizer.accumulate(ROWS, learning(optimizer, lambda row: 1e38 if row == 4 else 1.0))
        assert optimizer.clip_and_step()[1] is True
        assert optimizer.scaler.get_scale() == scale / 2

    in_ranks(2, check, tmp_path)


def test_whatever_rewards_draw_all_ranks_go_on_with_one_random_state(tmp_path: Path) -> None:
    def lucky(completions: list[str], **columns: Any) -> list[float]:
        return [random.random() + float(torch.rand(())) for _ in completions]

    def check() -> None:
        parts = replace(parts_for("dapo", torch.float32), rewards=[Reward("lucky", lucky)])
        torch.manual_seed(SEED)
        grpo_step(parts, EXAMPLES)
        mine = (random.getstate(), torch.get_rng_state().tolist(), [p.tolist() for p in parts.optimizer.parameters])
        assert all(theirs == mine for theirs in ranks.gathered(mine, "test"))

    in_ranks(2, check, tmp_path)


def test_what_is_tried_at_loading_waits_for_no_other_rank(tmp_path: Path) -> None:
    """Where a shortcut fails on one machine alone, that rank tries one way more."""

    def check() -> None:
        calls = ranks.here.calls
        trusted(tiny_policy())
        assert ranks.here.calls == calls

    in_ranks(2, check, tmp_path)


def test_a_rank_alone_does_all_of_the_work(tmp_path: Path) -> None:
    def check() -> None:
        with ranks.alone():
            assert (ranks.rank(), ranks.world(), list(ranks.share(3))) == (0, 1, [0, 1, 2])
            assert ranks.gathered(5, "test") == [5]
        assert (ranks.world(), ranks.gathered(ranks.rank(), "test")) == (2, [0, 1])

    in_ranks(2, check, tmp_path)


def test_without_torchrun_there_is_one_rank() -> None:
    number = torch.tensor(3.0)
    assert (ranks.rank(), ranks.world(), ranks.first(), ranks.beside()) == (0, 1, True, 1)
    assert ranks.whole(number, "test") is number
    assert ranks.by_first(lambda: 4, "test") == 4 and ranks.times(1.0, 0.5) == {}


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=24), st.integers(1, 8))
def test_parts_are_all_rows_once_none_empty_and_about_equal(lengths: list[tuple[int, int]], count: int) -> None:
    rows = pack_rows([[1] * p for p, _ in lengths], [[2] * t for _, t in lengths], pad_id=0)
    parts = [rows.part(number, count) for number in range(count)]
    assert [row for part in parts for row in part] == list(range(len(rows)))
    if len(rows) >= count:
        tokens = rows.tokens(False)
        sizes = [tokens(part.start, part.stop) for part in parts]
        longest = max(p + t for p, t in lengths)
        assert min(map(len, parts)) >= 1
        # Each end is the nearest to where it should be, but for parts that would be empty.
        assert max(sizes) <= tokens(0, len(rows)) / count + count * longest
