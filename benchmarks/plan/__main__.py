"""Will it fit, how long will it take at least, and what would make it smaller? Before a run, from shapes alone:

    python -m benchmarks.plan t4 --gpu t4
    python -m benchmarks.plan t4 --gpu all --model Qwen/Qwen3-1.7B --lora
    python -m benchmarks.plan qwen-0.5b --gpu this --model FOLDER --prompt_tokens 105
    python -m benchmarks.plan t4 --gpu t4 --gpus --prompts_per_step 64
    python -m benchmarks.plan --check --model FOLDER        # the forecast beside real runs

The first argument is a preset of grpo_core or of this package. --gpu: t4, l4, a10g, a100, a100-80, h100, 2080ti, 3060,
3090, 4060ti, 4090, 5090, `all` of them in a table, or `this` machine, whose speed is measured. Any other flag is one of
grpo_core.train. No weight is read, and for Qwen2.5 and Qwen3 of 0.5B to 32B no hub is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.plan.question import answer, every_gpu, question_of
from benchmarks.plan.several import several
from benchmarks.workload import names, workload
from grpo_core.config import GRPOConfig
from sft_core.cli import parser_of, user_errors
from sft_core.helptext import Help, Parser

GBIT = 1e9 / 8  # bytes


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # By hand: argparse would take the value of a flag that is not its own for the name.
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "t4"
    parser = Parser(
        [],
        prog="python -m benchmarks.plan",
        usage="%(prog)s [--help [all]] [NAME] [--gpu NAME] [--check] [--flag value ...]",
        description=__doc__,
        epilog=f"NAME: {', '.join(names())}; default: t4",
        formatter_class=Help,
        allow_abbrev=False,
        others=[parser_of(GRPOConfig)],
    )
    parser.add_argument("--gpu", default="this", help="default: this machine")
    parser.add_argument("--prompt_tokens", type=int, default=0, help="default: --max_prompt_tokens")
    parser.add_argument("--completion_tokens", type=int, default=0, help="default: --max_completion_tokens")
    parser.add_argument("--gpus", action="store_true", help="a table for 1 to 64 of them, --parallel ddp and fsdp")
    parser.add_argument("--network", type=float, default=100, help="Gbit/s between machines of 8 GPUs; default: 100")
    parser.add_argument("--check", action="store_true", help="compare the forecast with real runs on this machine")
    with user_errors():
        given, flags = parser.parse_known_args(arguments)
        if given.check:
            from benchmarks.plan.check import check

            print(check(flags))
            return
        config = workload(name, flags)
        if given.gpu == "all":
            print(every_gpu(config, given.prompt_tokens, given.completion_tokens))
            return
        question = question_of(config, given.gpu, given.prompt_tokens, given.completion_tokens)
        print(several(question, given.network * GBIT) if given.gpus else answer(question))


if __name__ == "__main__":
    main()
