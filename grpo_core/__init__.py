"""How does a language model learn from rewards?

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300) by hand. `grpo_core.step` is Algorithm 1 on a
screen; `advantages` and `objective` are its mathematics as functions of tensors; `reference` is the frozen pi_ref;
`train` is the loop around the step. The shape legend that every tensor name follows is in `sft_core.rows`.
"""
