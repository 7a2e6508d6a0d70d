"""Where what is advised was tried: sections of docs/atlas.md, and experiments of `python -m benchmarks.atlas`."""

from __future__ import annotations

PAGE = "docs/atlas.md"
# By finding: the section of the page, and the rows to look at in it.
MEASURED: dict[str, tuple[str, tuple[str, ...]]] = {
    "skipped_steps": ("precision", ("ways/fp16", "ways/bf16")),
    "sampler_gap": ("how-samples-are-drawn", ("ways/top_p 0.9",)),
    "everything_truncated": (
        "length-with-a-budget-that-cuts",
        ("cut/overlong penalty", "cut/truncated answers left out"),
    ),
    "groups_alike": ("group-size-at-128-samples-a-step", ("ways/groups of 2", "ways/groups of 32")),
    "too_hard": ("rare-success", ("rare/dynamic sampling", "rare/groups of 32", "rare/mu 4")),
    "clipped": ("bounds-on-stale-samples", ("stale/nothing is clipped", "stale/a wide clip", "ways/mu 8")),
    "lr_too_high": ("learning-rate", ("ways/lr 5e-4", "ways/lr 1e-4")),
    "lr_too_low": ("learning-rate", ("ways/lr 5e-6", "ways/LoRA, rank 16, the same lr")),
    "kl_explodes": ("kl-penalty", ("ways/beta 0.04", "ways/beta 0.1")),
    "entropy_collapse": ("entropy", ("ways/lr 5e-6", "ways/mu 4", "ways/entropy bonus 0.1", "stale/clip-higher")),
    "length_to_budget": (
        "length-with-a-budget-that-cuts",
        ("cut/overlong penalty", "cut/Dr. GRPO's constant", "cut/truncated answers left out"),
    ),
    "reward_hacking": ("two-rewards", ("scales/brief counts 10", "ways/wrong answers paid")),
    "reward_flat": ("noise-in-the-reward", ("ways/20% flipped", "ways/40% flipped", "ways/shuffled rewards")),
}


def measured(finding: str) -> str:
    """The section and its rows, for people; empty where nothing was measured.

    >>> measured("lr_too_high")
    'docs/atlas.md#learning-rate (ways/lr 5e-4; ways/lr 1e-4)'
    >>> measured("never_rewarded")
    ''
    """
    if finding not in MEASURED:
        return ""
    section, rows = MEASURED[finding]
    return f"{PAGE}#{section} ({'; '.join(rows)})"
