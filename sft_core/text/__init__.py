"""What is asked, as text.

`tasks` reads GSM8K, a JSONL file or the built-in arithmetic, `prompts` makes chat messages and token ids of a problem.
Imports from `sft_core`: errors, config.
"""
