"""What is asked, as text.

`read` has the rows of files and data sets, `example` makes a problem of a row, `tasks` a training and a held-out side
of problems (`arithmetic` and `ordering` make theirs by code), `prompts` chat messages and token ids.
Imports from `sft_core`: errors, config, pairs.
"""
