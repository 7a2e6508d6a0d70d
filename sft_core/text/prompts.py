"""How a problem is asked and what a good answer looks like: chat messages for the tokenizer's template."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewards import extract_hash_answer, extract_xml_answer
from sft_core.errors import refused
from sft_core.pairs import read_pairs
from sft_core.text.config import AnswerType, PromptConfig, TaskConfig
from sft_core.text.example import Example, Message

SHOT = Example(
    question="A baker fills 3 trays with 12 rolls each and sells 20 of the rolls. How many rolls are left?",
    solution="The trays hold 3 * 12 = <<3*12=36>>36 rolls.\nAfter the sale 36 - 20 = <<36-20=16>>16 are left.\n#### 16",
    answer="16",
)


@dataclass(frozen=True)
class PromptFormat:
    """`render(working, answer)` writes a demonstration; `extract(text)` finds the answer in a completion, None or ''
    where the format was not kept."""

    name: str
    system: str
    render: Callable[[str, str], str]
    extract: Callable[[str], str | None]


def _render_xml(working: str, answer: str) -> str:
    return f"<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


def _render_hash(working: str, answer: str) -> str:
    return f"{working}\n#### {answer}" if working else f"#### {answer}"


FORMATS = {
    "xml": PromptFormat(
        "xml",
        "Think before you answer, and write exactly in this form, with {answer} as the answer:\n"
        "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n",
        _render_xml,
        extract_xml_answer,
    ),
    "hash": PromptFormat(
        "hash",
        "Work out the answer step by step. Close with a line that holds #### and {answer}, like: #### {like}",
        _render_hash,
        extract_hash_answer,
    ),
}


def system_prompt(fmt: PromptFormat, answers: AnswerType) -> str:
    """What the format says of itself, for answers of this type; nothing where only rewards judge.

    >>> system_prompt(FORMATS["hash"], "multiple_choice")
    'Work out the answer step by step. Close with a line that holds #### and the letter of the choice, like: #### B'
    """
    if answers == "none":
        return ""
    what, like = {"number": ("bare number", "42"), "text": ("bare answer", "blue whale")}.get(
        answers, ("letter of the choice", "B")
    )
    article = "a" if answers == "number" and fmt.name == "xml" else "the"
    return fmt.system.format(answer=f"{article} {what}", like=like)


def demonstration(example: Example, fmt: PromptFormat, terse: bool = False) -> str:
    """The text that SFT teaches for a problem. GSM8K's calculator annotations `<<3*12=36>>` are dropped; `terse` drops
    the working too.

    >>> print(demonstration(SHOT, FORMATS["hash"]))
    The trays hold 3 * 12 = 36 rolls.
    After the sale 36 - 20 = 16 are left.
    #### 16
    >>> demonstration(SHOT, FORMATS["hash"], terse=True)
    '#### 16'
    """
    working = re.sub(r"<<[^<>]*>>", "", example.working).strip()
    return fmt.render("" if terse else working, example.answer)


def is_terse(example: Example, worked_share: float) -> bool:
    """Whether a problem's demonstration only states the answer: by the question's hash, so the same in every epoch."""
    return zlib.crc32(example.question.encode()) % 1000 >= worked_share * 1000


def prompt_messages(example: Example, config: PromptConfig) -> list[Message]:
    """System prompt, the worked example where `--shots 1` asks for it, the conversation until now, and the question."""
    fmt = FORMATS[config.prompt_format]
    system = system_prompt(fmt, config.answers) if config.system_prompt is None else config.system_prompt
    has_its_own = any(message["role"] == "system" for message in example.earlier)
    messages = [{"role": "system", "content": system}] if system and not has_its_own else []
    if config.shots:
        messages += [
            {"role": "user", "content": SHOT.question},
            {"role": "assistant", "content": demonstration(SHOT, fmt)},
        ]
    return [*messages, *example.earlier, {"role": "user", "content": example.question}]


def encode_prompt(tokenizer: Any, messages: list[Message], arguments: dict[str, Any] | None = None) -> list[int]:
    """Ids of the chat up to where the assistant begins to answer. `arguments` are the template's own.

    Raises:
        ValueError: the template fails, or tries what its sandbox forbids.
    """
    # Qwen3's template opens a <think> block of its own in the answer unless this is False; others ignore it.
    options = {"enable_thinking": False, **(arguments or {})}
    with refused("the tokenizer's chat template (--system_prompt '' if it takes no system prompt)"):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
    return list(encoded["input_ids"])


def prompt_ids(tokenizer: Any, example: Example, config: PromptConfig) -> list[int]:
    """A problem's prompt.

    Raises:
        ValueError: as `encode_prompt`.
    """
    arguments = read_pairs("--chat_template_kwargs", config.chat_template_kwargs)
    return encode_prompt(tokenizer, prompt_messages(example, config), arguments)


def encode_completion(tokenizer: Any, text: str, eos_id: int) -> list[int]:
    """Ids of a demonstration and the end-of-sequence token that the model is to learn."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], eos_id]


def drop_long_prompts(examples: list[Example], tokenizer: Any, config: TaskConfig) -> list[Example]:
    """The examples whose prompt is within --max_prompt_tokens; says how many were left out.

    Raises:
        ValueError: no example is left, or one would be left out under --long_prompts refuse.
    """
    limit = config.max_prompt_tokens
    lengths = [len(prompt_ids(tokenizer, example, config)) for example in examples]
    kept = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    left_out = len(examples) - len(kept)
    if examples and not kept:
        raise ValueError(f"--max_prompt_tokens {limit}: all {len(examples)} prompts are longer")
    if left_out and config.long_prompts == "refuse":
        longest = examples[lengths.index(max(lengths))].question
        raise ValueError(
            f"--long_prompts refuse: {left_out} of {len(examples)} prompts are over --max_prompt_tokens {limit}, the "
            f"longest with {max(lengths)} tokens: {longest[:60]!r}"
        )
    if left_out:
        print(f"left out {left_out} of {len(examples)} problems: prompts over {limit} tokens")
    return kept
