"""What any text may earn, generated ones and the real golds of GSM8K."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import (
    REWARDS,
    correctness_reward_func,
    gold_answer,
    int_reward_func,
    last_number,
    numeric_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)
from tests.test_rewards import FORMAT_REWARDS, pay, xml

# --- any text at all ---------------------------------------------------------------------------------------------

PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "\n", " ", "####", "4", "1,072", "$", "²", "x"]
TAGGED_TEXT = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
ANY_TEXT = st.one_of(TAGGED_TEXT, st.text(st.characters(exclude_categories=[])))  # lone surrogates as well
VALUES = {
    "correctness_reward_func": {0.0, 2.0},
    "int_reward_func": {0.0, 0.5},
    "strict_format_reward_func": {0.0, 0.5},
    "soft_format_reward_func": {0.0, 0.5},
    "numeric_reward_func": {0.0, 1.0},
}


@given(ANY_TEXT, ANY_TEXT)
@settings(database=None, max_examples=500)
def test_any_text_earns_a_value_in_the_documented_range(completion, answer):
    for name, values in VALUES.items():
        assert pay(REWARDS[name], completion, answer) in values
    assert 0.0 - 0.001 * len(completion) <= pay(xmlcount_reward_func, completion) <= 0.5
    last_number(completion)


@given(TAGGED_TEXT, st.sampled_from(["", "<reasoning>", "<reasoning>\n"]))
@settings(database=None, max_examples=1_000)
def test_the_format_rewards_agree_with_regular_expressions_that_have_dotall(body, start):
    for text in (start + body, start + body + "\n</reasoning>\n<answer>\n4\n</answer>\n"):
        soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, re.DOTALL)
        assert pay(soft_format_reward_func, text) == (0.5 if soft else 0.0)
        tags = re.findall("</?reasoning>|</?answer>", text)
        strict = re.fullmatch(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n", text, re.DOTALL)
        assert pay(strict_format_reward_func, text) == (0.5 if strict and len(tags) == 4 else 0.0)


NO_TAG = st.text().filter(lambda text: "<" not in text)  # hypothesis does try the strings of the modules it tests


@given(NO_TAG, NO_TAG)
@settings(database=None)
def test_the_strict_format_earns_every_format_reward(reasoning, answer):
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    assert [pay(function, text) for function in FORMAT_REWARDS] == [0.5, 0.5, 0.5]


# --- the real dataset --------------------------------------------------------------------------------------------


def gsm8k_answers():
    shared = Path(os.environ.get("GRPO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    files = [shared / "data" / "gsm8k" / name for name in ("train.jsonl", "test.jsonl")]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        pytest.skip(f"GSM8K is absent: no {' or '.join(absent)} in $GRPO_SHARED/data/gsm8k")
    return [json.loads(line)["answer"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_real_gold_is_right_against_itself_with_and_without_commas():
    answers = gsm8k_answers()
    assert len(answers) == 8_792
    golds = [gold_answer(answer) for answer in answers]
    assert sum("," in gold or "-" in gold for gold in golds) == 98  # the ones that `isdigit` refuses
    plain = [gold.replace(",", "") for gold in golds]
    prompts = ["?"] * len(golds)
    for written in (golds, plain, [f"{int(gold):,}" for gold in plain], [f"${gold}." for gold in plain]):
        for column in (answers, golds, plain):
            hashed = [f"so\n#### {text}" for text in written]
            assert set(numeric_reward_func(prompts, hashed, answer=column)) == {1.0}
            assert set(correctness_reward_func(prompts, [xml(text) for text in written], answer=column)) == {2.0}
    assert set(int_reward_func(prompts, [xml(gold) for gold in golds])) == {0.5}
    assert set(numeric_reward_func(prompts, answers, answer=golds)) == {1.0}  # the dataset's own solutions


def test_no_real_gold_is_right_for_another_number():
    golds = [gold_answer(answer) for answer in gsm8k_answers()]
    for off in (-1, 1):
        wrong = [f"{int(gold.replace(',', '')) + off:,}" for gold in golds]
        assert set(numeric_reward_func(golds, [f"#### {text}" for text in wrong], answer=golds)) == {0.0}
        assert set(correctness_reward_func(golds, [xml(text) for text in wrong], answer=golds)) == {0.0}
