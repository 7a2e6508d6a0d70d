"""What a GRPO run will take: memory, and time on this machine or another.

memory       what is held at each moment of a step, from the model's shapes alone
machine      what a machine can do at most
roofline     the least time of each phase of a step on it
hours        the least time of a whole run

Imports from `grpo_core`: config.
"""
