"""Evaluation, SFT and GRPO in one command: `python -m grpo_core.pipeline --mode all`

`stageflags` shares a command line out among the stages, `stages` lines them up.
Imports from `grpo_core`: everything; nothing imports from it.
"""
