"""Answers are found in text and read as numbers, whatever stands around them."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import (
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    is_integer,
    last_number,
    parse_number,
    same_number,
)
from tests.test_rewards import STRICT

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
@settings(database=None)
def test_every_integer_is_read_back_from_every_way_to_write_it(value, style):
    assert parse_number(style.format(value)) == value
    assert is_integer(f"{value:,}") and is_integer(f"{value}")
    assert last_number(f"so it is {value:,}.") == f"{value:,}"


@given(st.text(st.sampled_from("0123456789,.$%+-  ²٣x"), max_size=30))
@settings(database=None, max_examples=300)
def test_the_last_number_of_any_text_is_a_number(text):
    number = last_number(text)
    assert number is None or parse_number(number) is not None
    assert (number is None) == (re.search("[0-9]", text) is None)
