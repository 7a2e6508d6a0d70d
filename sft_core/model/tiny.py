"""The built-in model: Qwen2's architecture with under a million parameters, and a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from sft_core.text.arithmetic import ArithmeticStream

CONTEXT = 256  # tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's splitting rules (each digit a token), merged until the task's words are one token."""
    stream = ArithmeticStream("train", seed=0, difficulty=4)
    texts = [f"user\n{row['question']}\nassistant\n{row['answer']}" for row in (stream[i] for i in range(2000))]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=450, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def model_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """The built-in model's shape."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny(folder: Path, seed: int) -> Path:
    """Write the untrained model and its tokenizer to `folder` in Hugging Face format."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
