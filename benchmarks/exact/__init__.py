"""The exact-gradient report, block by block: `enumeration` lists every completion and group with its
probability, `rewards` and `kl` are the blocks. `python -m benchmarks.exact_gradient` is the command."""
