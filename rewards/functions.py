"""The reward functions: what is one completion worth?

A reward function is called as TRL calls it, so that the same function trains here and there:

    def my_reward(prompts, completions, **columns) -> list[float | None]

all by keyword, with one entry per row. A completion is a string, or a list of chat messages whose last one is the
model's. Every column of the dataset is passed under its own name as a list (`answer` is the one used here), and
`**columns` collects whatever else the trainer passes. None means "no opinion on this row": it is left out of the row's
total.

Two families, one for each way to write an answer down, and a penalty:

    function                    gives          for
    correctness_reward_func     0 or 2         the right answer inside <answer>
    int_reward_func             0 or 0.5       an integer inside <answer>, right or wrong
    strict_format_reward_func   0 or 0.5       the format to the letter
    soft_format_reward_func     0 or 0.5       the tags in order
    xmlcount_reward_func        at most 0.5    each tag, minus a penalty for text after the last one
    numeric_reward_func         0 or 1         the right answer after ####
    soft_overlong_reward_func   -1 to 0        a length in tokens near the budget, which arrives in columns of its own
                                               (outside this project give `max_completion_tokens`, `overlong_buffer`)

The format rewards are plain string searches. The customary regular expressions forget DOTALL, so they never fire on
reasoning of more than one line; and with DOTALL they backtrack, quadratically on hostile text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.extract import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    is_integer,
    same_answer,
)

Completion = str | list[dict[str, str]]

REASONING_OPEN = "<reasoning>"
REASONING_CLOSE = "</reasoning>"
TAGS = (REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# Each whitespace character is scanned at most twice, whatever surrounds it: a `\s*` between two fixed tags cannot
# start over from the middle of a run.
_REASONING_THEN_ANSWER = re.compile(rf"{REASONING_CLOSE}\s*{ANSWER_OPEN}")


def completion_text(completion: Completion) -> str:
    """What the model wrote: the string itself, or the content of the last chat message.

    >>> completion_text("4"), completion_text([{"role": "assistant", "content": "4"}])
    ('4', '4')
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correctness_reward_func(
    prompts: Sequence[Completion], completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """2.0 where the text inside the last `<answer>` pair is the gold answer, else 0.0.

    Numbers are compared by value, so that `$1,072` is 1072, anything else as `same_answer` does. An empty answer is
    never right, even where the gold is empty. `answer` is the bare gold or a worked solution that ends in `#### gold`.

    >>> correctness_reward_func(["?", "?"], ["<answer>$1,072</answer>", "1072"], answer=["1072", "so\\n#### 1072"])
    [2.0, 0.0]
    """
    rewards = []
    for completion, column in zip(completions, answer, strict=True):
        found, gold = extract_xml_answer(completion_text(completion)), gold_answer(column)
        rewards.append(2.0 if found and (found == gold or same_answer(found, gold)) else 0.0)
    return rewards


def int_reward_func(prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object) -> list[float]:
    """0.5 where the text inside the last `<answer>` pair is an integer, right or wrong, else 0.0.

    >>> int_reward_func(["?"] * 3, ["<answer>-1,072</answer>", "<answer>four</answer>", "<answer>²</answer>"])
    [0.5, 0.0, 0.0]
    """
    return [0.5 if is_integer(extract_xml_answer(completion_text(completion))) else 0.0 for completion in completions]


def strict_format_reward_func(
    prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object
) -> list[float]:
    """0.5 where the completion is the format to the letter, each tag on a line of its own, once, else 0.0.

    >>> text = "<reasoning>\\n2 + 2\\nis 4\\n</reasoning>\\n<answer>\\n4\\n</answer>\\n"
    >>> strict_format_reward_func(["?", "?"], [text, text + "Bye!"])
    [0.5, 0.0]
    """
    return [0.5 if _is_strict_format(completion_text(completion)) else 0.0 for completion in completions]


def soft_format_reward_func(
    prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object
) -> list[float]:
    """0.5 where the completion starts with `<reasoning>...</reasoning>`, then `<answer>...</answer>`, else 0.0.

    Only white space may stand between the two pairs, and anything may follow.

    >>> soft_format_reward_func(["?", "?"], ["<reasoning>2\\n2</reasoning> <answer>4</answer>", "<answer>4</answer>"])
    [0.5, 0.0]
    """
    return [0.5 if _is_soft_format(completion_text(completion)) else 0.0 for completion in completions]


def xmlcount_reward_func(
    prompts: Sequence[Completion], completions: Sequence[Completion], **columns: object
) -> list[float]:
    """0.125 for each tag that is there once, on a line of its own, minus 0.001 per character after the closing tag.

    At most 0.5; no lower bound, since the penalty grows with the text. One newline right after the closing tag is
    free, because the strict format ends in it.

    >>> text = "<reasoning>\\n2 + 2\\n</reasoning>\\n<answer>\\n4\\n</answer>"
    >>> xmlcount_reward_func(["?"] * 3, [text, text + "\\n", "<reasoning>\\n2 + 2 = 4"])
    [0.5, 0.5, 0.125]
    >>> xmlcount_reward_func(["?"], [text + "\\n" + "x" * 100])
    [0.4]
    """
    return [_xml_count(completion_text(completion)) for completion in completions]


def numeric_reward_func(
    prompts: Sequence[Completion], completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 where the text after the first `####` is the gold answer, a number to within 1e-6, else 0.0.

    Nothing but the answer may stand on that line. Golds that are no numbers are compared as `same_answer`
    does. `answer` is as for `correctness_reward_func`.

    >>> numeric_reward_func(["?"] * 3, ["so\\n#### $72.", "#### 72 apples", "72"], answer=["72", "72", "72"])
    [1.0, 0.0, 0.0]
    """
    rewards = []
    for completion, column in zip(completions, answer, strict=True):
        found = extract_hash_answer(completion_text(completion))
        rewards.append(1.0 if found is not None and same_answer(found, gold_answer(column)) else 0.0)
    return rewards


def soft_overlong_reward_func(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    max_completion_tokens: Sequence[int],
    overlong_buffer: Sequence[int],
    **columns: object,
) -> list[float]:
    """0 up to `overlong_buffer` tokens before the budget's end, then falling linearly to -1 at the budget (DAPO, arXiv
    2503.14476, eq. 13). To be added to a correctness reward: long answers are discouraged before they are cut off.

    >>> ids = [[7] * 80, [7] * 90, [7] * 100]
    >>> soft_overlong_reward_func(["?"] * 3, ["..."] * 3, ids, [100] * 3, [20] * 3)
    [0.0, -0.5, -1.0]
    """
    rewards = []
    for ids, budget, buffer in zip(completion_ids, max_completion_tokens, overlong_buffer, strict=True):
        over = len(ids) - (budget - buffer)
        rewards.append(-min(1.0, over / buffer) if over > 0 else 0.0)
    return rewards


def _occurs_once(text: str, piece: str) -> bool:
    # Not `count`, which skips overlaps: in '\n<answer>\n<answer>\n' it finds '\n<answer>\n' only once.
    first = text.find(piece)
    return first != -1 and first == text.rfind(piece)


def _is_strict_format(text: str) -> bool:
    reasoning, bridge, answer = text.partition(f"\n{REASONING_CLOSE}\n{ANSWER_OPEN}\n")
    return (
        bridge != ""
        and reasoning.startswith(f"{REASONING_OPEN}\n")
        and answer.endswith(f"\n{ANSWER_CLOSE}\n")
        and all(_occurs_once(text, tag) for tag in TAGS)
    )


def _is_soft_format(text: str) -> bool:
    if not text.startswith(REASONING_OPEN):
        return False
    bridge = _REASONING_THEN_ANSWER.search(text)
    return bridge is not None and text.find(ANSWER_CLOSE, bridge.end()) != -1


def _xml_count(text: str) -> float:
    closing = f"\n{ANSWER_CLOSE}"
    pieces = (f"{REASONING_OPEN}\n", f"\n{REASONING_CLOSE}\n", f"\n{ANSWER_OPEN}\n", closing)
    earned = 0.125 * sum(_occurs_once(text, piece) for piece in pieces)
    # With several closing tags it is not clear which text came after the end, and the tag's own 0.125 is lost already.
    extra = text.partition(closing)[2].removeprefix("\n") if _occurs_once(text, closing) else ""
    return earned - 0.001 * len(extra)
