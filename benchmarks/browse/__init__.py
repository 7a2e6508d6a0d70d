"""The completion browser: what a GRPO run sampled, as one page that needs nothing but a browser."""
