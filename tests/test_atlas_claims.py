"""What papers claim is put to the records as it is written down, and judged by its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.atlas.claims import ALIKE, Claim, claims, counts, judged, table
from benchmarks.atlas.estimate import SCALARS, Study, study
from benchmarks.atlas.experiments import experiments
from benchmarks.atlas.intervals import paired
from benchmarks.atlas.records import Run
from tests.atlas_records import records

pytest.importorskip("scipy", reason="pip install '.[test]'")

UP = Claim("mu 4 is better", "A", "ways/mu 4", "above")
DOWN = Claim("mu 4 is worse", "B", "ways/mu 4", "below")
BROKEN = Claim("without clipping it breaks", "C", "ways/mu 8, no clipping", "below")
SAME = Claim("the baseline is itself", "D", "ways/baseline", "none")
WIDE = Claim("mu 2 is nothing", "N", "ways/mu 2", "none")
OTHER = Claim("without clipping nothing changes", "O", "ways/mu 8, no clipping", "none")
LARGER = Claim("larger groups are better", "E", "ways/group 16", "above")
LOOSER = Claim("mu 4 keeps the entropy", "F", "ways/mu 4", "above", of="entropy")
FALLS = Claim("entropy falls", "G", "ways/baseline", "below", of="entropy change")
LEARNS = Claim("it learns", "H", "ways/baseline", "above", of="gain")
MORE = Claim("4 beats 2", "I", "ways/mu 4", "above", against="mu 2")
UNKNOWN = Claim("nobody ran it", "J", "ways/mu 99", "above")
ALL = (UP, DOWN, BROKEN, SAME, LARGER, LOOSER, FALLS, LEARNS, MORE, UNKNOWN)


@pytest.fixture(scope="module")
def found() -> Study:
    return study([Run.of(record) for record in records()])


def test_a_verdict_is_the_side_of_zero_on_which_the_interval_lies(found: Study) -> None:
    verdicts = {each.claim.by: each.verdict for each in judged(found, ALL)}
    assert verdicts == {
        "A": "reproduced",
        "B": "contradicted",
        "C": "reproduced",
        "D": "agrees",
        "E": "not found",
        "F": "contradicted",
        "G": "reproduced",
        "H": "reproduced",
        "I": "reproduced",
    }


def test_no_difference_is_said_only_where_a_large_one_is_excluded(found: Study) -> None:
    narrow, wide, other = judged(found, [SAME, WIDE, OTHER])
    assert (narrow.verdict, wide.verdict, other.verdict) == ("agrees", "unclear", "contradicted")
    assert not wide.found.clear and max(-wide.found.low, wide.found.high) > ALIKE


def test_one_of_many_is_unclear_where_it_would_be_found_alone(found: Study) -> None:
    mask = Claim("masking helps", "K", "budget/mask cut-off rows", "above")
    assert [each.verdict for each in judged(found, [mask])] == ["reproduced"]
    # Forty comparisons of nothing beside it.
    among = judged(found, [mask, *[LARGER] * 40])
    assert among[0].found.clear and among[0].verdict == "unclear"


def test_what_is_measured_is_what_the_claim_names(found: Study) -> None:
    by = {each.claim.by: each.found for each in judged(found, ALL)}
    named = {name: result for (task, name), result in found.results.items() if task == "ways"}
    assert by["A"] == named["mu 4"].difference
    assert by["H"] == named["baseline"].gain
    assert by["F"] == found.between(named["baseline"].experiment, named["mu 4"].experiment, "entropy")
    assert by["I"].value == pytest.approx(
        (named["mu 4"].experiment.after_SP - named["mu 2"].experiment.after_SP).mean()
    )
    curves_S = [run.curve["entropy"] for run in named["baseline"].experiment.runs]
    assert by["G"] == paired(np.array([curve[-4:].mean() - curve[0] for curve in curves_S]))  # 16 points: a fifth is 4


def test_the_table_says_what_is_excluded(found: Study) -> None:
    text = table(found, ALL)
    rows = {line.split(" | ")[1]: line for line in text.splitlines()[2:]}
    assert list(rows) == list("ABCDEFGHI")
    assert (
        rows["A"].endswith("| **reproduced** |")
        and "ways/mu 4: right samples | +9.5 [+4.0, +15.1] points |" in rows["A"]
    )
    assert (
        rows["E"].split(" | ")[-1].startswith("not found; more than +")
        and rows["D"].count("agrees: a difference beyond [") == 1
    )
    assert "ways/mu 4 less mu 2: right samples" in rows["I"] and "ways/baseline: entropy change" in rows["G"]
    assert counts(found, ALL)["claims"] == "9" and counts(found, ALL)["claims contradicted"] == "2"


def test_each_claim_of_the_table_names_experiments_and_a_number() -> None:
    known = {each.label for each in experiments()}
    assert len(claims()) >= 20
    for claim in claims():
        assert {claim.where, f"{claim.where.partition('/')[0]}/{claim.against}"} <= known, claim.says
        assert claim.of in {"difference", "gain", *SCALARS}, claim.says
        assert "arXiv" in claim.by or "exact gradients" in claim.by or "(" in claim.by, claim.says


def test_an_unknown_expectation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text("- {says: x, by: y, where: ways/mu 4, expected: higher}\n")
    with pytest.raises(ValueError, match="claims.yaml: 'x': expected: above, below or none"):
        claims(tmp_path / "claims.yaml")
