"""The models that the atlas's runs start from: the built-in one after a short SFT, on demonstrations of three kinds.

ways       most demonstrations state the answer, some work it out: the embedded job's start
slips      all are worked out, by a teacher who makes a mistake in most of the lines: right answers are rare
rambling   worked out with some mistakes, and then copied out again, as often as a coin falls on heads: answers of
           all lengths
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

from sft_core.cli import parse_config
from sft_core.job import SFTConfig, prepare
from sft_core.text.arithmetic import ArithmeticStream, with_slips
from sft_core.train import PRESETS, run

DEMONSTRATIONS = 20_000
COPIES = 4  # at most
FLAGS = {
    "ways": "--preset tiny",
    "slips": "--preset learns --slips 0.75",
    "rambling": "--preset tiny --task {demonstrations} --worked_share 1 --max_completion_tokens 144 --eval_problems 64",
}
QUIET = "--log_every 100 --progress False --save_every 0"


def start_of(kind: str, seed: int, folder: Path) -> Path:
    """The model of this kind and seed in `folder`, trained now unless it is there."""
    run_folder = folder / f"{kind}-{seed}"
    if not (run_folder / "final").is_dir():
        flags = f"{FLAGS[kind]} {QUIET} --seed {seed}".split()
        if kind == "rambling":
            flags[flags.index("{demonstrations}")] = str(demonstrations(folder / f"{kind}-{seed}.jsonl", seed))
        unfinished = run_folder.with_name(f"{run_folder.name}.unfinished")
        config = parse_config(SFTConfig, [*flags, "--output_dir", str(unfinished), "--resume"], PRESETS)
        with contextlib.redirect_stdout(io.StringIO()):
            run(prepare(config))
        unfinished.rename(run_folder)
    return run_folder / "final"


def demonstrations(path: Path, seed: int) -> Path:
    """Write the rambling teacher's problems and answers."""
    stream = ArithmeticStream("train", seed, difficulty=4)
    with path.open("w", encoding="utf-8") as file:
        for index in range(DEMONSTRATIONS):
            row = stream[index]
            file.write(json.dumps(row | {"answer": rambling(row["answer"], random.Random(f"{seed}/{index}"))}) + "\n")
    return path


def rambling(solution: str, rng: random.Random) -> str:
    """A worked solution in which one line in ten is off by one, with its lines copied out up to COPIES times.

    >>> print(rambling("7+2=<<7+2=9>>9\\n#### 9", random.Random(3)))
    7+2=<<7+2=9>>9
    7+2=<<7+2=9>>9
    #### 9
    """
    *lines, answer = with_slips(solution, share=0.1).splitlines()
    copies = 0
    while copies < COPIES and rng.random() < 0.5:
        copies += 1
    return "\n".join([*lines * (1 + copies), answer])
