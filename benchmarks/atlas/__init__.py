"""What each trick of GRPO does, measured: each option alone, on several seeds, in runs of half a minute."""
