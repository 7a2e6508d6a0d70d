"""What the package `rewards` claims: who is paid, who is not, and that no text can break or stall it."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import (
    REWARDS,
    Reward,
    RewardError,
    completion_text,
    correctness_reward_func,
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    int_reward_func,
    is_integer,
    last_number,
    load_reward,
    load_rewards,
    numeric_reward_func,
    parse_number,
    same_number,
    score,
    soft_format_reward_func,
    soft_overlong_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

STRICT = "<reasoning>\n2 + 2\n\nis 4\n</reasoning>\n<answer>\n4\n</answer>\n"
# All that judge a text by itself; the soft overlong penalty judges its length in tokens.
TEXT_REWARDS = {name: function for name, function in REWARDS.items() if name != "soft_overlong_reward_func"}
FORMAT_REWARDS = [strict_format_reward_func, soft_format_reward_func, xmlcount_reward_func]


def pay(function, completion, answer="4"):
    """The reward of one completion, called by keyword alone, with the extra keywords that TRL adds."""
    [value] = function(
        prompts=["?"],
        completions=[completion],
        completion_ids=[[1, 2]],
        answer=[answer],
        trainer_state=None,
        log_extra=print,
        log_metric=print,
    )
    return value


def xml(answer):
    return f"<reasoning>\nso\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


# --- answers found in text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        (STRICT, "4"),
        ("<answer>\n four\n and more \n</answer>", "four\n and more"),
        ("<answer>3</answer> no: <answer>4</answer> done", "4"),
        ("<answer>4</answer> and then <answer>5", "4"),  # cut off inside a second answer: the complete pair counts
        ("<answer>3<answer>4</answer></answer>", "4"),
        ("<answer></answer>", ""),
        ("4", ""),
        ("<answer>4", ""),
        ("4</answer>", ""),
        ("</answer>4<answer>", ""),
        ("", ""),
    ],
)
def test_the_xml_answer_is_the_last_complete_pair_and_nothing_else(text, answer):
    assert extract_xml_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 4", "4"),
        ("####4\n", "4"),
        ("#### 4\nQuestion: 3 + 3?\n#### 6", "4"),
        ("#### $1,072. \r\nmore", "$1,072."),
        ("####", ""),
        ("#### \n4", ""),
        ("### 4", None),
        ("", None),
    ],
)
def test_the_hash_answer_is_the_first_mark_to_the_end_of_its_line(text, answer):
    assert extract_hash_answer(text) == answer


def test_the_gold_is_read_from_a_worked_solution_and_from_a_bare_answer():
    assert [gold_answer(text) for text in ("2 + 2 = 4\n#### 4", " 4\n", "four", "")] == ["4", "4", "four", ""]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("she has 3 and then 4.", "4"),
        ("from 10-7 eggs", "7"),
        ("it fell to -7 degrees", "-7"),
        ("5--3", "-3"),
        ("a loss of -$1,200.50 (net)", "-$1,200.50"),
        ("5,$-3", "$-3"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("1234,567", "567"),
        ("0.5 or .25", ".25"),
        ("version 1.2.3", "3"),
        ("50%", "50"),
        ("x² and ٣", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_found_as_it_is_written(text, number):
    assert last_number(text) == number


# --- strings that are numbers ------------------------------------------------------------------------------------

NUMBERS = {
    "72": "72",
    " 72\n": "72",
    "+72": "72",
    "-72": "-72",
    "007": "7",
    "1,072": "1072",
    "-1,450,000": "-1450000",
    "100,000.25": "100000.25",
    "$72": "72",
    "-$72": "-72",
    "$-72": "-72",
    "+$72": "72",
    "72%": "72",
    "72.": "72",
    "72.%": "72",
    "72%.": "72",
    "$1,072.50.": "1072.5",
    "5.0": "5",
    ".5": "0.5",
    "-.5": "-0.5",
    "-0": "0",
}
NOT_NUMBERS = (
    ["", " ", "+", "-", "$", "%", ".", "-.", "$%", ",", "72 apples", "7 2", "seven", "0x10", "1_000", "1/2", "2+2"]
    + ["1,07", "1072,", ",072", "10,72", "1,0720", "1,,072", "1072,000", "0,500", "000,500", "1.5,000", "1,072,00"]
    + ["1.2.3", "72..", "72%%", "72.%.", "--72", "+-72", "$$72", "$-$72", "72$", "%72", "- 72", "$ 72", "1e3", "1E3"]
    + ["nan", "NaN", "-nan", "sNaN", "inf", "-inf", "Infinity", "²", "7²", "٧٢", "-٧", "१२", "７２", "½", "Ⅷ", "−72"]
)


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_commas_sign_dollar_percent_and_final_dot_do_not_change_a_number(text, value):
    assert parse_number(text) == Decimal(value)
    assert same_number(text, value) and same_number(value, text)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_not_one_ascii_number_is_not_read_as_one(text):
    assert parse_number(text) is None
    assert not is_integer(text)
    assert not same_number(text, text)


@pytest.mark.parametrize(
    ("text", "integer"),
    [("72", True), ("+72", True), ("-1,072", True), ("007", True)]
    + [(text, False) for text in ("5.0", "72.", "$72", "72%", ".5", " 72", "72\n", "10,72", "²", "٧٢", "")],
)
def test_an_integer_is_ascii_digits_a_sign_and_well_formed_commas(text, integer):
    assert is_integer(text) is integer


def test_numbers_beyond_every_limit_of_int_float_and_decimal_are_compared_exactly():
    long = "7" * 5_000  # int() refuses more than 4,300 digits; float() makes inf of more than 308
    assert same_number(long, long + ".0")
    assert not same_number(long, long[:-1] + "8")
    assert not same_number(long, long[:-1])
    assert not same_number(long, "-" + long)
    longer = "7" * 1_100_000  # a plain decimal context overflows past 999,999
    assert same_number(longer, longer + ".0")
    assert not same_number(longer, longer[:-1] + "8") and not same_number(longer, "4")
    assert same_number("0." + "3" * 5_000, "0." + "3" * 6_000)


def test_the_tolerance_is_absolute_and_includes_its_bound():
    assert same_number("5", "5.000001") and same_number("1000000000000000000000000000000", "1" + "0" * 30 + ".000001")
    assert not same_number("5", "5.0000011") and not same_number("1000000", "1000001")
    assert same_number("5", "5.4", tolerance=0.4) and not same_number("5", "5.4", tolerance=0)


@given(st.integers(), st.sampled_from(["{}", "{:,}", " {:,}.", "{:,}%"]))
@settings(database=None, deadline=None)
def test_every_integer_is_read_back_from_every_way_to_write_it(value, style):
    assert parse_number(style.format(value)) == value
    assert is_integer(f"{value:,}") and is_integer(f"{value}")
    assert last_number(f"so it is {value:,}.") == f"{value:,}"


@given(st.text(st.sampled_from("0123456789,.$%+-  ²٣x"), max_size=30))
@settings(database=None, deadline=None, max_examples=300)
def test_the_last_number_of_any_text_is_a_number(text):
    number = last_number(text)
    assert number is None or parse_number(number) is not None
    assert (number is None) == (re.search("[0-9]", text) is None)


# --- the reward functions ----------------------------------------------------------------------------------------


def test_multiline_reasoning_earns_the_format_rewards():
    assert [pay(function, STRICT) for function in FORMAT_REWARDS] == [0.5, 0.5, 0.5]
    assert pay(correctness_reward_func, STRICT) == 2.0
    assert pay(int_reward_func, STRICT) == 0.5


@pytest.mark.parametrize(
    ("completion", "strict", "soft", "xmlcount"),
    [
        (xml("4\nor so"), 0.5, 0.5, 0.5),
        (STRICT.rstrip(), 0, 0.5, 0.5),  # no final newline
        (STRICT + "\n", 0, 0.5, 0.499),
        (STRICT + "x" * 100, 0, 0.5, 0.4),
        ("\n" + STRICT, 0, 0, 0.5),
        ("Sure!\n" + STRICT, 0, 0, 0.5),
        ("<reasoning>2 + 2\nis 4</reasoning>\n\n <answer>4</answer>", 0, 0.5, 0),
        ("<reasoning></reasoning><answer></answer>", 0, 0.5, 0),
        ("<reasoning>a</reasoning> b </reasoning><answer>4</answer>", 0, 0.5, 0),
        ("<reasoning>\na\n</reasoning>\nb\n<answer>\n4\n</answer>\n", 0, 0, 0.5),
        ("<reasoning>\n</reasoning>\n<answer>\n4\n</answer>\n", 0, 0.5, 0.5),  # strict needs a line of reasoning
        ("<reasoning>\na\n</reasoning>\n<answer>\n</answer>\n", 0, 0.5, 0.5),  # and a line of answer
        ("<reasoning>\na\n</reasoning>\n<answer>\n4", 0, 0, 0.375),  # cut off
        ("<answer>\n4\n</answer>\n<reasoning>\na\n</reasoning>\n", 0, 0, 0.348),
        (STRICT + STRICT, 0, 0.5, 0),
        ("<reasoning>\na <answer> b\n</reasoning>\n<answer>\n4\n</answer>\n", 0, 0.5, 0.5),
        ("<reasoning>\n<reasoning>\na\n</reasoning>\n<answer>\n4\n</answer>\n", 0, 0.5, 0.375),
        ("<reasoning>\na\n</reasoning>\n<answer>\n<answer>\n4\n</answer>\n", 0, 0.5, 0.375),  # they share a newline
        ("<REASONING>\na\n</REASONING>\n<ANSWER>\n4\n</ANSWER>\n", 0, 0, 0),
        ("4", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_format_rewards_are_these_for_these_texts(completion, strict, soft, xmlcount):
    assert pay(strict_format_reward_func, completion) == strict
    assert pay(soft_format_reward_func, completion) == soft
    assert pay(xmlcount_reward_func, completion) == pytest.approx(xmlcount)


def test_each_tag_is_worth_an_eighth_and_only_when_it_is_there_once():
    pieces = ["<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>"]
    assert [pay(xmlcount_reward_func, piece) for piece in pieces] == [0.125] * 4
    assert [pay(xmlcount_reward_func, piece + "x" + piece) for piece in pieces] == [0.0] * 4


def test_only_the_text_after_a_single_closing_tag_costs():
    assert pay(xmlcount_reward_func, "\n</answer>\n" + "x" * 2_000) == pytest.approx(0.125 - 2.0)
    assert pay(xmlcount_reward_func, "\n</answer>" + "x" * 2_000) == pytest.approx(0.125 - 2.0)
    assert pay(xmlcount_reward_func, "\n</answer>x\n</answer>" + "x" * 2_000) == 0.0
    assert pay(xmlcount_reward_func, "4</answer>" + "x" * 2_000) == 0.0


@pytest.mark.parametrize(
    ("found", "gold", "right"),
    [
        ("4", "4", True),
        ("4", "2 + 2 = 4\n#### 4", True),
        ("4.0", "4", True),
        ("$1,072", "1072", True),
        ("1072.", "1,072", True),
        ("-10", "-10", True),
        ("10", "-10", False),
        ("50%", "50", True),
        ("7" * 5_000, "7" * 5_000, True),
        ("7" * 5_000, "7" * 4_999 + "8", False),
        ("5", "4", False),
        ("nan", "4", False),
        ("inf", "9" * 400, False),
        ("²", "2", False),
        ("٤", "4", False),
        ("4 apples", "4", False),
        ("", "4", False),
        ("", "", False),
    ],
)
def test_an_answer_is_right_when_it_is_the_same_number(found, gold, right):
    assert pay(correctness_reward_func, xml(found), gold) == (2.0 if right else 0.0)
    assert pay(numeric_reward_func, f"so\n#### {found}\n", gold) == (1.0 if right else 0.0)


def test_an_answer_that_is_no_number_is_right_when_it_is_the_same_text():
    assert pay(correctness_reward_func, xml(" blue "), "so\n#### blue") == 2.0
    assert pay(correctness_reward_func, xml("Blue"), "blue") == 0.0
    assert pay(correctness_reward_func, xml("٤"), "٤") == 2.0
    assert pay(numeric_reward_func, "#### blue", "blue") == 0.0


def test_an_answer_without_its_format_earns_nothing():
    assert [pay(function, "4") for function in TEXT_REWARDS.values()] == [0.0] * 6


@pytest.mark.parametrize("text", ["²", "٧٢", "７２", "10,72", "4.0", "$4", "nan", "four", ""])
def test_the_integer_reward_wants_plain_digits(text):
    assert pay(int_reward_func, xml(text)) == 0.0


def test_the_integer_reward_pays_a_wrong_integer_of_any_length():
    assert [pay(int_reward_func, xml(text)) for text in ("5", "-1,072", "+4", "7" * 5_000)] == [0.5] * 4


def test_the_first_hash_answer_and_the_last_xml_answer_are_the_ones_that_count():
    assert pay(numeric_reward_func, "#### 4\n#### 5") == 1.0
    assert pay(numeric_reward_func, "#### 5\n#### 4") == 0.0
    assert pay(correctness_reward_func, "<answer>5</answer><answer>4</answer>") == 2.0
    assert pay(correctness_reward_func, "<answer>4</answer><answer>5</answer>") == 0.0


def test_trailing_words_do_not_count_and_punctuation_does_not_matter():
    assert pay(numeric_reward_func, "#### 72 apples", "72") == 0.0
    assert pay(numeric_reward_func, "#### $72.", "72") == 1.0


def test_a_chat_completion_is_its_last_message():
    chat = [{"role": "assistant", "content": "#### 9"}, {"role": "assistant", "content": STRICT + "#### 4"}]
    assert completion_text(chat) == STRICT + "#### 4"
    for function in TEXT_REWARDS.values():
        assert pay(function, chat) == pay(function, STRICT + "#### 4")
    assert pay(numeric_reward_func, chat) == 1.0 and pay(correctness_reward_func, chat) == 2.0


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_each_row_is_scored_by_itself_and_in_order(name):
    completions = [STRICT, "#### 4", xml("5"), "", "#### 5", STRICT + "tail", xml("five"), "<reasoning>\nso"]
    answers = ["4", "5", "5", "4", "#### 5", "5", "five", "4"]
    alone = [pay(REWARDS[name], completion, answer) for completion, answer in zip(completions, answers, strict=True)]
    assert REWARDS[name](prompts=["?"] * 8, completions=completions, answer=answers) == alone
    assert len(set(alone)) > 1


def test_a_column_of_the_wrong_length_is_not_cut_to_fit():
    for function in (correctness_reward_func, numeric_reward_func):
        with pytest.raises(ValueError, match="shorter"):
            function(prompts=["?", "?"], completions=["#### 4", "#### 4"], answer=["4"])


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0), (79, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (150, -1)]
)
def test_the_soft_overlong_penalty_falls_over_the_buffer_to_minus_one(length, reward):
    """DAPO's equation 13 with a budget of 100 tokens and a buffer of 20; the text does not matter."""
    for text in ("", "#### 4"):
        [value] = soft_overlong_reward_func(
            prompts=["?"],
            completions=[text],
            completion_ids=[[7] * length],
            max_completion_tokens=[100],
            overlong_buffer=[20],
            answer=["4"],
        )
        assert value == pytest.approx(reward)


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
@settings(database=None, deadline=None, max_examples=500)
def test_any_text_earns_a_value_in_the_documented_range(completion, answer):
    for name, values in VALUES.items():
        assert pay(REWARDS[name], completion, answer) in values
    assert 0.0 - 0.001 * len(completion) <= pay(xmlcount_reward_func, completion) <= 0.5
    last_number(completion)


@given(TAGGED_TEXT, st.sampled_from(["", "<reasoning>", "<reasoning>\n"]))
@settings(database=None, deadline=None, max_examples=1_000)
def test_the_format_rewards_agree_with_regular_expressions_that_have_dotall(body, start):
    for text in (start + body, start + body + "\n</reasoning>\n<answer>\n4\n</answer>\n"):
        soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, re.DOTALL)
        assert pay(soft_format_reward_func, text) == (0.5 if soft else 0.0)
        tags = re.findall("</?reasoning>|</?answer>", text)
        strict = re.fullmatch(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n", text, re.DOTALL)
        assert pay(strict_format_reward_func, text) == (0.5 if strict and len(tags) == 4 else 0.0)


NO_TAG = st.text().filter(lambda text: "<" not in text)  # hypothesis does try the strings of the modules it tests


@given(NO_TAG, NO_TAG)
@settings(database=None, deadline=None)
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


# --- from names to one number a row ------------------------------------------------------------------------------


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes an importable module and forgets it after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


MY_REWARD = "def my_reward(prompts, completions, answer, **columns):\n    return [len(text) for text in completions]\n"


def test_a_reward_of_ones_own_is_loaded_by_module_and_name(write_module):
    write_module("my_module", MY_REWARD)
    rewards = load_rewards(["numeric_reward_func", "my_module:my_reward"], [1.0, 0.01])
    assert [reward.name for reward in rewards] == ["numeric_reward_func", "my_reward"]
    scores = score(rewards, ["?", "?"], ["#### 4", "four"], {"answer": ["4", "4"]})
    assert scores.by_function == {"numeric_reward_func": [1.0, 0.0], "my_reward": [6.0, 4.0]}
    assert scores.total == pytest.approx([1.06, 0.04])


def test_weights_default_to_one_and_multiply_only_the_total():
    names = ["correctness_reward_func", "int_reward_func"]
    for weights in (None, []):
        assert [reward.weight for reward in load_rewards(names, weights)] == [1.0, 1.0]
    completions = [xml("4"), xml("5"), "4"]
    scores = score(load_rewards(names, [0.5, -2]), ["?"] * 3, completions, {"answer": ["4"] * 3})
    assert scores.total == [0.0, -1.0, 0.0]
    assert scores.by_function == {"correctness_reward_func": [2.0, 0.0, 0.0], "int_reward_func": [0.5, 0.5, 0.0]}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("corectness_reward_func", "correctness_reward_func"),
        ("numeric", "numeric_reward_func"),
        ("int", "int_reward_func"),
        ("xmlcount_reward", "xmlcount_reward_func"),
    ],
)
def test_an_unknown_reward_is_refused_with_the_nearest_known_name(name, nearest):
    with pytest.raises(ValueError, match=f"--rewards '{name}': no such .*nearest known name is {nearest}") as caught:
        load_reward(name)
    assert all(known in str(caught.value) for known in [*REWARDS, "my_module:my_reward"])


@pytest.mark.parametrize("name", ["", ":", "my_module:", ":my_reward", "a:b:c", "./m.py:f", "..m:f", "a/b:f", " "])
def test_what_is_not_a_module_and_a_name_is_refused_before_any_import(name):
    with pytest.raises(ValueError, match="--rewards '.*': no such reward function.*my_module:my_reward"):
        load_reward(name)


def test_a_module_that_cannot_be_imported_is_named(write_module):
    with pytest.raises(ValueError, match="--rewards 'no_such_module:f': cannot import no_such_module .*PYTHONPATH"):
        load_reward("no_such_module:f")
    write_module("needs_more", "import no_such_dependency")
    with pytest.raises(ValueError, match="cannot import needs_more .*no_such_dependency"):
        load_reward("needs_more:f")


@pytest.mark.parametrize(("source", "error"), [("1 / 0", ZeroDivisionError), ("from math import f", ImportError)])
def test_an_error_inside_ones_own_module_keeps_its_traceback(write_module, source, error):
    write_module("broken_module", source)
    with pytest.raises(error):
        load_reward("broken_module:f")


def test_a_function_that_the_module_lacks_is_refused_with_the_nearest_it_has(write_module):
    write_module("my_module", MY_REWARD + "constant = 3\n")
    with pytest.raises(ValueError, match="my_rewrad does not exist in module my_module; the nearest .* my_reward"):
        load_reward("my_module:my_rewrad")
    with pytest.raises(ValueError, match="constant is 3, not a function in module my_module"):
        load_reward("my_module:constant")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="--reward_weights: "):
        load_rewards(["int_reward_func", "numeric_reward_func"], weights)


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="--rewards: no reward function given"):
        load_rewards([], None)


@pytest.mark.parametrize("twin", ["int_reward_func", "my_module:int_reward_func"])
def test_two_rewards_of_one_name_are_refused(write_module, twin):
    write_module("my_module", MY_REWARD.replace("my_reward", "int_reward_func"))
    with pytest.raises(ValueError, match="--rewards 'int_reward_func': two functions called int_reward_func"):
        load_rewards(["int_reward_func", twin], None)


def one(values, name="mine", weight=1.0):
    """A reward that returns these values whatever it is asked."""
    return Reward(name, lambda prompts, completions, **columns: values, weight)


def test_none_leaves_a_function_out_of_its_row_and_all_none_is_nan():
    rewards = [one([1.0, None, None], "a", 2.0), one([1, 3, None], "b", 10.0)]
    scores = score(rewards, ["?"] * 3, ["x"] * 3, {})
    assert scores.total[:2] == [12.0, 30.0] and math.isnan(scores.total[2])
    assert scores.by_function == {"a": [1.0, None, None], "b": [1.0, 3.0, None]}


def test_whatever_float_takes_is_a_value():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    values = [1, True, numpy.float32(0.5), numpy.int64(2), torch.tensor(0.25), torch.tensor([4.0])]
    scores = score([one(values)], ["?"] * 6, ["x"] * 6, {})
    assert scores.total == [1.0, 1.0, 0.5, 2.0, 0.25, 4.0]
    assert {type(value) for value in scores.by_function["mine"]} == {float}
    assert score([one(torch.tensor([1.0, 2.0]))], ["?"] * 2, ["x"] * 2, {}).total == [1.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.5", b"1.5", [1.0, 2.0], {}, 1j, 10**400])
def test_a_value_that_is_no_finite_number_is_refused_with_its_row(bad):
    found = re.escape(repr(bad)[:20])
    with pytest.raises(ValueError, match=f"reward function mine: returned {found}.* for row 1; .*finite number"):
        score([one([0.0, bad])], ["?"] * 2, ["x"] * 2, {})


def test_a_tensor_of_several_elements_is_not_a_value():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="reward function mine: .* for row 0"):
        score([one(torch.zeros(2, 2))], ["?"] * 2, ["x"] * 2, {})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_number_of_values_is_refused(count):
    with pytest.raises(ValueError, match=f"reward function mine: returned {count} values for 2 completions"):
        score([one([0.0] * count)], ["?"] * 2, ["x"] * 2, {})


@pytest.mark.parametrize("returned", [None, 1.0])
def test_a_function_that_returns_no_list_is_refused(returned):
    with pytest.raises(ValueError, match=f"reward function mine: returned {returned}, not a list of 2 values"):
        score([one(returned)], ["?"] * 2, ["x"] * 2, {})


def test_a_column_that_the_data_lacks_is_named():
    with pytest.raises(ValueError, match="numeric_reward_func: missing .*'answer'.* here question;"):
        score(load_rewards(["numeric_reward_func"]), ["?"], ["#### 4"], {"question": ["?"]})
    with pytest.raises(ValueError, match="reward function f: .*'answer'.*columns"):
        score([Reward("f", lambda prompts, completions: [0.0])], ["?"], ["x"], {"answer": ["4"]})


def test_a_type_error_inside_a_reward_is_not_mistaken_for_a_missing_column():
    with pytest.raises(RewardError, match="f: raised TypeError: unsupported operand"):
        score([Reward("f", lambda prompts, completions, **columns: [1 + "1"])], ["?"], ["x"], {})


def test_rows_and_columns_of_different_lengths_are_a_bug_and_not_a_batch():
    for prompts, columns in ((["?"], {}), (["?", "?"], {"answer": ["4"]})):
        with pytest.raises(AssertionError):
            score([one([0.0, 0.0])], prompts, ["x", "x"], columns)


# --- inside TRL --------------------------------------------------------------------------------------------------

# What the model below writes, prompt by prompt: the first token is the prompt, the rest its completion.
SPEECHES = [
    ["xml?", "<reasoning>\n", "2 + 2\nis 4", "\n</reasoning>\n<answer>\n", "4", "\n</answer>\n", "<eos>"],
    ["hash?", "3 + 3\n", "#### 6.0", "<eos>"],
]


def tokenizer_and_model_that_recite_the_speeches():
    """A Qwen2 whose next token depends on the last one alone: embeddings are one-hot, and the layers add nothing.

    A random model never hits the format, and comparing zeros with zeros would prove little.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<eos>", *SPEECHES[0], *SPEECHES[1]]))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )
    config = transformers.Qwen2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(16))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for speech in SPEECHES:
            for token, following in zip(speech, speech[1:], strict=False):
                model.lm_head.weight[vocabulary[following], vocabulary[token]] = 100.0
    return tokenizer, model


@pytest.mark.trl
# TRL 1.16.0 uses names that transformers 5.23 renamed.
@pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated and will be removed in v6:FutureWarning"
)
def test_every_reward_goes_into_trl_unchanged_and_is_logged_there_as_computed_here(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer, model = tokenizer_and_model_that_recite_the_speeches()
    said = []

    def witness(prompts, completions, answer, **columns):
        said.extend(zip(prompts, completions, answer, strict=True))
        return [None] * len(prompts)

    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[*TEXT_REWARDS.values(), witness],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["xml?", "hash?"], "answer": ["4", "3 + 3\n#### 6"]}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
    )
    trainer.train()

    prompts, completions, answers = map(list, zip(*said, strict=True))
    assert sorted(completions) == sorted(["".join(speech[1:-1]) for speech in SPEECHES] * 2)
    [log] = [entry for entry in trainer.state.log_history if "reward" in entry]
    for name, function in TEXT_REWARDS.items():
        mean = sum(function(prompts=prompts, completions=completions, answer=answers)) / len(completions)
        assert log[f"rewards/{name}/mean"] == pytest.approx(mean)
        assert mean > 0
    scores = score(load_rewards(list(TEXT_REWARDS)), prompts, completions, {"answer": answers})
    assert log["reward"] == pytest.approx(sum(scores.total) / len(completions))
