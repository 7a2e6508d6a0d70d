"""The same rewards as commonly found in public code, mistakes included: what other people's runs were trained with.

Not for training. `python -m rewards RUN --rewards strict_format_reward_func rewards.customary:customary_strict_format`
shows on a run's own completions what each mistake costs:

    function                   what it gets wrong
    customary_correctness      a text without tags is its own answer; 1,072 is not 1072, and 72.0 is not 72
    customary_int              -5 and 1,072 are no integers, and ² is one
    customary_strict_format    no DOTALL: never fires on reasoning of more than one line
    customary_soft_format      the same
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.extract import gold_answer
from rewards.functions import Completion, completion_text

_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")


def customary_xml_answer(text: str) -> str:
    """The text between the last `<answer>` and the next `</answer>`; the whole text if it has neither.

    >>> customary_xml_answer("<answer>\\n4\\n</answer>"), customary_xml_answer("4")
    ('4', '4')
    """
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def customary_correctness(
    prompts: Sequence[Completion], completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """
    >>> customary_correctness(["?"] * 3, ["<answer>1,072</answer>", "1072", "<answer>1072</answer>"], ["1072"] * 3)
    [0.0, 2.0, 2.0]
    """
    found = [customary_xml_answer(completion_text(completion)) for completion in completions]
    return [2.0 if text == gold_answer(gold) else 0.0 for text, gold in zip(found, answer, strict=True)]


def customary_int(prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object) -> list[float]:
    """
    >>> customary_int(["?"] * 3, ["<answer>-5</answer>", "<answer>²</answer>", "5"])
    [0.0, 0.5, 0.5]
    """
    return [0.5 if customary_xml_answer(completion_text(each)).isdigit() else 0.0 for each in completions]


def customary_strict_format(
    prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object
) -> list[float]:
    """
    >>> one, two = (f"<reasoning>\\n{text}\\n</reasoning>\\n<answer>\\n4\\n</answer>\\n" for text in ("2+2", "2\\n+2"))
    >>> customary_strict_format(["?"] * 2, [one, two])
    [0.5, 0.0]
    """
    return [0.5 if _STRICT.match(completion_text(completion)) else 0.0 for completion in completions]


def customary_soft_format(
    prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object
) -> list[float]:
    """
    >>> one, two = (f"<reasoning>{text}</reasoning> <answer>4</answer>" for text in ("2+2", "2\\n+2"))
    >>> customary_soft_format(["?"] * 2, [one, two])
    [0.5, 0.0]
    """
    return [0.5 if _SOFT.match(completion_text(completion)) else 0.0 for completion in completions]
