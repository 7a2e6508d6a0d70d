"""What a run leaves behind.

`runlog` is the run folder, `progress` and `checkpoint` make it go on after any stop, `provenance`, `trackers`, `card`
describe it, `hub` uploads it, `trained` finds it again, `told` says what it would do.
Imports from `sft_core`: errors, precision, config, text, model, learn.
"""
