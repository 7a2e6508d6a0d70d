"""Every family of causal language models that transformers knows, tried: `python -m benchmarks.families`."""
