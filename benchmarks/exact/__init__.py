"""The exact-gradient report, block by block: `enumeration` lists every completion and group and weighs them, `rewards`
and `kl` are the blocks. `python -m benchmarks.exact_gradient` is the command."""
