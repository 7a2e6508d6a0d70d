"""How does a language model learn from text? Supervised fine-tuning, and what all other packages share.

errors, precision, config    what a user may set, and the error when it cannot work
text/                        what is asked: tasks and prompts
model/                       who answers: loading a model, its precision, its two parts
learn/                       how weights move: token rows, log-probabilities, the optimizer
run/                         what a run leaves behind: its folder, log, checkpoints, final model
job, train, dryrun, cli      the SFT loop itself

Each line imports only from the lines above it. The shape legend of all tensor names (`logp_NT`) is in `learn.rows`.
"""
