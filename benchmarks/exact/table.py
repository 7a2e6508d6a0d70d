"""What the tables of the exact-gradient report have in common: their form, and the language that most are about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from benchmarks.exact.comparison import compare
from benchmarks.exact.enumeration import World, table_policy, world
from grpo_core.config import Aggregation
from rewards.tables import markdown
from sft_core.model.policy import Policy

AGGREGATIONS: tuple[Aggregation, ...] = ("sequence_sum", "constant_length", "sequence_mean", "token_mean")
COMPARED = ("what is averaged", "compared with the gradient of", "predicted size", "size", "cosine", "rest")
WORD = 1  # the token that a right answer holds

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """One block of the report. `says` is the line under it."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[Cell, ...]]
    says: str


@lru_cache(maxsize=1)
def language() -> tuple[World, Policy]:
    """4 tokens, at most 3 of them in a completion: 40 completions, 27 of them cut off by the budget."""
    return world(4, 3), table_policy(4, 3, seed=14)


def compared(name: str, of: str, direction: Tensor, truth: Tensor, predicted: float | str = "") -> tuple[Cell, ...]:
    found = compare(direction, truth)
    if found.size == 0:
        return name, of, predicted, found.size, "-", "-"
    return name, of, predicted, found.size, found.cosine, found.rest


def written(cell: Cell) -> str:
    """Rounding noise is written as 0."""
    if not isinstance(cell, float):
        return str(cell)
    return "0" if abs(cell) < 1e-12 else f"{cell:.4f}"


def block(table: Table) -> str:
    """The table under its title, with what it says below."""
    rows = [table.columns, *(tuple(map(written, line)) for line in table.lines)]
    return "\n".join([f"## {table.title}", "", markdown(rows), "", table.says, ""])
