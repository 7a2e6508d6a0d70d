"""Every family of causal language models that transformers knows, tried with a small random model of its own kind:

    python -m benchmarks.families                    all of them
    python -m benchmarks.families qwen3_5_text lfm2  these
    python -m benchmarks.families --output FILE      and write FILE.md and FILE.json

Each line says how far the sampler, the learner and its gradient are from the plain model, whether greedy decoding picks
the plain model's tokens, how far sampler and learner are apart in two steps of GRPO with a KL term, with all weights
and with LoRA, which shortcuts the family does without, and the seconds that all of it took.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.judge import BOUND, Verdict, judged
from rewards.tables import markdown
from sft_core.run.provenance import as_line, provenance

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
COLUMNS = ["family", "", "sampler", "learner", "gradient", "greedy", "GRPO", "LoRA", "does without", "seconds"]
KINDS = ("right", "refused", "not built", "WRONG", "BROKEN")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="as transformers names it; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where a record goes, without its ending")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.families) - set(FAMILIES)):
        parser.error(f"{unknown[0]}: not among transformers' causal language models")
    verdicts = []
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.workers, fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for verdict in pool.map(judged, given.families or FAMILIES):
            verdicts.append(verdict)
            print(" | ".join(row(verdict)), flush=True)
    print("\n" + summary(verdicts))
    if given.output:
        record(verdicts, given.output)
    sys.exit(any(verdict.kind.isupper() for verdict in verdicts))


def row(v: Verdict) -> list[str]:
    if why := v.unbuilt or v.refused or v.broken:
        return [v.family, v.kind, why.replace("|", "/")]
    numbers = [f"{x:.0e}" for x in (v.sampler, v.learner, v.gradient, v.greedy, v.full, v.lora)]
    return [v.family, v.kind, *numbers, ", ".join(v.off), f"{v.seconds:.1f}"]


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.kind for verdict in verdicts)
    return f"{len(verdicts)} families: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) + "."


def record(verdicts: Sequence[Verdict], output: Path) -> None:
    about = provenance(seed=None)
    rows = [row(verdict) for verdict in verdicts]
    text = [
        "# Families of causal language models",
        "`python -m benchmarks.families`: a small random model of each family in the causal mapping of transformers. "
        "Sampler, learner and greedy decoding: largest distance from the plain model in nats, on texts longer than "
        "the sliding windows; gradient: relative distance; GRPO and LoRA: largest distance of sampler and learner in "
        "two steps of `grpo_core.train` with a KL term, with all weights and with an adapter. Float32; at most "
        f"{BOUND:g} is right.",
        f"**{summary(verdicts)}**",
        markdown([COLUMNS, *(found for found in rows if len(found) == len(COLUMNS))]),
        "## Not tried to the end",
        markdown([["family", "", "why"], *(found for found in rows if len(found) == 3)]),
        as_line(about),
    ]
    output.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    found = {"about": about, "verdicts": [verdict.as_json() for verdict in verdicts]}
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
