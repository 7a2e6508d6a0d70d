"""How weights move.

`rows` are tokens in tensors, `logprobs` scores them (`scored` without gradient), `optim` takes a step; `recovery`,
`moments` and `offload` are its care for faults, checkpoints and memory; `clock` measures.
Imports from `sft_core`: errors, precision, config, text, model.
"""
