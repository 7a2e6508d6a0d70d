"""The models that the atlas's runs start from, and its rewards."""

from __future__ import annotations

import doctest
import random
from collections import Counter
from typing import Any

import pytest

from benchmarks.atlas import rewards, starts
from rewards import extract_hash_answer
from sft_core.text.arithmetic import ArithmeticStream


def test_a_rambling_solution_copies_its_lines_and_ends_in_their_result() -> None:
    stream = ArithmeticStream("train", 0, 4)
    copies: Counter[int] = Counter()
    for index in range(400):
        solution = stream[index]["answer"]
        *lines, answer = starts.rambling(solution, random.Random(index)).splitlines()
        steps = solution.count("\n")
        assert lines == lines[:steps] * (len(lines) // steps)
        assert lines[-1].endswith(f">>{extract_hash_answer(answer)}")
        copies[len(lines) // steps - 1] += 1
    assert 170 <= copies[0] <= 230 and 70 <= copies[1] <= 130 and max(copies) == starts.COPIES


@pytest.mark.parametrize(
    "share, reward", [(0.05, rewards.flipped_5), (0.2, rewards.flipped_20), (0.4, rewards.flipped_40)]
)
def test_so_many_verdicts_are_turned_round_each_step_others(share: float, reward: Any) -> None:
    class State:
        global_step = 1

    texts, gold = ["#### 4"] * 4000, ["4"] * 4000
    first, again = (reward(prompts=texts, completions=texts, answer=gold, trainer_state=State()) for _ in range(2))
    assert first == again and abs(first.count(0.0) / 4000 - share) < 0.03
    State.global_step = 2
    assert reward(prompts=texts, completions=texts, answer=gold, trainer_state=State()) != first


@pytest.mark.parametrize("module", [rewards, starts])
def test_examples_in_docstrings(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
