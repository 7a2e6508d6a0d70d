"""Evaluation: what counts as right, that every problem is asked once, and what `python -m eval` leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.__main__
import eval.evaluate
import sft_core.train
from eval.evaluate import Evaluation, evaluate, summary_table, wilson_interval
from eval.sampling import Samples, Sampling
from rewards import correctness_reward_func, numeric_reward_func
from sft_core.arithmetic import ArithmeticStream
from sft_core.config import TaskConfig
from sft_core.policy import Policy, is_adapted
from sft_core.rows import pack_rows
from sft_core.tasks import Example, as_example
from sft_core.tiny import build_tiny
from tests.helpers import PEFT_IS_BEHIND, tiny_policy

HASH = TaskConfig(prompt_format="hash", system_prompt="")
XML = TaskConfig(prompt_format="xml", system_prompt="")


class Stub:
    """Takes the place of `eval.evaluate.sample`: answers each question from a table. An answer of None runs on until
    the budget ends it."""

    def __init__(self, answers: dict[str, str | None]) -> None:
        self.answers = answers
        self.batches: list[list[list[int]]] = []
        self.samplings: list[Sampling] = []

    def __call__(self, policy: Policy, prompts: Sequence[list[int]], sampling: Sampling) -> Samples:
        self.batches.append(list(prompts))
        self.samplings.append(sampling)
        decoded = [policy.tokenizer.decode(prompt) for prompt in prompts]
        replies = [next(a for q, a in self.answers.items() if f"\n{q}<" in text) for text in decoded]
        texts = ["1" * sampling.max_completion_tokens if reply is None else reply for reply in replies]
        ends = [[] if reply is None else [policy.eos_ids[0]] for reply in replies]
        ids = [policy.tokenizer(text)["input_ids"] + end for text, end in zip(texts, ends, strict=True)]
        rows = pack_rows(prompts, ids, policy.pad_id)
        return Samples(rows, texts, torch.tensor([reply is None for reply in replies]), torch.empty(len(texts), 0))


def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str | None]) -> Stub:
    stub = Stub(answers)
    monkeypatch.setattr(eval.evaluate, "sample", stub)
    return stub


def marked(monkeypatch: pytest.MonkeyPatch, task: TaskConfig, response: str | None, gold: str = "7") -> Any:
    """One response to one question, marked."""
    asked(monkeypatch, {"How many?": response})
    [answer] = evaluate(tiny_policy(), [Example("How many?", f"#### {gold}", gold)], task, 20, 4).answers
    return answer


# --- marking


@pytest.mark.parametrize(
    ("task", "response", "extracted", "strict", "lenient"),
    [
        (HASH, "3+4=7\n#### 7", "7", True, True),
        (HASH, "#### $7.00", "$7.00", True, True),
        (HASH, "#### 8", "8", False, False),
        (HASH, "It is 7", None, False, True),
        (HASH, "#### 8\nNo, it is 7", "8", False, True),  # the format's answer is the first; the last number is right
        (HASH, "#### 7\n#### 8", "7", True, False),
        (HASH, "#### seven", "seven", False, False),
        (HASH, "####", "", False, False),
        (HASH, "", None, False, False),
        (XML, "<reasoning>\n3+4\n</reasoning>\n<answer>\n7\n</answer>\n", "7", True, True),
        (XML, "#### 7", "", False, True),
        (XML, "<answer>7", "", False, True),
        (XML, "<answer>7</answer> or 8", "7", True, False),
    ],
)
def test_strict_goes_by_the_format_and_lenient_by_the_last_number(
    monkeypatch: pytest.MonkeyPatch, task: TaskConfig, response: str, extracted: str | None, strict: bool, lenient: bool
) -> None:
    answer = marked(monkeypatch, task, response)
    assert (answer.extracted, answer.strict, answer.lenient) == (extracted, strict, lenient)
    assert (answer.expected, answer.response, answer.truncated) == ("7", response, False)
    reward: Any = numeric_reward_func if task is HASH else correctness_reward_func
    assert strict == (reward(prompts=["?"], completions=[response], answer=["7"])[0] > 0)  # what training pays for


@pytest.mark.parametrize("gold", ["1,200", "-3", "0.5"])
def test_golds_with_commas_signs_and_fractions_are_met(monkeypatch: pytest.MonkeyPatch, gold: str) -> None:
    for response in (f"#### {gold}", f"#### {gold.replace(',', '')}"):
        answer = marked(monkeypatch, HASH, response, gold)
        assert answer.strict and answer.lenient


def test_a_completion_that_the_budget_ended_is_truncated_and_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = marked(monkeypatch, HASH, None)
    assert answer.truncated and answer.tokens == 20
    ended = marked(monkeypatch, HASH, "#### 7")
    assert not ended.truncated and ended.tokens == len(tiny_policy().tokenizer("#### 7")["input_ids"]) + 1


# --- asking


def test_every_problem_is_asked_once_greedily_and_answers_keep_the_given_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = [f"q{i}" + " and then some" * (i * 7 % 5) for i in range(11)]
    stub = asked(monkeypatch, {question: f"#### {i}" for i, question in enumerate(questions)})
    examples = [Example(question, f"#### {i}", str(i)) for i, question in enumerate(questions)]
    result = evaluate(tiny_policy(), examples, HASH, 20, batch_size=4)
    assert [answer.question for answer in result.answers] == questions
    assert [answer.extracted for answer in result.answers] == [str(i) for i in range(11)]
    assert result.summary()["accuracy"] == 1.0
    assert [len(batch) for batch in stub.batches] == [4, 4, 3]
    assert all(sampling == Sampling(20, temperature=0) for sampling in stub.samplings)
    lengths = [len(prompt) for batch in stub.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 3  # like lengths share a batch


def test_the_batch_size_does_not_change_a_real_policys_answers() -> None:
    policy = tiny_policy()
    stream = ArithmeticStream("heldout", seed=0, difficulty=3)
    examples = [as_example(stream[i], "") for i in range(6)]
    policy.model.train()
    one, all_at_once = (evaluate(policy, examples, HASH, 12, batch_size) for batch_size in (1, 6))
    assert policy.model.training
    assert one.answers == all_at_once.answers
    assert len({answer.response for answer in one.answers}) > 1


# --- the summary


def test_the_summary_counts_what_the_answers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {"a": "3+4=7\n#### 7", "b": "#### 8", "c": "it is 7", "d": None, "e": "####"})
    result = evaluate(tiny_policy(), [Example(q, "#### 7", "7") for q in "abcde"], HASH, 20, 8)
    tokens = [answer.tokens for answer in result.answers]
    low, high = wilson_interval(1, 5)
    summary = result.summary()
    assert summary.pop("seconds") > 0
    assert summary == {
        "problems": 5,
        "accuracy": 0.2,
        "accuracy_low": low,
        "accuracy_high": high,
        "lenient_accuracy": 0.4,
        "format_rate": 0.4,  # a bare #### holds no answer
        "mean_length": sum(tokens) / 5,
        "max_length": 20,
        "truncated_share": 0.2,
        "worked_share": 0.2,
    }


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons_as_tabulated(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_intervals_ends_are_where_the_score_test_just_rejects() -> None:
    for n in (1, 7, 500):
        for successes in range(0, n + 1, max(1, n // 7)):
            low, high = wilson_interval(successes, n)
            share = successes / n
            assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and low < high
            for p in (low, high):  # (share - p)^2 = z^2 p (1 - p) / n
                assert (share - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-9)


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
        "question", "expected", "response", "extracted", "strict", "lenient", "tokens", "truncated"
    }  # fmt: skip
    assert all(1 <= answer["tokens"] <= 12 for answer in answers)
    [line] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert line["kind"] == "eval" and line["problems"] == 5
    assert line["accuracy"] == sum(answer["strict"] for answer in answers) / 5
    assert line["truncated_share"] == sum(answer["truncated"] for answer in answers) / 5
    out = capsys.readouterr().out
    assert "accuracy" in out and "problems" in out and str(folder) in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl", "config.yaml", "log.jsonl", "provenance.json"
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
