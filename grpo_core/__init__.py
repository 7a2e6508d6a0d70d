"""How does a language model learn from rewards? Group Relative Policy Optimization (arXiv 2402.03300) by hand.

one_page                                             the whole of it on one page, without options
step, objective, reference                           the same with speed and options: the step, its mathematics, pi_ref
variants, dynamic, metrics, completions, config      published variants, what is measured, what can be set
forecast/, doctor/                                   the memory and time that a run will take; what is wrong with it
job, train, dryrun, warmstart                        the loop around the step
pipeline/                                            evaluation, SFT and GRPO in one command

Each line imports only from the lines above it. The shape legend of all tensor names is in `sft_core.learn.rows`.
"""
