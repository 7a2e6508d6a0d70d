"""Other ways to decode than in segments (eval/sampling.py): the same draws, of the same tokens.

compiled     a cache of fixed size, and a pass that torch.compile has made
paged        transformers' continuous batching: no padding, rows come and go

No GPU has run either of them yet.
"""
