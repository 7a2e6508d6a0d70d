"""How fast, how large, how equal? Plots of recorded runs, and the records themselves in `benchmarks/results/`."""
