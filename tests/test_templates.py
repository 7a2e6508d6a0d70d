"""Chat templates and stop tokens as the families that people use on GSM8K have them.

The templates here are written for the tests, after what each family's own does: which roles it takes, what it opens the
answer with, which tokens end it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from eval.samples import Sampling
from eval.sampling import sample
from sft_core.errors import Refused
from sft_core.model.policy import end_of_sequence_ids
from sft_core.model.source import Source
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.prompts import encode_completion, prompt_ids
from tests.helpers import tiny_policy
from tests.test_trust import wrapped

PROBLEM = Example("Tom has 3.", "#### 3", "3")
SYSTEM = "Be brief."


@dataclass(frozen=True)
class Chat:
    """A family's template; `ends`: the tokens that end an answer, the tokenizer's own first; `prompt`: what PROBLEM
    becomes."""

    template: str
    ends: tuple[str, ...]
    prompt: str
    system: str = SYSTEM
    arguments: tuple[str, ...] = ()


def turns(begin: str, middle: str, end: str, opening: str, first: str = "") -> str:
    """`first`, each message between its marks, and the assistant's opening."""
    return (
        f"{first}{{% for m in messages %}}{begin}{{{{ m['role'] }}}}{middle}{{{{ m['content'] }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


CHATML = ("<|im_start|>", "\n", "<|im_end|>\n")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3 = "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}" + EMPTY_THOUGHT
QWEN3 += "{% endif %}"
OPENED = "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% else %}" + EMPTY_THOUGHT + "{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TWO_TURNS = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTom has 3.<|im_end|>\n"
CHATS = {
    "Qwen2.5": Chat(
        turns(*CHATML, "<|im_start|>assistant\n"),
        ("<|im_end|>", "<|endoftext|>"),
        TWO_TURNS + "<|im_start|>assistant\n",
    ),
    "Qwen3": Chat(
        turns(*CHATML, QWEN3), ("<|im_end|>", "<|endoftext|>"), TWO_TURNS + "<|im_start|>assistant\n" + EMPTY_THOUGHT
    ),
    "Qwen3 that thinks": Chat(
        turns(*CHATML, QWEN3),
        ("<|im_end|>", "<|endoftext|>"),
        TWO_TURNS + "<|im_start|>assistant\n",
        arguments=("enable_thinking=true",),
    ),
    "Qwen3.5 that thinks": Chat(  # its prompt opens the thought
        turns(*CHATML, OPENED),
        ("<|im_end|>",),
        TWO_TURNS + "<|im_start|>assistant\n<think>\n",
        arguments=("enable_thinking=true",),
    ),
    "SmolLM3": Chat(turns(*CHATML, OPENED), ("<|im_end|>",), TWO_TURNS + "<|im_start|>assistant\n" + EMPTY_THOUGHT),
    "Llama 3": Chat(
        turns(
            "<|start_header_id|>",
            "<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            first="{{ bos_token }}",
        ),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nTom has 3.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Gemma": Chat(
        GEMMA,
        ("<end_of_turn>", "<eos>"),
        "<s><start_of_turn>user\nTom has 3.<end_of_turn>\n<start_of_turn>model\n",
        system="",
    ),
    "Phi-4-mini": Chat(
        turns("<|", "|>", "<|end|>", "<|assistant|>"),
        ("<|end|>", "<|endoftext|>"),
        "<|system|>Be brief.<|end|><|user|>Tom has 3.<|end|><|assistant|>",
    ),
    "OLMo 2": Chat(  # one token begins a text and ends it
        turns("<|", "|>\n", "\n", "<|assistant|>\n", first="<|endoftext|>"),
        ("<|endoftext|>",),
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\nTom has 3.\n<|assistant|>\n",
    ),
}
SPECIAL = sorted({token for chat in CHATS.values() for token in chat.ends} | {"<s>"})


def tokenizer_of(chat: Chat) -> Any:
    """One token for each byte; like Llama's, it puts a beginning token before every text that it is given alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*alphabet, *SPECIAL])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIAL)
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token=chat.ends[0], chat_template=chat.template
    )


def config_of(chat: Chat) -> TaskConfig:
    return TaskConfig(system_prompt=chat.system, chat_template_kwargs=list(chat.arguments))


every_chat = pytest.mark.parametrize("name", CHATS)


@every_chat
def test_a_prompt_is_what_the_template_writes_with_one_beginning_token_at_most(name: str) -> None:
    chat = CHATS[name]
    tokenizer = tokenizer_of(chat)
    ids = prompt_ids(tokenizer, PROBLEM, config_of(chat))
    assert tokenizer.decode(ids) == chat.prompt
    assert ids.count(tokenizer.bos_token_id) == chat.prompt.count("<s>")
    assert tokenizer("x")["input_ids"].count(tokenizer.bos_token_id) == 1  # alone it would have had one


@every_chat
def test_a_demonstration_ends_with_the_token_that_ends_a_turn_and_has_no_beginning_token(name: str) -> None:
    tokenizer = tokenizer_of(CHATS[name])
    ids = encode_completion(tokenizer, "#### 3", tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == "#### 3" + CHATS[name].ends[0]


def saying(token: int, real: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's forward that knows nothing but this token."""
    output = real(*args, **kwargs)
    output.logits = torch.full_like(output.logits, -100.0)
    output.logits[..., token] = 0.0
    return output


@every_chat
def test_each_of_a_familys_end_tokens_ends_a_completion_and_is_part_of_it(name: str) -> None:
    chat = CHATS[name]
    tokenizer = tokenizer_of(chat)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in chat.ends]
    shipped = GenerationConfig(eos_token_id=ends)
    source = Source("model", None, Qwen2Config(eos_token_id=ends[-1]), shipped)
    assert list(end_of_sequence_ids(tokenizer, source)) == ends
    policy = replace(tiny_policy(vocab_size=len(tokenizer)), tokenizer=tokenizer, eos_ids=tuple(ends), pad_id=ends[0])
    prompt = prompt_ids(tokenizer, PROBLEM, config_of(chat))
    for end in ends:
        wrapped(policy.model, partial(saying, end))
        samples = sample(policy, [prompt, prompt], Sampling(3))
        assert samples.rows.completion_ids() == [[end]] * 2 and not samples.truncated_N.any()
        assert samples.rows.mask_NT.tolist() == [[True]] * 2  # where it is the padding token, too


def test_a_template_that_takes_no_system_message_is_one_line_that_names_the_flag() -> None:
    chat = CHATS["Gemma"]
    with pytest.raises(Refused, match=r"--system_prompt '' if it takes no system prompt.*System role not supported"):
        prompt_ids(tokenizer_of(chat), PROBLEM, config_of(replace(chat, system=SYSTEM)))


@pytest.mark.parametrize("pair", ["enable_thinking", "=true", ""])
def test_an_argument_for_the_template_that_is_no_pair_is_one_line(pair: str) -> None:
    with pytest.raises(ValueError, match="--chat_template_kwargs"):
        TaskConfig(chat_template_kwargs=[pair]).check()


def test_arguments_for_the_template_are_read_as_json_or_text() -> None:
    arguments = ("n=2", "name=Tom's", "off=false")
    chat = Chat("{{ n + 1 }} {{ name }} {{ off is false }}", ("<|end|>",), "3 Tom's True", arguments=arguments)
    tokenizer = tokenizer_of(chat)
    assert tokenizer.decode(prompt_ids(tokenizer, PROBLEM, config_of(chat))) == chat.prompt
