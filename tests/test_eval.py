"""Evaluation: what counts as right, that every problem is asked once, and what `python -m eval` leaves behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.__main__
import eval.evaluate
from eval.evaluate import Answered, Evaluation, Reply, evaluate, read_answers
from eval.samples import Completion, Ended, Sampling
from rewards import correctness_reward_func, numeric_reward_func
from sft_core.model.policy import Policy
from sft_core.text.arithmetic import ArithmeticStream
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example, as_example
from sft_core.text.prompts import encode_prompt, prompt_messages
from tests.helpers import tiny_policy

HASH = TaskConfig(prompt_format="hash", system_prompt="")
XML = TaskConfig(prompt_format="xml", system_prompt="")


class Stub:
    """Takes the place of `eval.evaluate.sample`: answers each question from a table. An answer of None runs on until
    the budget ends it."""

    def __init__(self, answers: dict[str, str | None]) -> None:
        self.answers = answers
        self.batches: list[list[list[int]]] = []
        self.samplings: list[Sampling] = []

    def __call__(
        self, policy: Policy, prompts: Sequence[list[int]], sampling: Sampling, at_once: int, ended: Ended
    ) -> None:
        self.samplings.append(sampling)
        for first in range(0, len(prompts), at_once):
            places = list(range(first, min(first + at_once, len(prompts))))
            self.batches.append([prompts[place] for place in places])
            decoded = [policy.tokenizer.decode(prompt) for prompt in self.batches[-1]]
            replies = [next(a for q, a in self.answers.items() if f"\n{q}<" in text) for text in decoded]
            texts = ["1" * sampling.max_completion_tokens if reply is None else reply for reply in replies]
            ends = [[] if reply is None else [policy.eos_ids[0]] for reply in replies]
            ids = [policy.tokenizer(text)["input_ids"] + end for text, end in zip(texts, ends, strict=True)]
            found = [*map(Completion, texts, map(len, ids), (reply is None for reply in replies))]
            backwards = slice(None, None, -1)  # the first to end need not be the first that began
            ended(places[backwards], found[backwards])


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


# --- records


def reply(extracted: str | None) -> Reply:
    return Reply(f"#### {extracted}", extracted, extracted == "7", extracted == "7", 3, False)


def answer(strict: bool, **more: Any) -> Answered:
    text = "7" if strict else "8"
    return Answered("How many?", "7", f"#### {text}", text, strict, strict, tokens=3, truncated=False, **more)


def test_records_are_read_back_as_they_were_and_those_of_older_versions_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = [answer(True, steps=2, samples=[reply("7"), reply(None)]), answer(False)]
    old = asdict(answers[1])
    del old["steps"], old["samples"]  # as they were written before there were any
    path.write_text("".join(json.dumps(row) + "\n" for row in [asdict(answers[0]), old, {**old, "later": 1}]))
    assert read_answers(path) == [*answers, answers[1]]
    assert "samples" not in Evaluation(answers, 1.0).summary()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "?"}, "there is no 'expected' in it"),
        ({**asdict(answer(True)), "samples": [{}]}, "there is no 'response' in it"),
        ({**asdict(answer(True)), "samples": 4}, "not iterable"),
    ],
)
def test_what_is_no_record_of_an_answer_is_refused_with_its_line(
    line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(asdict(answer(True))) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=rf"answers.jsonl, line 2: .*{message}"):
        read_answers(path)


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


# --- sampling


def problems(count: int) -> list[Example]:
    stream = ArithmeticStream("heldout", seed=0, difficulty=3)
    return [as_example(stream[i], "") for i in range(count)]


def test_samples_are_drawn_beside_the_greedy_answer_with_the_prompts_of_a_problem_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = asked(monkeypatch, {"a": "#### 7", "bb": "#### 8"})
    examples = [Example(question, "#### 7", "7") for question in ("a", "bb")]
    result = evaluate(tiny_policy(), examples, HASH, 20, batch_size=4, samples=3, temperature=0.7)
    assert stub.samplings == [Sampling(20, temperature=0), Sampling(20, 0.7)]
    greedy, *drawn = stub.batches
    rows = [tuple(row) for batch in drawn for row in batch]
    assert [len(batch) for batch in drawn] == [4, 2]
    assert rows[:3] == [tuple(greedy[0])] * 3 and rows[3:] == [tuple(greedy[1])] * 3
    assert [[sample.extracted for sample in answer.samples] for answer in result.answers] == [["7"] * 3, ["8"] * 3]
    summary = result.summary()
    assert (summary["samples"], summary["pass_at_3"], summary["maj_at_3"]) == (3, 0.5, 0.5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_samples_stay_with_their_problem_whatever_its_length(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    questions = [f"q{i}" + " and then some" * (i * 7 % 5) for i in range(6)]
    asked(monkeypatch, {question: f"#### {i}" for i, question in enumerate(questions)})
    examples = [Example(question, f"#### {i}", str(i)) for i, question in enumerate(questions)]
    for answer in evaluate(tiny_policy(), examples, HASH, 20, batch_size, samples=3).answers:
        assert [sample.extracted for sample in answer.samples] == [answer.expected] * 3
        assert answer.strict and all(sample.strict for sample in answer.samples)


def test_samples_are_drawn_from_the_policy_of_their_own_prompt_at_the_temperature() -> None:
    policy, examples, temperature = tiny_policy(), problems(3), 0.5
    answers = evaluate(policy, examples, HASH, 1, 64, samples=400, temperature=temperature).answers
    for example, answer in zip(examples, answers, strict=True):
        prompt = encode_prompt(policy.tokenizer, prompt_messages(example, HASH))
        with torch.no_grad():
            logit_V = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        chance: Counter[str] = Counter()
        for id_, p in enumerate((logit_V / temperature).softmax(dim=-1).tolist()):
            chance[policy.tokenizer.decode([id_], skip_special_tokens=True)] += p
        drawn = Counter(sample.response for sample in answer.samples)
        likeliest, p = chance.most_common(1)[0]
        assert 0.1 < p < 0.95
        assert abs(drawn[likeliest] / 400 - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_samples_follow_from_their_seed_and_leave_every_random_state_as_it_was() -> None:
    policy, examples = tiny_policy(), problems(5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    results = [evaluate(policy, examples, HASH, 8, 4, samples=4, seed=seed).answers for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1] != results[2]
    texts = {sample.response for answer in results[0] for sample in answer.samples}
    assert len(texts) > 10
    without = evaluate(policy, examples, HASH, 8, 4).answers
    assert [replace(answer, samples=[]) for answer in results[0]] == without


def test_the_summary_of_samples_is_the_mean_over_problems() -> None:
    answers = [
        answer(True, samples=[reply("7"), reply("8"), reply("8.0"), reply(None)]),
        answer(False, samples=[reply("7"), reply("7"), reply(None), reply("9")]),
    ]
    summary = Evaluation(answers, 1.0).summary()
    assert [summary[f"pass_at_{k}"] for k in (1, 2, 4)] == pytest.approx([3 / 8, (1 / 2 + 5 / 6) / 2, 1.0])
    # Of the first one's six pairs 7 wins one and ties in two; of the second's it wins three and ties in two.
    assert [summary[f"maj_at_{k}"] for k in (1, 2, 4)] == pytest.approx([3 / 8, (2 / 6 + 4 / 6) / 2, 0.5])
    assert all(summary[f"pass_at_{k}_low"] < summary[f"pass_at_{k}"] for k in (1, 2, 4))
    assert summary["accuracy"] == 0.5  # of the greedy answers


def test_a_progress_bar_in_a_file_is_a_few_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, {f"q{i}": "#### 7" for i in range(40)})
    evaluate(tiny_policy(), [Example(f"q{i}", "#### 7", "7") for i in range(40)], HASH, 20, 1, progress=True)
    drawn = capsys.readouterr().err
    assert drawn.count("\r") <= 3 and "accuracy=100.0%" in drawn and drawn.endswith("\n")


def test_answers_are_the_same_in_however_many_portions_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, examples = tiny_policy(), problems(5)
    whole = evaluate(policy, examples, HASH, 8, 4, samples=3).answers
    monkeypatch.setattr(eval.evaluate, "PORTION", 4)
    assert evaluate(policy, examples, HASH, 8, 4, samples=3).answers == whole
