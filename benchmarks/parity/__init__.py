"""The comparison with TRL, piece by piece: `cases` says what is compared, `theirs` and `ours` run it, `declared` lists
where the two differ and why. `python -m benchmarks.compare_trl` is the command."""
