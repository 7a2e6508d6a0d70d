"""The summary of an evaluation, and the folder that `python -m eval` leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eval.__main__
import eval.evaluate
import sft_core.train
from eval.evaluate import Evaluation, evaluate
from eval.report import summary_cells, summary_table
from eval.statistics import wilson_interval
from rewards.tables import markdown
from sft_core.model.policy import Policy, is_adapted
from sft_core.model.tiny import build_tiny
from sft_core.text.example import Example
from tests.helpers import PEFT_IS_BEHIND, tiny_policy
from tests.test_eval import HASH, answer, asked, reply

# --- the summary


def test_the_summary_counts_what_the_answers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {"a": "3+4=7\n#### 7", "b": "#### 8", "c": "it is 7", "d": None, "e": "####"})
    solutions = ["3+4=<<3+4=7>>7\n#### 7", "Add.\nAdd.\n#### 7", "One line.\n#### 7", "#### 7", "Add. Add.\n#### 7"]
    examples = [Example(q, solution, "7") for q, solution in zip("abcde", solutions, strict=True)]
    result = evaluate(tiny_policy(), examples, HASH, 20, 8)
    tokens = [answer.tokens for answer in result.answers]
    (low, high), (lenient_low, lenient_high) = wilson_interval(1, 5), wilson_interval(2, 5)
    steps = {(1, "problems"): 3, (1, "accuracy"): 1 / 3, (2, "problems"): 1, (2, "accuracy"): 0.0}
    for steps_, right, n in ((1, 1, 3), (2, 0, 1)):
        steps[steps_, "accuracy_low"], steps[steps_, "accuracy_high"] = wilson_interval(right, n)
    summary = result.summary()
    assert summary.pop("seconds") > 0
    assert summary == {
        "problems": 5,
        "accuracy": 0.2,
        "accuracy_low": low,
        "accuracy_high": high,
        "lenient_accuracy": 0.4,
        "lenient_accuracy_low": lenient_low,
        "lenient_accuracy_high": lenient_high,
        "format_rate": 0.4,  # a bare #### holds no answer
        "mean_length": sum(tokens) / 5,
        "max_length": 20,
        "truncated_share": 0.2,
        "worked_share": 0.2,
        **{f"steps/{number}/{name}": value for (number, name), value in steps.items()},
    }


def test_the_table_has_a_column_for_each_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {"a": "#### 7", "b": "#### 8"})
    answers = evaluate(tiny_policy(), [Example(q, "#### 7", "7") for q in "ab"], HASH, 20, 8).answers
    both, right = Evaluation(answers, 1.0).summary(), Evaluation(answers[:1], 1.0).summary()
    lines = summary_table({"before": both, "after": right}).splitlines()
    assert lines[0].split() == ["before", "after"]
    assert lines[1].split()[:2] == ["accuracy", "50.0%"] and "100.0%" in lines[1]
    assert lines[-1].split() == ["problems", "2", "1"]
    column = lines[0].index("after")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_a_row_that_one_summary_alone_has_is_blank_in_the_others() -> None:
    plain = answer(True)
    sampled = answer(True, steps=2, samples=[reply("7"), reply("8")])
    columns = {"plain": Evaluation([plain], 1.0).summary(), "sampled": Evaluation([sampled], 1.0).summary()}
    cells = summary_cells(columns)
    rows = {row[0]: row[1:] for row in cells}
    assert list(rows)[-5:] == ["pass@1", "pass@2", "maj@1", "maj@2", "accuracy, 2 steps"]
    assert rows["pass@2"] == ["", "100.0% [20.7%, 100.0%]"] and rows["maj@2"][1].startswith("50.0% [")
    assert rows["accuracy, 2 steps"] == ["", "100.0% [20.7%, 100.0%] of 1"]
    lines = markdown([*cells, ["a|b", "", ""]]).splitlines()
    assert lines[:2] == ["|  | plain | sampled |", "| --- | --- | --- |"] and lines[-1] == "| a\\|b |  |  |"


# --- python -m eval


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base"), seed=0)


def run(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """`python -m eval`, small; the lines of answers.jsonl."""
    small = ["--prompt_format", "hash", "--system_prompt", ""]
    small += ["--max_prompt_tokens", "120", "--max_completion_tokens", "12"]
    small += ["--precision", "float32", "--device", "cpu", "--no_progress", "--batch_size", "4"]
    eval.__main__.main([*small, "--output_dir", str(folder), *flags])
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_run_folder_holds_a_line_per_problem_the_summary_and_the_config(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    questions = [f"Wie viele Äpfel hat Tom {'noch ' * i}?" for i in range(6)]
    rows = [{"question": question, "answer": f"#### {i}"} for i, question in enumerate(questions)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    answers = run(folder, "--model", str(base), "--task", str(data), "--eval_problems", "5")
    assert [answer["question"] for answer in answers] == questions[:5]
    assert [answer["expected"] for answer in answers] == ["0", "1", "2", "3", "4"]
    assert set(answers[0]) == {
        "question", "expected", "response", "extracted", "strict", "lenient", "tokens", "truncated", "steps", "samples"
    }  # fmt: skip
    assert all(1 <= answer["tokens"] <= 12 for answer in answers)
    [line] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert line["kind"] == "eval" and line["problems"] == 5
    assert line["accuracy"] == sum(answer["strict"] for answer in answers) / 5
    assert line["truncated_share"] == sum(answer["truncated"] for answer in answers) / 5
    out = capsys.readouterr().out
    assert "accuracy" in out and "problems" in out and str(folder) in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl", "config.yaml", "log.jsonl", "provenance.json", "summary.json", "summary.md"
    ]  # fmt: skip
    again = run(tmp_path / "again", "--config", str(folder / "config.yaml"))
    assert again == answers


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_an_adapter_folder_is_evaluated_on_the_base_model_that_it_names(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    flags = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", "", "--eval_problems", "4"]
    flags += ["--max_prompt_tokens", "90", "--max_completion_tokens", "48", "--max_steps", "2", "--lr", "0.1"]
    flags += ["--lora", "--precision", "float32", "--device", "cpu", "--no_progress", "--no_tensorboard"]
    sft_core.train.main(["--model", str(base), *flags, "--output_dir", str(tmp_path / "sft")])
    adapter = str(tmp_path / "sft" / "final")

    policies: list[Policy] = []
    load = eval.__main__.load_policy

    def keeping(*args: Any, **kwargs: Any) -> Policy:
        policies.append(load(*args, **kwargs))
        return policies[-1]

    monkeypatch.setattr(eval.__main__, "load_policy", keeping)
    task = ["--task", "arithmetic", "--eval_problems", "4"]
    direct = run(tmp_path / "direct", "--model", adapter, *task)
    named = run(tmp_path / "named", "--model", str(base), "--adapter_path", adapter, *task)
    without = run(tmp_path / "without", "--model", str(base), *task)
    assert direct == named != without
    assert [is_adapted(policy.model) for policy in policies] == [True, True, False]
