"""The built-in task: an endless, seeded supply of small word problems in GSM8K's schema, so that nothing is downloaded.

A problem starts with a count and applies additions and subtractions to it, each of one digit; the running total stays
between 0 and 10. Problem i of a stream depends on (seed, split, i) alone, so streams keep no state. A chain of numbers
such as 7+5-3 belongs to the held-out or to the training stream by its own hash: no chain asked in an evaluation is ever
trained on, whatever the names, objects and seeds.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

NAMES = ("Tom", "Sue", "Ann", "Ben", "Mia", "Leo", "Eva", "Max")
OBJECTS = ("apples", "pears", "books", "coins", "cards", "shells", "pens", "eggs")
GAINS = ("finds", "buys", "gets")
LOSSES = ("loses", "sells", "gives away")
LARGEST_TOTAL = 10
HELD_OUT_SHARE = 8  # one chain in so many is held out


@dataclass(frozen=True)
class ArithmeticStream:
    """`stream[i]` is problem i as a dict with GSM8K's two columns, `question` and `answer`.

    >>> problem = ArithmeticStream("train", seed=0, difficulty=2)[1]
    >>> problem["question"]
    'Mia has 3 eggs. Mia finds 5. How many eggs does Mia have now?'
    >>> problem["answer"]
    '3+5=<<3+5=8>>8\\n#### 8'
    """

    split: Literal["train", "heldout"]
    seed: int
    difficulty: int  # the most operations; the fewest is one less

    def __getitem__(self, index: int) -> dict[str, str]:
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        while True:
            start, steps = self._chain(rng)
            chain = str(start) + "".join(f"{step:+d}" for step in steps)
            held_out = zlib.crc32(chain.encode()) % HELD_OUT_SHARE == 0
            if held_out == (self.split == "heldout"):
                return _write_problem(start, steps, rng)

    def _chain(self, rng: random.Random) -> tuple[int, list[int]]:
        """A start in 1..9 and signed one-digit steps that keep the total within 0..LARGEST_TOTAL."""
        start = total = rng.randint(1, 9)
        steps: list[int] = []
        for _ in range(rng.randint(max(1, self.difficulty - 1), self.difficulty)):
            step = rng.choice([s for s in range(-9, 10) if s != 0 and 0 <= total + s <= LARGEST_TOTAL])
            steps.append(step)
            total += step
        return start, steps


def _write_problem(start: int, steps: list[int], rng: random.Random) -> dict[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = [f"{name} has {start} {thing}."]
    lines, total = [], start
    for step in steps:
        question.append(f"{name} {rng.choice(GAINS if step > 0 else LOSSES)} {abs(step)}.")
        equation = f"{total}{step:+d}={total + step}"
        lines.append(f"{equation.split('=')[0]}=<<{equation}>>{total + step}")
        total += step
    question.append(f"How many {thing} does {name} have now?")
    return {"question": " ".join(question), "answer": "\n".join([*lines, f"#### {total}"])}


def with_slips(solution: str, share: float) -> str:
    """A careless teacher's working: each line's result is one too large in this share of the lines, and the next line
    goes on from it. Which lines slip depends on the solution alone.

    >>> print(with_slips("7+2=<<7+2=9>>9\\n9-5=<<9-5=4>>4\\n#### 4", share=1.0))
    7+2=<<7+2=10>>10
    10-5=<<10-5=6>>6
    #### 6
    """
    rng, lines, total = random.Random(solution), [], ""
    for line in solution.splitlines():
        if match := re.match(r"(\d+)([+-]\d+)=", line):
            before = total or match[1]
            total = str(int(before) + int(match[2]) + (rng.random() < share))
            line = f"{before}{match[2]}=<<{before}{match[2]}={total}>>{total}"
        lines.append(line)
    return "\n".join([*lines[:-1], f"#### {total}"]) if total else solution
