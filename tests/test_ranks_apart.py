"""What happens on one rank alone, and what the ranks make of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.trust import trusted
from grpo_core.step import grpo_step
from rewards import Reward
from sft_core.learn import ranks
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows, pack_rows
from sft_core.run.joined import joined, meet
from tests.faulty import FORKS
from tests.helpers import grpo_config, tiny_policy
from tests.test_ranks import EXAMPLES, SEED, parts_for
from tests.together import together

pytestmark = FORKS


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
