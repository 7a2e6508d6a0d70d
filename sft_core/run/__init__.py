"""What a run leaves behind.

`runlog` is the run folder, `progress` and `checkpoint` let it resume after any stop, `provenance`, `trackers` and
`card` describe it, `hub` uploads it, `trained` finds it again, `plan_lines` says what a run would do.
Imports from `sft_core`: errors, precision, config, text, model, learn.
"""
