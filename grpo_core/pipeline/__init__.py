"""Evaluation, SFT and GRPO in one command: `python -m grpo_core.pipeline --mode all`

`stageflags` distributes a command line's flags among the stages, `stages` makes their settings of it.
Imports from `grpo_core`: everything; nothing imports from it.
"""
