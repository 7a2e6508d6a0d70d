"""What a GRPO step holds in memory.

`forecast` computes it from a model's shapes alone, moment by moment, before any weight is read.
Imports from `grpo_core`: config.
"""
