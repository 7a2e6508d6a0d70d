"""How does a language model learn from text?

Tasks and prompts, loading a policy, precision, the run folder, and the supervised fine-tuning loop. The shape legend
that every tensor name in this project follows (`logp_NT`, `reward_BG`) is in `sft_core.rows`.
"""
