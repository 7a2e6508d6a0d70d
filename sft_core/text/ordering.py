"""A built-in task without numbers: put words in alphabetical order. An endless, seeded supply, as in arithmetic.py.

A set of words belongs to the held-out or to the training stream by its own hash, whatever order it is asked in.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

from sft_core.text.arithmetic import HELD_OUT_SHARE

WORDS = (
    *("ant", "bee", "cat", "dog", "eel", "fox", "goat", "hen", "ibis", "jay", "kite", "lark", "mole", "newt", "owl"),
    *("pig", "quail", "rat", "seal", "toad", "urial", "vole", "wasp", "yak", "zebra", "bear", "crow", "deer", "elk"),
)


@dataclass(frozen=True)
class OrderingStream:
    """`stream[i]` is problem i as a dict with the columns `question` and `answer`.

    >>> OrderingStream("train", seed=0, difficulty=3)[1]
    {'question': 'Put these words in alphabetical order: hen, deer, crow', 'answer': 'crow, deer, hen'}
    """

    split: Literal["train", "heldout"]
    seed: int
    difficulty: int  # the most words, but at least 2; the fewest is one less

    def __getitem__(self, index: int) -> dict[str, str]:
        rng = random.Random(f"ordering/{self.seed}/{self.split}/{index}")
        while True:
            most = max(2, self.difficulty)
            chosen = rng.sample(WORDS, rng.randint(max(2, most - 1), most))
            ordered = ", ".join(sorted(chosen))
            if (zlib.crc32(ordered.encode()) % HELD_OUT_SHARE == 0) == (self.split == "heldout"):
                return {"question": f"Put these words in alphabetical order: {', '.join(chosen)}", "answer": ordered}
