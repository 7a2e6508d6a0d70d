"""No text stalls a reward function: a megabyte made to be slow is read in time linear in its length."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from rewards import (
    REWARDS,
    correctness_reward_func,
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    is_integer,
    last_number,
    numeric_reward_func,
    parse_number,
    same_number,
)

MEGABYTE = 1_000_000
# Seconds of this process, whatever else the machine does. A linear scan takes a hundredth of one, others take minutes.
LIMIT = 10.0

UNITS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "####", "\n", " ", "1", ",111", "1,", ".", "$-", "²"]
UNITS += ["</reasoning> ", "</reasoning>\n<answer>", "\n</answer", "<reasoning>\n", "\n</reasoning>\n", "<", "####\n"]
MORE_UNITS = ["0", ",", "1,000,", "000,", "1.", ".1", "1.1,", "1,1.", "-", "1-", "$", "%", ".%", "7²", "٣", "#", "\t"]
MORE_UNITS += ["#### 1\n", "<answer>\n", "<reasoning><answer>", " \n", "</reasoning> <answer>", "<answer>9", "\u200b"]
MORE_UNITS += [
    "<answer>9</answer>",
    "</reasoning>\n\n",
    "\r\n",
    "4",
    "x",
    "\ud800",
    "\0",
    "\x85",
    "\u2028",
    "\U0001d7d8",
]

XML = "<reasoning>\nso\n</reasoning>\n<answer>1"
BARE, XML_NUMBER, HASH_NUMBER = ("", ""), (XML, "2</answer>"), ("so\n#### 1", "2")  # every unit; the others: some
SHAPES = {
    "bare": BARE,
    "as the xml answer": XML_NUMBER,
    "as the hash answer": HASH_NUMBER,
    "after the first tag": ("<reasoning>", ""),
    "inside the strict format": ("<reasoning>\n", "\n</reasoning>\n<answer>\n4\n</answer>\n"),
    "in an xml answer that is no number": (XML, "x</answer>"),
    "as the whole xml answer": ("<reasoning>\nso\n</reasoning>\n<answer>\n1", "\n</answer>\n"),
    "in a hash answer that is no number": ("so\n#### 1", "x"),
    "as the whole hash answer": ("so\n#### 1", ""),
    "between the tags": ("<reasoning>a</reasoning>", "x<answer>4</answer>"),
    "after the end": ("<reasoning>\na\n</reasoning>\n<answer>\n4\n</answer>", ""),
}


def judged(name: str) -> Callable[[str], object]:
    return lambda text: REWARDS[name](prompts=["?"], completions=[text], answer=["4"])


FUNCTIONS: dict[str, Callable[[str], object]] = {
    **{name: judged(name) for name in REWARDS if name != "soft_overlong_reward_func"},  # which counts tokens
    "correctness of the gold itself": lambda text: correctness_reward_func(["?"], [text], answer=[text]),
    "numeric reward of the gold itself": lambda text: numeric_reward_func(["?"], [text], answer=[text]),
    "extract_xml_answer": extract_xml_answer,
    "extract_hash_answer": extract_hash_answer,
    "gold_answer": gold_answer,
    "last_number": last_number,
    "is_integer": is_integer,
    "parse_number": parse_number,
    "same_number as itself": lambda text: same_number(text, text),
}


class Stalled(Exception):
    """A function that has used up its time."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what is inside after so much processor time. Regular expressions look for signals while they match."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stalled

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hostile_megabyte_stalls_no_function(shape: str) -> None:
    start, end = SHAPES[shape]
    for unit in UNITS + (MORE_UNITS if (start, end) in (BARE, XML_NUMBER, HASH_NUMBER) else []):
        text = start + unit * (MEGABYTE // len(unit)) + end
        for name, function in FUNCTIONS.items():
            try:
                with limited(LIMIT):
                    function(text)
            except Stalled:
                pytest.fail(f"{name} takes more than {LIMIT:.0f} s for {unit!r} repeated, {shape}")


def test_a_megabyte_of_digits_is_compared_with_a_gold_just_as_long() -> None:
    long = "7" * MEGABYTE
    with limited(LIMIT):
        assert correctness_reward_func(["?"], [f"<answer>{long}</answer>"], answer=[long + ".0"]) == [2.0]
        assert numeric_reward_func(["?"], ["#### " + long], answer=[long + ".0"]) == [1.0]


def test_the_limit_stops_a_pattern_that_backtracks() -> None:
    with pytest.raises(Stalled), limited(0.05):
        re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", "<reasoning>" + "</reasoning><answer>" * 50_000)
