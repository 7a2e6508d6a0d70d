"""Data of every shape is read: files of each kind, data sets in folders, conversations, answers that are no numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import eval.__main__
import grpo_core.train
import sft_core.train
from sft_core.model.tiny import build_tiny
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example, as_example
from sft_core.text.prompts import FORMATS, demonstration, prompt_messages
from sft_core.text.tasks import load_task, read_problems

CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Mali": "Bamako", "Togo": "Lome", "Cuba": "Havana"}
ROWS = [{"question": f"Capital of {land}?", "answer": town, "level": len(town)} for land, town in CAPITALS.items()]


def as_csv(folder: Path) -> list[str]:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return ["--task", str(folder / "rows.csv")]


def as_parquet(folder: Path) -> list[str]:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return ["--task", str(folder / "rows.parquet")]


def as_json(folder: Path) -> list[str]:
    renamed = [{"prompt": row["question"], "solution": row["answer"], "level": row["level"]} for row in ROWS]
    (folder / "rows.json").write_text(json.dumps(renamed, indent=1))
    return ["--task", str(folder / "rows.json")]


def as_messages(folder: Path) -> list[str]:
    path = folder / "rows.jsonl"
    lines = [
        {
            "messages": [
                {"role": "system", "content": "One word."},
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "level": row["level"],
        }
        for row in ROWS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--task", str(path)]


def as_saved_data_set(folder: Path) -> list[str]:
    named = [{"ask": row["question"], "town": row["answer"], "level": row["level"]} for row in ROWS]
    splits = {"train": named[:4], "validation": named[4:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder / "saved")
    columns = ["--question_column", "ask", "--answer_column", "town"]
    return ["--task", str(folder / "saved"), "--eval_split", "validation", *columns]


def as_folder_of_parquet(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    for split, part in (("train", ROWS[:4]), ("test", ROWS[4:])):
        datasets.Dataset.from_list(part).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return ["--task", str(folder / "data")]


SHAPES = [as_csv, as_parquet, as_json, as_messages, as_saved_data_set, as_folder_of_parquet]
QUIET = [
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--no_progress",
    "--tensorboard",
    "False",
    "--answer_type",
    "text",
]


def configured(argv: list[str], **more: Any) -> TaskConfig:
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return TaskConfig(**{name.removeprefix("--"): value for name, value in pairs}, answer_type="text", **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_holds_the_same_problems(shape: Callable[[Path], list[str]], tmp_path: Path) -> None:
    task = load_task(configured(shape(tmp_path), eval_problems=2), seed=0)
    found = [*task.train, *task.heldout]  # type: ignore[misc]
    assert [(e.question, e.answer) for e in found] == [(row["question"], row["answer"]) for row in ROWS]
    assert len(task.heldout) == 2 and [int(e.columns["level"]) for e in found] == [row["level"] for row in ROWS]
    assert "level" in task.columns


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny(tmp_path_factory.mktemp("model") / "tiny", seed=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_trains_for_two_steps_and_is_evaluated(
    shape: Callable[[Path], list[str]], tmp_path: Path, model: str
) -> None:
    reward = tmp_path / "own_rewards.py"
    reward.write_text("def by_level(level, **_):\n    return [int(letters) for letters in level]\n")
    data = [*shape(tmp_path), *QUIET, "--model", model, "--max_prompt_tokens", "240", "--max_completion_tokens", "5"]
    sft_core.train.main([*data, "--max_steps", "2", "--eval_problems", "2", "--output_dir", str(tmp_path / "sft")])
    rewards = ["--rewards", "correctness_reward_func", f"{reward}:by_level", "--group_size", "2"]
    run = ["--max_steps", "2", "--eval_problems", "2", "--prompts_per_step", "2", "--output_dir", str(tmp_path / "run")]
    grpo_core.train.main([*data, *rewards, *run])
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(step["rewards/by_level"] > 0 for step in steps if step["kind"] == "train")
    eval.__main__.main([*data, "--eval_problems", "2", "--output_dir", str(tmp_path / "answers")])
    answers = [json.loads(line) for line in (tmp_path / "answers" / "answers.jsonl").read_text().splitlines()]
    assert {answer["expected"] for answer in answers} <= set(CAPITALS.values())


@pytest.mark.parametrize(
    ("row", "type_", "question", "answer"),
    [
        ({"question": "6 x 7?", "answer": 42}, None, "6 x 7?", "42"),
        ({"question": "6 x 7?", "answer": "5"}, None, "6 x 7?", "5"),
        ({"question": "Capital?", "answer": "France.\n#### Paris"}, "text", "Capital?", "Paris"),
        ({"question": "Which?", "answer": "(B) this"}, "multiple_choice", "Which?", "B"),
        ({"question": "Which?", "choices": ["x", "y"], "answer": 1}, "multiple_choice", "Which?\nA. x\nB. y", "B"),
        (
            {"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            "multiple_choice",
            "?\nA. x\nB. y",
            "B",
        ),
        ({"question": "?", "choices": ["x", "y"], "answer": "y"}, "multiple_choice", "?\nA. x\nB. y", "B"),
        ({"question": "Write a poem."}, "none", "Write a poem.", ""),
        ({"question": "Sum?", "tests": [1], "answer": [1, 2]}, "none", "Sum?", ""),
    ],
)
def test_an_answer_is_read_by_its_type(row: dict[str, Any], type_: Any, question: str, answer: str) -> None:
    example = as_example(row, "row 0", TaskConfig(answer_type=type_))
    assert (example.question, example.answer) == (question, answer)
    if type_ == "none":
        assert example.columns.get("answer") == row.get("answer")  # as it is, for the rewards


def test_a_worked_answer_may_have_a_column_of_its_own() -> None:
    example = as_example({"question": "?", "solution": "6 x 7 = 42", "answer": "42"}, "")
    assert (example.working, example.answer) == ("6 x 7 = 42", "42")
    assert demonstration(example, FORMATS["hash"]) == "6 x 7 = 42\n#### 42"
    bare = as_example({"question": "?", "answer": "42"}, "")
    assert demonstration(bare, FORMATS["hash"]) == "#### 42"


def test_a_conversation_keeps_its_turns_and_its_own_system_message() -> None:
    turns = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3 more?")]
    row = {"prompt": [{"role": role, "content": text} for role, text in turns], "answer": "7"}
    example = as_example(row, "row 0")
    assert prompt_messages(example, TaskConfig()) == row["prompt"] and example.question == "And 3 more?"


@pytest.mark.parametrize(
    ("row", "type_", "words"),
    [
        (
            {"question": "?", "answer": "Paris"},
            None,
            "'Paris' has no `#### N`, and is not a number; --answer_type text",
        ),
        (
            {"ask": "?", "town": "x"},
            "text",
            "column question is missing.*--question_column names .*, of 'ask', 'town'",
        ),
        ({"question": "?", "town": "x"}, "text", "column answer is missing.*--answer_column names another one"),
        ({"question": "?", "answer": "maybe"}, "multiple_choice", "not the letter of a choice"),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, "multiple_choice", "'2' is none of the 2 choices"),
        ({"question": "?", "choices": "x", "answer": 0}, "multiple_choice", "choices must be a list"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "text",
            "before the answer must be the user's",
        ),
        ({"messages": [{"role": "user"}]}, "text", "a message is an object with a role and a content"),
    ],
)
def test_what_is_no_problem_says_what_to_do(row: dict[str, Any], type_: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^row 3: .*{words}"):
        as_example(row, "row 3", TaskConfig(answer_type=type_))


def test_texts_in_a_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"1,5 and more?",007\n?,"1,072"\n')
    assert [e.answer for e in read_problems(path)] == ["007", "1,072"]
    path.write_text("question;answer\n?;1\n")
    with pytest.raises(ValueError, match="row 1: column question is missing"):
        read_problems(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"rows\.csv: cannot be read as CSV"):
        read_problems(path)


def test_a_name_of_the_hub_is_asked_for_with_its_configuration_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(path: str, name: str | None, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"question": "?", "answer": "1"}] * 4

    monkeypatch.setattr("datasets.load_dataset", hub)
    task = load_task(TaskConfig(task="a/b", config_name="c", train_split="train[:50%]", eval_split="dev"), seed=0)
    assert asked == [("a/b", "c", "train[:50%]"), ("a/b", "c", "dev")] and task.size == 4
    task = load_task(TaskConfig(task="a/b", eval_split="", eval_problems=1), seed=0)
    assert (task.size, len(task.heldout)) == (3, 1) and asked[2:] == [("a/b", None, "train")]


def test_ordering_never_asks_in_an_evaluation_what_it_trains_on() -> None:
    task = load_task(TaskConfig(task="ordering", difficulty=2, eval_problems=40), seed=1)
    trained = {task.train[i].answer for i in range(400)}
    assert not trained & {e.answer for e in task.heldout} and len(trained) > 100
    for example in task.heldout:
        words = example.question.partition(": ")[2].split(", ")
        assert example.answer == ", ".join(sorted(words)) and isinstance(example, Example)
