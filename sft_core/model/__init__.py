"""Who answers.

`policy` is the model that learns, with its tokenizer and precision; `source` finds it and refuses what cannot work;
`tiny` is the built-in one; `backbone` splits it into body and head; `half`, `allocator`, `shapes` save time and memory.
Imports from `sft_core`: errors, precision, config, text.
"""
