"""Prompts and demonstrations: what is asked, what SFT teaches, and that the rewards pay for exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rewards import (
    correctness_reward_func,
    int_reward_func,
    numeric_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)
from sft_core.config import ModelConfig
from sft_core.model.policy import load_policy
from sft_core.model.tiny import build_tiny
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.prompts import (
    FORMATS,
    SHOT,
    PromptFormat,
    demonstration,
    drop_long_prompts,
    encode_completion,
    encode_prompt,
    prompt_messages,
    system_prompt,
)
from tests.helpers import SHARED, tokenizer

REAL_QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"

APPLES = Example(
    question="Tom has 3 apples. Tom buys 1,200. How many?",
    solution="Tom starts with 3.\nThen 3 + 1200 = <<3+1200=1203>>1,203 apples.\n#### 1,203",
    answer="1,203",
)


def earned(reward: Any, text: str, example: Example = APPLES) -> float:
    [value] = reward(prompts=[example.question], completions=[text], answer=[example.solution])
    return value


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("working", ["", "one line", "several\n\nlines of\nworking = 7"])
@pytest.mark.parametrize("answer", ["7", "-1,072", "3.5"])
def test_an_answer_is_found_again_in_what_was_rendered(fmt: PromptFormat, working: str, answer: str) -> None:
    assert fmt.extract(fmt.render(working, answer)) == answer


def test_formats_are_known_by_their_own_names() -> None:
    assert {name: fmt.name for name, fmt in FORMATS.items()} == {"xml": "xml", "hash": "hash"}


@pytest.mark.parametrize("terse", [False, True])
def test_an_xml_demonstration_earns_every_xml_reward_in_full(terse: bool) -> None:
    text = demonstration(APPLES, FORMATS["xml"], terse)
    rewards = (
        correctness_reward_func,
        int_reward_func,
        strict_format_reward_func,
        soft_format_reward_func,
        xmlcount_reward_func,
    )
    assert [earned(reward, text) for reward in rewards] == [2.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("terse", [False, True])
def test_a_hash_demonstration_earns_the_numeric_reward(terse: bool) -> None:
    assert earned(numeric_reward_func, demonstration(APPLES, FORMATS["hash"], terse)) == 1.0


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_demonstration_shows_the_working_without_calculator_notes(fmt: PromptFormat) -> None:
    text = demonstration(APPLES, fmt)
    assert "Tom starts with 3.\nThen 3 + 1200 = 1,203 apples." in text
    assert "<<" not in text and ">>" not in text


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_terse_demonstration_states_the_answer_and_shows_no_working(fmt: PromptFormat) -> None:
    text = demonstration(APPLES, fmt, terse=True)
    assert "Tom" not in text and "=" not in text and text == fmt.render("", APPLES.answer)


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_the_formats_system_prompt_and_the_question(name: str) -> None:
    assert prompt_messages(APPLES, TaskConfig(prompt_format=name)) == [  # type: ignore[arg-type]
        {"role": "system", "content": system_prompt(FORMATS[name], "number")},
        {"role": "user", "content": APPLES.question},
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_one_shot_adds_exactly_one_answered_question_in_the_same_format(name: str) -> None:
    none = prompt_messages(APPLES, TaskConfig(prompt_format=name))  # type: ignore[arg-type]
    one = prompt_messages(APPLES, TaskConfig(prompt_format=name, shots=1))  # type: ignore[arg-type]
    shown = {"role": "assistant", "content": demonstration(SHOT, FORMATS[name])}
    assert one == [none[0], {"role": "user", "content": SHOT.question}, shown, none[1]]
    assert FORMATS[name].extract(shown["content"]) == SHOT.answer == "16"


def test_a_system_prompt_of_ones_own_replaces_the_formats_and_an_empty_one_sends_none() -> None:
    own = prompt_messages(APPLES, TaskConfig(system_prompt="Be brief."))
    assert own[0] == {"role": "system", "content": "Be brief."} and len(own) == 2
    assert [message["role"] for message in prompt_messages(APPLES, TaskConfig(system_prompt=""))] == ["user"]


def test_the_prompt_ends_where_the_assistant_begins_to_answer() -> None:
    tok = tokenizer()
    text = tok.decode(encode_prompt(tok, [{"role": "user", "content": "Tom has 3 apples."}]))
    assert text == "<|im_start|>user\nTom has 3 apples.<|im_end|>\n<|im_start|>assistant\n"


def test_a_completion_is_the_text_and_the_end_token_and_nothing_else() -> None:
    tok = tokenizer()
    ids = encode_completion(tok, "3+4=7\n#### 7", eos_id=99)
    assert ids[-1] == 99 and tok.decode(ids[:-1]) == "3+4=7\n#### 7"


def test_prompt_and_completion_together_are_the_chat_as_the_template_writes_it() -> None:
    """What SFT trains on is what the template would write for the answered chat: no token between the two is lost."""
    tok = tokenizer()
    messages = [{"role": "user", "content": "Tom has 3 apples."}]
    chat = tok.apply_chat_template([*messages, {"role": "assistant", "content": "#### 3"}], tokenize=False)
    ids = encode_prompt(tok, messages) + encode_completion(tok, "#### 3", tok.eos_token_id)
    assert tok.decode(ids) + "\n" == chat


@pytest.mark.skipif(not REAL_QWEN.is_dir(), reason=f"no Qwen2.5 tokenizer in {REAL_QWEN} (GRPO_SHARED)")
def test_with_the_real_qwen_tokenizer_a_prompt_is_its_chatml_string() -> None:
    tok = AutoTokenizer.from_pretrained(REAL_QWEN)
    config = TaskConfig(prompt_format="xml", shots=1)
    messages = prompt_messages(APPLES, config)
    chatml = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    ids = encode_prompt(tok, messages)
    assert ids == tok(chatml + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert ids.count(tok.convert_tokens_to_ids("<|im_start|>")) == 5  # one id for each turn, not its letters
    completion = encode_completion(tok, demonstration(APPLES, FORMATS["xml"]), tok.eos_token_id)
    assert tok.decode(completion) == demonstration(APPLES, FORMATS["xml"]) + "<|im_end|>"


def test_a_tokenizer_without_a_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path, seed=0)
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    tok = load_policy(ModelConfig(model=str(folder), device="cpu", precision="float32")).tokenizer
    messages = prompt_messages(APPLES, TaskConfig(prompt_format="hash", system_prompt="Be brief."))
    assert tok.decode(encode_prompt(tok, messages)) == f"Be brief.\n\n{APPLES.question}\n\n"


def test_a_thinking_template_is_used_with_thinking_off() -> None:
    """Qwen3's template opens a <think> block of its own in the answer unless enable_thinking is False."""

    class Template:
        def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, list[int]]:
            self.options = options
            return {"input_ids": [1, 2]}

    template = Template()
    assert encode_prompt(template, []) == [1, 2]
    assert template.options["enable_thinking"] is False and template.options["add_generation_prompt"] is True


def test_long_prompts_are_dropped_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tok = tokenizer()
    examples = [Example("Tom has 3 apples. " * n, "#### 3", "3") for n in (1, 9, 2)]
    lengths = [len(encode_prompt(tok, prompt_messages(e, TaskConfig(system_prompt="")))) for e in examples]
    config = TaskConfig(system_prompt="", max_prompt_tokens=lengths[2])
    assert drop_long_prompts(examples, tok, config) == [examples[0], examples[2]]  # a prompt of just that length fits
    assert "left out 1 of 3" in capsys.readouterr().out
    assert drop_long_prompts(examples[:1], tok, config) == examples[:1]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--max_prompt_tokens 2: all 3 prompts are longer"):
        drop_long_prompts(examples, tok, TaskConfig(max_prompt_tokens=2))
    assert drop_long_prompts([], tok, config) == []
