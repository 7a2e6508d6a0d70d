"""How weights move.

`rows` holds tokens in tensors, `logprobs` scores them (`scored` without gradient), `optim` takes a step; `recovery`,
`moments` and `offload` are its handling of faults, checkpoints and memory; `footprint` forecasts that memory, by which
`fit` chooses micro-batches; `clock` measures time.
Imports from `sft_core`: errors, precision, config, text, model.
"""
