"""What papers claim, and what exact gradients predict, put to the records: claims.yaml beside the rows that test it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from benchmarks.atlas import words
from benchmarks.atlas.estimate import FOUND, Study, difference, scalar
from benchmarks.atlas.intervals import Estimate, benjamini_hochberg, paired
from benchmarks.atlas.records import BASELINE
from rewards.tables import markdown

ALIKE = 0.03  # a share: an interval within 3 points of 0 is called no difference
TABLE = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class Claim:
    """A sentence, who says it, and the quantity of an experiment that is to lie above or below 0, or at it."""

    says: str
    by: str
    where: str  # task/experiment
    expected: str  # above, below or none
    of: str = "difference"  # in held-out accuracy; `gain`, a scalar, or `SCALAR change`: from first to last
    against: str = BASELINE

    @property
    def alone(self) -> bool:
        """Whether it is about this experiment's runs by themselves, whatever `against` is."""
        return self.of == "gain" or self.of.endswith(" change")


@dataclass(frozen=True)
class Judged:
    """A claim with what was measured, and how likely that is to be chance (q: among all claims)."""

    claim: Claim
    found: Estimate
    unit: str
    q: float

    @property
    def verdict(self) -> str:
        """`reproduced`, `contradicted`, `unclear` (its interval excludes 0, but it is one of many) or `not found`;
        of a claim that there is no difference: `agrees`, where a large one is excluded, or `contradicted`."""
        clear = self.found.clear and self.q <= FOUND
        if self.claim.expected == "none":
            small = max(abs(self.found.low), abs(self.found.high)) <= ALIKE
            return "agrees" if small else "contradicted" if clear else "unclear"
        if not clear:
            return "unclear" if self.found.clear else "not found"
        return "reproduced" if (self.found.value > 0) == (self.claim.expected == "above") else "contradicted"

    @property
    def told(self) -> str:
        """The verdict with what the interval excludes."""
        if self.verdict == "agrees":
            within = words.interval(self.found, self.unit, "+").partition(" ")[2]
            return f"agrees: a difference beyond {within} is excluded"
        if self.verdict != "not found":
            return self.verdict
        above = self.claim.expected == "above"
        end = words.number(self.found.high if above else self.found.low, self.unit, "+")
        return f"not found; {'more' if above else 'less'} than {end} is excluded"


@cache
def claims(table: Path = TABLE) -> tuple[Claim, ...]:
    """All of them, in the table's order.

    Raises:
        ValueError: `expected` is none of the three words.
    """
    found = tuple(Claim(**each) for each in yaml.safe_load(table.read_text()))
    for claim in found:
        if claim.expected not in ("above", "below", "none"):
            raise ValueError(f"{table.name}: {claim.says!r}: expected: above, below or none")
    return found


def judged(study: Study, known: Sequence[Claim]) -> list[Judged]:
    """The claims whose experiments are recorded."""
    measured = [(claim, *each) for claim in known if (each := _measured(study, claim))]
    q = benjamini_hochberg([found.p for _, found, _ in measured])
    return [Judged(claim, found, unit, each) for (claim, found, unit), each in zip(measured, q, strict=True)]


def _measured(study: Study, claim: Claim) -> tuple[Estimate, str] | None:
    task, _, name = claim.where.partition("/")
    second, first = (study.results.get((task, each)) for each in (name, claim.against))
    if second is None or first is None:
        return None
    if claim.of == "gain":
        return second.gain, "share"
    if claim.of == "difference":
        return difference(first.experiment, second.experiment), "share"
    if claim.alone:
        return paired(study.values(second.experiment, claim.of)), scalar(claim.of).unit
    found = study.between(first.experiment, second.experiment, claim.of)
    return (found, scalar(claim.of).unit) if found else None


def table(study: Study, known: Sequence[Claim]) -> str:
    """A row for each claim: what is claimed, what was measured, the verdict."""
    rows = [["claim", "by", "measured on", "found", "q", "verdict"]]
    for each in judged(study, known):
        claim = each.claim
        where = claim.where if claim.alone or claim.against == BASELINE else f"{claim.where} less {claim.against}"
        what = {"difference": "right samples", "gain": "right samples, after less before"}.get(claim.of, claim.of)
        unit = "points" if each.unit == "share" else each.unit
        found = f"{words.interval(each.found, each.unit, '+')} {unit}".rstrip()
        verdict = f"**{each.told}**" if each.verdict in ("reproduced", "contradicted") else each.told
        rows.append([claim.says, claim.by, f"{where}: {what}", found, words.probability(each.q), verdict])
    return markdown(rows)


def counts(study: Study, known: Sequence[Claim]) -> dict[str, str]:
    """How many claims there are, and how many of each verdict."""
    verdicts = [each.verdict for each in judged(study, known)]
    kinds = ("reproduced", "contradicted", "unclear", "not found", "agrees")
    return {"claims": str(len(verdicts))} | {f"claims {kind}": str(verdicts.count(kind)) for kind in kinds}
