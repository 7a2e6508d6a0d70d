"""How good is it? Sampling through `model.generate`, held-out accuracy with its interval, one JSONL line per
problem."""
