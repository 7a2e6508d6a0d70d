"""Tasks: the built-in word problems, local JSONL files, GSM8K from the hub, and the order in which problems come."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rewards import correctness_reward_func, numeric_reward_func, parse_number
from sft_core.text.arithmetic import GAINS, LARGEST_TOTAL, LOSSES, ArithmeticStream
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.read import GSM8K
from sft_core.text.tasks import Task, load_heldout, load_task, read_problems
from tests.helpers import SHARED

REAL_GSM8K = SHARED / "data" / "gsm8k"


def chain(problem: dict[str, str]) -> tuple[int, ...]:
    """The numbers of a word problem, read from its English: the start, then each change with its sign."""
    first, *changes, _ = problem["question"].split(". ")
    [start] = re.findall(r"has (\d+) \w+$", first)
    steps = []
    for change in changes:
        [(verb, number)] = re.findall(r"^\w+ (.+) (\d+)\.?$", change)
        assert verb in GAINS + LOSSES
        steps.append(int(number) if verb in GAINS else -int(number))
    return (int(start), *steps)


def take(split: Any, seed: int, difficulty: int, count: int) -> list[dict[str, str]]:
    stream = ArithmeticStream(split, seed, difficulty)
    return [stream[i] for i in range(count)]


# --- the built-in task


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    forwards = take("train", seed=3, difficulty=3, count=50)
    backwards = ArithmeticStream("train", 3, 3)
    assert forwards == [backwards[i] for i in reversed(range(50))][::-1]
    assert forwards != take("train", seed=4, difficulty=3, count=50)
    assert len({problem["question"] for problem in forwards}) > 40


@pytest.mark.parametrize("difficulty", [1, 3, 8])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answer_is_what_the_question_adds_up_to(split: str, difficulty: int) -> None:
    for problem in take(split, 0, difficulty, 200):
        assert problem["answer"].splitlines()[-1] == f"#### {sum(chain(problem))}"
        assert problem["question"].endswith("now?")


@pytest.mark.parametrize("difficulty", [1, 3, 8])
def test_every_annotated_step_is_right_and_follows_from_the_one_before(difficulty: int) -> None:
    for problem in take("train", 1, difficulty, 200):
        start, *steps = chain(problem)
        *lines, _ = problem["answer"].splitlines()
        total = start
        for line, step in zip(lines, steps, strict=True):
            # e.g. 3+8=<<3+8=11>>11: the working, the calculator note and the result agree
            [parts] = re.findall(r"^(\d+)([+-]\d+)=<<(\d+)([+-]\d+)=(\d+)>>(\d+)$", line)
            left, change, noted_left, noted_change, noted_result, result = map(int, parts)
            assert (left, change) == (noted_left, noted_change) == (total, step)
            total += step
            assert result == noted_result == total


def test_the_running_total_stays_within_its_bounds() -> None:
    totals = set()
    for problem in take("train", 2, 4, 500):
        start, *steps = chain(problem)
        assert 1 <= start <= 9 and all(1 <= abs(step) <= 9 for step in steps)
        totals |= {start + sum(steps[:i]) for i in range(len(steps) + 1)}
    assert min(totals) == 0 and max(totals) == LARGEST_TOTAL  # reached, and not passed


@pytest.mark.parametrize("difficulty", [1, 2, 3, 8])
def test_difficulty_is_the_number_of_operations_or_one_more(difficulty: int) -> None:
    operations = {len(chain(problem)) - 1 for problem in take("train", 0, difficulty, 200)}
    assert operations == {max(1, difficulty - 1), difficulty}


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_no_held_out_chain_is_ever_trained_on(difficulty: int) -> None:
    trained = {chain(p) for seed in (0, 1, 42) for p in take("train", seed, difficulty, 900)}
    asked = {chain(p) for seed in (0, 1, 42) for p in take("heldout", seed, difficulty, 300)}
    assert asked and not trained & asked


def test_every_run_is_asked_the_same_held_out_problems() -> None:
    config = TaskConfig(task="arithmetic", eval_problems=20)
    first, second = load_task(config, seed=1), load_task(config, seed=2)
    assert first.heldout == second.heldout == load_heldout(config) and len(first.heldout) == 20
    assert first.draw(0, 20, seed=1) != second.draw(0, 20, seed=2)
    assert first.size is None


# --- the order of the training problems


def numbered(count: int) -> list[Example]:
    return [Example(f"question {i}", f"#### {i}", str(i)) for i in range(count)]


def test_each_epoch_is_another_permutation() -> None:
    task = Task("t", numbered(10), [])
    walk = [example.answer for example in task.draw(0, 40, seed=7)]
    epochs = [walk[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_walk_can_be_taken_up_anywhere() -> None:
    task = Task("t", numbered(10), [])
    walk = task.draw(0, 40, seed=7)
    assert task.draw(13, 9, seed=7) == walk[13:22]  # over the end of an epoch
    assert Task("t", numbered(10), []).draw(38, 2, seed=7) == walk[38:]
    assert task.draw(0, 40, seed=7) == walk


def test_another_seed_is_another_order() -> None:
    task = Task("t", numbered(30), [])
    assert task.draw(0, 30, seed=1) != task.draw(0, 30, seed=2)


def test_an_endless_task_draws_its_problems_in_order() -> None:
    task = load_task(TaskConfig(task="arithmetic"), seed=5)
    stream = ArithmeticStream("train", 5, 3)
    assert [e.question for e in task.draw(4, 3, seed=5)] == [stream[i]["question"] for i in (4, 5, 6)]


def test_filtering_reaches_the_training_and_the_held_out_problems() -> None:
    task = Task("t", numbered(6), numbered(4)).filtered(lambda examples: [e for e in examples if int(e.answer) % 2])
    assert [e.answer for e in task.train] == ["1", "3", "5"] and [e.answer for e in task.heldout] == ["1", "3"]


# --- local files


def rows(count: int) -> list[str]:
    return [json.dumps({"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"}) for i in range(count)]


def written(folder: Path, lines: list[str], name: str = "problems.jsonl") -> Path:
    path = folder / name
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'question': 'single quotes'}", "not JSON"),
        ('{"question": "cut', "not JSON"),
        ("[1, 2]", "found list"),
        ('"text"', "found str"),
        ('{"answer": "#### 4"}', "question"),
        ('{"question": "2 + 2?"}', "answer"),
        ('{"question": "  ", "answer": "#### 4"}', "question"),
        ('{"question": "2 + 2?", "answer": ""}', "answer"),
        ('{"question": "2 + 2?", "answer": true}', "answer"),
        ('{"question": "2 + 2?", "answer": "four"}', "####"),
        ('{"question": "2 + 2?", "answer": "so\\n####  \\n"}', "####"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, complaint: str) -> None:
    lines = rows(20)
    lines[16] = line
    lines[2] = ""  # blank lines count
    path = written(tmp_path, lines)
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    message = str(caught.value)
    assert f"{path}, line 17:" in message and complaint in message and "\n" not in message


def test_a_line_that_is_not_utf8_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes("\n".join(rows(16)).encode() + b'\n{"question": "caf\xe9", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 17: not JSON"):
        read_problems(path)


@pytest.mark.parametrize("lines", [[], ["", "   "]])
def test_a_file_without_problems_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    path = written(tmp_path, lines)
    with pytest.raises(ValueError, match=re.escape(f"{path}: holds no problems")):
        read_problems(path)


def test_blank_lines_windows_line_ends_and_further_columns_do_no_harm(tmp_path: Path) -> None:
    more = '{"question": "Wie viele Äpfel?", "answer": "#### 1,000", "source": [1, 2]}\r'
    examples = read_problems(written(tmp_path, ["", *rows(2), "   ", more]))
    assert [e.answer for e in examples] == ["0", "1", "1,000"]
    assert examples[2].question == "Wie viele Äpfel?"
    assert examples[0] == Example("What is 0?", "It is 0.\n#### 0", "0")


@pytest.mark.parametrize(
    ("size", "eval_problems", "held_out"), [(30, 10, 10), (30, 200, 15), (30, 0, 0), (3, 2, 1), (1, 5, 0)]
)
def test_held_out_rows_are_split_off_the_end_and_never_trained_on(
    tmp_path: Path, size: int, eval_problems: int, held_out: int
) -> None:
    path = written(tmp_path, rows(size))
    task = load_task(TaskConfig(task=str(path), eval_problems=eval_problems), seed=0)
    examples = read_problems(path)
    assert list(task.train) == examples[: size - held_out] and list(task.heldout) == examples[size - held_out :]
    assert task.size == size - held_out


def test_max_samples_shortens_the_training_side_only(tmp_path: Path) -> None:
    config = TaskConfig(task=str(written(tmp_path, rows(30))), eval_problems=10, max_samples=4)
    task = load_task(config, seed=0)
    assert [e.answer for e in task.train] == ["0", "1", "2", "3"]
    assert [e.answer for e in task.heldout] == [str(i) for i in range(20, 30)]


def test_an_eval_file_takes_the_place_of_the_split(tmp_path: Path) -> None:
    path, other = written(tmp_path, rows(5)), written(tmp_path, rows(9)[5:], "other.jsonl")
    task = load_task(TaskConfig(task=str(path), eval_file=str(other), eval_problems=3), seed=0)
    assert [e.answer for e in task.train] == ["0", "1", "2", "3", "4"]
    assert [e.answer for e in task.heldout] == ["5", "6", "7"]
    everything = TaskConfig(task=str(path), eval_file=str(other), eval_problems=0)
    assert len(load_task(everything, seed=0).heldout) == len(load_heldout(everything)) == 4


# --- GSM8K from the hub


class StandInHub:
    """Takes the place of `datasets.load_dataset`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, path: str, name: str, split: str) -> list[dict[str, str]]:
        self.asked.append((path, name, split))
        return [json.loads(row) for row in rows(8 if split == "train" else 5)]


def test_gsm8k_comes_from_the_hub_with_its_own_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = StandInHub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    task = load_task(TaskConfig(task="gsm8k", max_samples=6, eval_problems=3), seed=0)
    assert (task.size, len(task.heldout)) == (6, 3)
    assert task.train[5] == Example("What is 5?", "It is 5.\n#### 5", "5")
    assert hub.asked == [(GSM8K, "main", "train"), (GSM8K, "main", "test")]


def test_evaluating_gsm8k_does_not_fetch_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = StandInHub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert len(load_heldout(TaskConfig(task="gsm8k", eval_problems=0))) == 5
    assert hub.asked == [(GSM8K, "main", "test")]


@pytest.mark.parametrize("error", [ConnectionError("cannot\nreach it"), ValueError("offline"), FileNotFoundError("x")])
def test_an_unreachable_hub_is_one_line_that_names_local_files(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match="--task gsm8k.*local file") as caught:
        load_task(TaskConfig(task="gsm8k"), seed=0)
    assert "\n" not in str(caught.value)


def test_a_hub_row_without_an_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [json.loads(row) for row in rows(5)]
    broken[3]["answer"] = "no final line"
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: broken)
    with pytest.raises(ValueError, match="test row 3: .*####"):
        load_heldout(TaskConfig(task="gsm8k"))


# --- the real files


@pytest.mark.skipif(not REAL_GSM8K.is_dir(), reason=f"no GSM8K files in {REAL_GSM8K} (GRPO_SHARED)")
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_the_real_gsm8k_files_are_read_and_every_gold_is_a_number(name: str, count: int) -> None:
    examples = read_problems(REAL_GSM8K / f"{name}.jsonl")
    golds = [example.answer for example in examples]
    assert len(examples) == count
    assert all(parse_number(gold) is not None for gold in golds)
    solutions = [example.solution for example in examples]
    assert set(numeric_reward_func(prompts=golds, completions=solutions, answer=golds)) == {1.0}
    tagged = [f"<answer>{gold}</answer>" for gold in golds]
    assert set(correctness_reward_func(prompts=golds, completions=tagged, answer=solutions)) == {2.0}
