"""What a bug of the zoo is: a small patch of the project's source, and the tests that must fail under it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `file`, becomes `new`; then one of `tests` fails."""

    pitfall: int
    name: str
    file: str  # from the repository's root
    old: str
    new: str
    why: str  # what the bug does to training
    tests: tuple[str, ...]  # pytest node ids, without parameters
    hangs_after: float | None = None  # seconds after which a run without an end counts as caught; None: it never does


# Every way in which a from-scratch GRPO goes wrong that has a number here. 1 to 26 were seen in public implementations
# or reproduced; 27 to 32 are slips that the options of `grpo_core` invite, 33 and 34 what saving time and memory does,
# 35 what measuring does, 36 what several processes do.
PITFALLS = {
    1: "A format regex without DOTALL",
    2: "Answers that are read wrongly",
    3: "The end-of-sequence token masked, or found by its value",
    4: "Left padding that is attended to or counted",
    5: "Inputs edited in place",
    6: "Temperature, top-k or top-p missing from the log-probabilities",
    7: "Old log-probabilities computed under other conditions",
    8: "A tiny epsilon where the rewards are equal",
    9: "The standard deviation over G instead of G - 1",
    10: "Averages over micro-batches of unequal length",
    11: "Samples in one order, golds in another",
    12: "exp or a product before the mask",
    13: "An empty completion: 0/0",
    14: "fp16 mistaken for a smaller float32",
    15: "A chunked log-softmax that keeps every chunk for the backward pass",
    16: "Generating without the cache",
    17: "Text tokenized again",
    18: "The log-ratio itself as KL loss",
    19: "Updates that sample again",
    20: "The wrong reference",
    21: "Metrics averaged over padding, or divided twice",
    22: "Resuming off by one in data or random state",
    23: "eval or an unbounded regex on the model's text",
    24: "Sampling in train mode",
    25: "Inherited generation settings",
    26: "NaN that trains on and goes unseen",
    27: "Token losses: the bound on the wrong side, a gradient where none belongs",
    28: "Ratio level and aggregation: the wrong denominator",
    29: "KL and reference: sign, gradient, direction",
    30: "Dynamic sampling: a new group with something of the old one",
    31: "Tokens and rows that should not teach",
    32: "Several reward functions: what is added up when",
    33: "Sampling in less time: prompts read once, rows that leave",
    34: "Less memory: halved copies, moments elsewhere, fewer rows at a time",
    35: "Measuring: samples of another problem, a biased estimate, a look that changes the run",
    36: "Several ranks: what one of them counts, draws, sums or decides alone",
}
