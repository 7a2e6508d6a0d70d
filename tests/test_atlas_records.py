"""The atlas's own records: what the pages say of them is what they hold."""

from __future__ import annotations

import re

import pytest

from benchmarks.atlas.__main__ import PAGE, RECORDS, recorded
from benchmarks.atlas.claims import claims
from benchmarks.atlas.estimate import study
from benchmarks.atlas.experiments import experiments, questions
from benchmarks.atlas.page import fill, report
from benchmarks.atlas.records import BASELINE, CHECKS, Run
from rewards.jsonl import read_jsonl
from tests.pages import FLAGS, Checker, anchors, links

pytest.importorskip("scipy", reason="pip install '.[test]'")

HOW = "python -m benchmarks.atlas --page"


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return recorded(RECORDS)


def same(page: str, made: str) -> bool:
    """But for the last digit of a decimal: another processor adds up in another order."""
    return Checker().check_output(page, made, FLAGS)


def test_the_page_and_the_tables_are_those_of_the_records(runs: list[Run]) -> None:
    found = study(runs)
    page, tables = PAGE.read_text(encoding="utf-8"), RECORDS.with_name("README.md").read_text(encoding="utf-8")
    assert same(page, fill(page, found)) and same(tables, report(found)), HOW


def test_a_page_with_another_number_is_not_the_same() -> None:
    assert same("+5.2 points", "+5.3 points") and not same("+5.2 points", "+5.4 points")
    assert not same("64 runs", "65 runs")


def test_the_pictures_are_there_and_small(runs: list[Run]) -> None:
    names = {"forest.png", "trl.png", *(f"curves-{run.task}.png" for run in runs)}
    assert names == {path.name for path in RECORDS.parent.glob("*.png")}, HOW
    assert all((RECORDS.parent / name).stat().st_size < 250_000 for name in names)


def test_every_record_is_a_row_of_the_table_with_its_flags() -> None:
    flags = {(each.task, each.name): each.flags for each in experiments()}
    for record in read_jsonl(RECORDS):
        assert record["flags"] == flags[record["task"], record["experiment"]], record["experiment"]


def test_runs_of_one_seed_and_processor_begin_with_the_same_weights(runs: list[Run]) -> None:
    """As far as their answers before training tell, in the precision that nearly all runs have."""
    before: dict[tuple[str, int, str], set[bytes]] = {}
    for run in runs:
        if "--precision" not in run.change:
            before.setdefault((run.task, *run.start), set()).add(run.before.sampled_P.tobytes())
    assert all(len(answers) == 1 for answers in before.values())


def test_every_run_has_a_baseline_beside_it(runs: list[Run]) -> None:
    bases = {(run.task, run.start) for run in runs if run.experiment in (BASELINE, "baseline again")}
    assert {(run.task, run.start) for run in runs} == bases


def test_the_page_has_a_section_with_an_exercise_for_each_question() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = {part.partition("\n")[0].lower(): part for part in text.split("\n## ")[1:]}
    for question in questions():
        part = sections[question.name.lower()]
        assert f"<!-- atlas: {question.task} / {question.name} -->" in part
        for piece in (question.predicted, "*Why.*", "*Elsewhere.*", "*Exercise.*", "<summary>answer</summary>"):
            assert " ".join(piece.split()) in " ".join(part.split()), (question.name, piece)


def test_ten_symptoms_and_more_lead_to_a_section(runs: list[Run]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    part = text.split("## What do I change?")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \d+\. .*$", part, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        assert "<!-- = " in row or "#" in row, "a number or a section with it"
        assert {target.strip("#") for _, target in links(row)} & {*anchors(text)}


def test_the_claims_are_all_recorded(runs: list[Run]) -> None:
    recorded = {run.label for run in runs}
    assert {claim.where for claim in claims()} <= recorded
    assert {name for name in CHECKS} <= {run.experiment for run in runs}
