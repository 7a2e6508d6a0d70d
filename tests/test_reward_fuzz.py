"""The extraction and the reward functions take any string."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rewards import (
    correctness_reward_func,
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    is_integer,
    last_number,
    parse_number,
    same_number,
)
from sft_core.text.prompts import FORMATS
from tests.test_rewards import TEXT_REWARDS
from tests.test_rewards_on_any_text import gsm8k_answers

# What the reward functions pay; the count of tags is a range, and is checked by itself.
PAID = {
    "correctness_reward_func": {0.0, 2.0},
    "int_reward_func": {0.0, 0.5},
    "strict_format_reward_func": {0.0, 0.5},
    "soft_format_reward_func": {0.0, 0.5},
    "numeric_reward_func": {0.0, 1.0},
}

# `last_number` as its definition: the last of the numbers found from the left. It takes 0.23 s for a hostile megabyte.
NUMBER = re.compile(
    r"""
    (?: (?<![\w)%])[-+]\$? | \$[-+]? )?
    (?: (?: [1-9][0-9]{0,2} (?: ,[0-9]{3}(?![0-9]) )+ | [0-9]+ ) (?: \.[0-9]+ )? | (?<![0-9])\.[0-9]+ )
    """,
    re.VERBOSE,
)


def last_of_a_scan(text: str) -> str | None:
    found = None
    for match in NUMBER.finditer(text):
        found = match.group()
    return found


def check(texts: Sequence[str]) -> None:
    """Every function on every text; each text is also the gold of the text before it and, in its tags, of itself."""
    answers = [*texts[1:], texts[0]]
    prompts = ["?"] * len(texts)
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        paid = {
            name: function(prompts=prompts, completions=completions, answer=answers)
            for name, function in TEXT_REWARDS.items()
        }
        for name, values in PAID.items():
            assert len(paid[name]) == len(texts) and set(paid[name]) <= values
        for text, value in zip(texts, paid["xmlcount_reward_func"], strict=True):
            assert -0.001 * len(text) <= value <= 0.5
    for text in texts:
        check_extraction(text)
    inside = [f"<answer>{text}</answer>" for text in texts]
    for text, value in zip(texts, correctness_reward_func(prompts, inside, answer=texts), strict=True):
        plain = text.strip() and "</answer>" not in text and "<answer>" not in text and "####" not in text
        assert value == 2.0 or not plain


def check_extraction(text: str) -> None:
    for found in (extract_xml_answer(text), extract_hash_answer(text), gold_answer(text)):
        assert found is None or (found in text and found == found.strip())
    assert [FORMATS[name].extract(text) for name in ("xml", "hash")] == [
        extract_xml_answer(text),
        extract_hash_answer(text),
    ]
    value, number = parse_number(text), last_number(text)
    assert value is None or value.is_finite()
    assert same_number(text, text) == (value is not None)
    assert value is not None or not is_integer(text)
    assert number == last_of_a_scan(text)
    assert number is None or (number in text and parse_number(number) is not None)


# --- tens of thousands of strings

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<answer", "</", "<", ">", "####", "###", "\n", "\n"]
TAGS += [" ", "4", "1,072", "x", "\n</reasoning>\n<answer>\n", "<reasoning>\n", "\n</answer>\n", "\r\n"]
NUMERIC = ["0", "1", "12", "000", "100", "072", ",", ",", ",100", ".", ".", "-", "+", "$", "%", " ", "a", ")", "e", "#"]
NUMERIC += ["²", "٣", "７", "½", "−", "nan", "inf", "_", "0x", "9" * 320]
ODD = ["\ud800", "\udfff", "\0", "\x1c", "\x85", "\u2028", "\u00a0", "\u200b", "\ufeff", "\U0001d7d8", "é", "😀"]
ALPHABETS = [TAGS, NUMERIC, NUMERIC, TAGS + NUMERIC + ODD]

STRINGS, BYTES = 25, 16  # in an example: that many strings, of so many bytes each


def strings(data: bytes) -> Iterator[str]:
    """Strings that are spelled by bytes. Hypothesis draws bytes a hundred times faster than lists of strings."""
    for start in range(0, len(data), BYTES):
        kind, length, *spelling = data[start : start + BYTES]
        spelling = spelling[: 1 + length % (BYTES - 2)]
        if kind % 5 < 4:
            alphabet = ALPHABETS[kind % 5]
            yield "".join(alphabet[byte % len(alphabet)] for byte in spelling)
        else:
            yield "".join(chr(first << 8 | second) for first, second in zip(spelling, spelling[1:], strict=False))


@pytest.mark.parametrize("examples", [1_000, pytest.param(5_000, marks=pytest.mark.slow)])
def test_tens_of_thousands_of_strings_raise_nothing_and_earn_what_is_documented(examples: int) -> None:
    seen: set[str] = set()

    @given(st.binary(min_size=STRINGS * BYTES, max_size=STRINGS * BYTES))
    @settings(database=None, max_examples=examples, suppress_health_check=list(HealthCheck))
    def fuzz(data: bytes) -> None:
        texts = list(strings(data))
        seen.update(texts)
        check(texts)

    fuzz()
    assert len(seen) >= 20 * examples


ANY = st.text(st.characters(exclude_categories=[]))  # lone surrogates as well


@given(st.lists(ANY, min_size=1, max_size=4))
@settings(database=None, max_examples=300)
@example(["nan", "inf", "-Infinity", "sNaN", "1e999999999", "1_000", "0x10", "²", "٣", "７", "½", "−7"])
@example(["7" * 5_000, "9" * 400, "8" * 400, "." + "3" * 5_000, "1" + ",000" * 2_000, "-" * 5_000 + "1"])
@example(["\0", "\ud800", "\udfff<answer>\ud800</answer>", "#### \0", "<answer>\0</answer>", "\x1c####\x85 4\u2028"])
@example(["9**9**9", "__import__('os')", "{}", "%s", "\\", "\\d+", "(a+)+$", "4" * 4_301])
@example(["", " ", "\n", "#" * 9, "<answer></answer>", "</answer><answer>", "<answer><answer>4</answer></answer>"])
def test_any_text_of_any_script_raises_nothing_and_earns_what_is_documented(texts: list[str]) -> None:
    check(texts)


# --- real text


def test_the_last_number_of_every_real_solution_is_its_gold() -> None:
    answers = gsm8k_answers()
    assert len(answers) == 8_792
    for answer in answers:
        gold = gold_answer(answer)
        for text in (answer, f"So it is {gold}.", f"so:\n{gold.replace(',', '')}"):
            assert same_number(last_number(text) or "", gold)
