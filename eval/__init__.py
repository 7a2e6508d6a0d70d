"""How good is it? Sampling through `model.generate`, held-out accuracy with its interval, a JSONL line per problem."""
