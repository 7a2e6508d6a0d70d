"""What each change to GRPO does, measured: declared experiments, their runs, and what the records say."""
