"""What is wrong with a run? `python -m grpo_core.doctor RUN`

`readlog` reads a run's log, `findings` are the causes that it can show, each with its evidence and its remedy,
`measured` where a remedy was tried.
Imports from `grpo_core`: config.
"""
