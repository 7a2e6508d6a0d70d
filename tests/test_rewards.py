"""What the package `rewards` claims: who is paid, who is not, and that no text can break or stall it."""

from __future__ import annotations

import pytest

from rewards import (
    REWARDS,
    completion_text,
    correctness_reward_func,
    int_reward_func,
    numeric_reward_func,
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


def test_an_answer_that_is_no_number_is_right_when_it_is_the_same_words():
    assert pay(correctness_reward_func, xml(" blue "), "so\n#### blue") == 2.0
    assert pay(correctness_reward_func, xml("The Blue."), "blue") == 2.0
    assert pay(correctness_reward_func, xml("blue whale"), "blue") == 0.0
    assert pay(correctness_reward_func, xml("٤"), "٤") == 2.0
    assert pay(numeric_reward_func, "#### blue", "blue") == 1.0
    assert pay(numeric_reward_func, "#### blue", "7") == pay(numeric_reward_func, "#### -7", "7") == 0.0


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
