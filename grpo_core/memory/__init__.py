"""What a GRPO step holds in memory.

`forecast` says it from the shapes of a model alone, moment by moment, before a weight is read.
Imports from `grpo_core`: config.
"""
