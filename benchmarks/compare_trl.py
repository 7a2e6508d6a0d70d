"""Is it TRL's mathematics? The real `grpo_step` against TRL's real `GRPOTrainer.train()` on the same weights and the
same completions, in float32 on the CPU, and the differences that are meant.

    python -m benchmarks.compare_trl                          all combinations, minutes
    python -m benchmarks.compare_trl --every 20               every twentieth of them, seconds
    python -m benchmarks.compare_trl --output FILE.md         the tables as a file, too

Exit code 1 where a difference is over its bound. And is it faster? A workload's steps on both sides in alternation,
each in a process of its own:

    python -m benchmarks.compare_trl --speed tiny             the embedded job (after its short SFT)
    python -m benchmarks.compare_trl --speed qwen-0.5b --model FOLDER --output FILE.md

with any flags of grpo_core.train; beside FILE.md, FILE.json has the raw numbers and FILE.png the rewards over time.

Needs the extra `trl`.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.workload import names, with_start, workload
from grpo_core.config import GRPOConfig
from rewards.tables import markdown
from sft_core.cli import parser_of, user_errors
from sft_core.helptext import Help, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = Parser(
        [],
        prog="python -m benchmarks.compare_trl",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
        others=[parser_of(GRPOConfig)],
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth combination")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    parser.add_argument("--speed", metavar="WORKLOAD", choices=names(), help="time a workload: " + ", ".join(names()))
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="--speed: timed pairs of steps")
    parser.add_argument("--warm_up", type=int, default=2, metavar="N", help="--speed: pairs before them")
    parser.add_argument("--same_allocator", action="store_true", help="--speed: TRL's process keeps freed memory, too")
    with user_errors():
        options, flags = parser.parse_known_args(argv)
        if flags and not options.speed:
            parser.unknown(flags)
        for name, least in (("every", 1), ("steps", 1), ("warm_up", 0)):
            if getattr(options, name) < least:
                parser.error(f"--{name} {getattr(options, name)}: expected {least} or more")
    if find_spec("trl") is None:
        print("error: the comparison needs trl: pip install -c constraints.txt '.[trl]'", file=sys.stderr)
        return 2
    if options.speed:
        with user_errors():
            timed(options, flags)
        return 0
    _be_quiet()
    from benchmarks.parity.declared import declared_differences

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table, over = compared(options.every, Path(folder))
        declared = declared_differences(Path(folder))
    report = "\n".join(
        [
            "# Compared with TRL",
            "",
            table,
            "",
            "Declared differences, each measured with the same inputs on both sides:",
            "",
            declared,
            "",
            "`G` is trl/trainer/grpo_trainer.py, `C` grpo_config.py.",
            "",
            f"`python -m benchmarks.compare_trl` with trl {version('trl')}, transformers {version('transformers')}, "
            f"torch {torch.__version__}; {time.perf_counter() - started:.0f} s on one CPU thread.",
        ]
    )
    print(report)
    if options.output:
        options.output.write_text(report + "\n")
    for line in over:
        print(f"over its bound: {line}", file=sys.stderr)
    return 1 if over else 0


def timed(options: Namespace, flags: Sequence[str]) -> None:
    """Run both sides in alternation, print the report, and write it where asked."""
    from benchmarks.speed.alternation import alternate
    from benchmarks.speed.report import report, save

    steps = options.steps + options.warm_up
    config = workload(options.speed, ["--max_steps", str(steps), *flags])
    with tempfile.TemporaryDirectory() as folder:
        pairs = alternate(with_start(config, Path(folder)), options.steps, options.warm_up, options.same_allocator)
    text = report(options.speed, [*flags, *["--same_allocator"] * options.same_allocator], pairs)
    print(text)
    if options.output:
        save(options.output, text, pairs)


def compared(every: int, folder: Path) -> tuple[str, list[str]]:
    """The table of largest differences per named loss and option, and what is over its bound."""
    from benchmarks.parity import ours, theirs
    from benchmarks.parity.cases import all_cases
    from benchmarks.parity.compare import BOUNDS, LEAST_MOVED, differences, moved, over_bound

    worst: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    over, least_moved = [], math.inf
    for case in tqdm(all_cases()[::every], unit="case", disable=None):
        config = ours.configuration(case, folder)
        their_trace = theirs.run(case, config, folder)
        our_trace = ours.run(case, config, their_trace.rollouts)
        found = differences(case, our_trace, their_trace)
        over += [f"{stage} {found[stage]:.1e}, not up to {BOUNDS[stage]:.0e}, in {case}" for stage in over_bound(found)]
        least_moved = min(least_moved, moved(our_trace))
        kind = f"{case.loss}, {_options(case.fields)}" if case.fields else case.loss
        counts[kind] = counts.get(kind, 0) + 1
        of_kind = worst.setdefault(kind, {stage: [] for stage in BOUNDS})
        for stage, value in found.items():
            of_kind[stage] += [] if value is None else [value]
    if least_moved < LEAST_MOVED:
        over.append(f"weights moved by {least_moved:.1e} only, not by {LEAST_MOVED:.0e}")

    overall = {stage: [value for of_kind in worst.values() for value in of_kind[stage]] for stage in BOUNDS}
    rows = [["loss and option", "cases", *BOUNDS]]
    rows += [[kind, str(counts[kind]), *(_number(worst[kind][stage]) for stage in BOUNDS)] for kind in worst]
    rows += [["**largest**", str(sum(counts.values())), *(_number(overall[stage]) for stage in BOUNDS)]]
    rows += [["bound", "", *(_number([bound]) for bound in BOUNDS.values())]]
    summary = (
        f"{sum(counts.values())} trajectories of 3 or 4 optimizer steps; in each, the weights move by at least "
        f"{least_moved:.1e}. Largest difference of any rollout, update, row, token, parameter (of "
        "gradients: the norm of a parameter's difference over its gradient's, or over 1% of the whole gradient's where "
        "that is larger):"
    )
    return "\n".join([summary, "", markdown(rows)]), over


def _options(fields: dict[str, object]) -> str:
    """How a case is called: by its recipe alone, or by each option."""
    if "recipe" in fields:
        return f"recipe {fields['recipe']}"
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _number(values: Sequence[float]) -> str:
    """The largest, or nothing where there is none."""
    largest = torch.tensor(values).max().item() if values else None
    return "" if largest is None else "0" if largest == 0 else f"{largest:.1e}"


def _be_quiet() -> None:
    """TRL says for each trainer that names it uses are deprecated, and for each row without reward that it has none."""
    warnings.simplefilter("ignore")
    for name in ("trl", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the models are so small that a second thread only waits for the first


if __name__ == "__main__":
    raise SystemExit(main())
