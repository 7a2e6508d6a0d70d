"""The doctor names the cause of every recorded sick run first, and finds nothing in healthy ones.

tests/sick holds the runs and the script that makes them; benchmarks/results holds healthy ones that were made for
other reasons.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.atlas.experiments import experiments
from grpo_core import doctor
from grpo_core.config import GRPOConfig
from grpo_core.doctor.__main__ import CAUSES, GRPO, SFT, as_json, findings, notes, report
from grpo_core.doctor.finding import Finding
from grpo_core.doctor.measured import MEASURED
from grpo_core.doctor.readlog import LEAST_LINES, Run, read_run
from sft_core.job import SFTConfig
from tests.pages import DOCS, anchors
from tests.sick.record import CASES

SICK = Path(__file__).parent / "sick"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
HEALTHY = [SICK / "healthy", SICK / "healthy_mu2_beta", SICK / "sft_healthy", SICK / "too_short"]
HEALTHY += sorted((RESULTS / "embedded").glob("*seed-*"))

# The first finding of each recorded run, where it is not the run's name.
FIRST = {
    "shuffled_rewards": "reward_flat",
    "saturated_reward": "dead_reward",
    "sft_lr_too_high": "sft_diverges",
}
AT_THE_HEELS = {  # a later finding, and what it is said to follow from
    "everything_truncated": {"never_rewarded": "everything_truncated", "too_hard": "everything_truncated"},
    "format_never_earned": {"never_rewarded": "format_never_earned"},
    "lr_too_high": {"too_hard": "lr_too_high", "length_to_budget": "lr_too_high"},
    "clipped": {"lr_too_high": "clipped"},
    "length_to_budget": {"reward_hacking": "length_to_budget"},
}


def names(run: Run) -> list[str]:
    return [finding.name for finding in findings(run)]


@cache
def sick(name: str) -> Run:
    """A recorded run, read once: do not change it."""
    return read_run(SICK / name)


def found(run: Run, name: str) -> Finding:
    return next(finding for finding in findings(run) if finding.name == name)


def changed(run: Run, **of_line: Any) -> Run:
    """The run with these numbers in every line of its log; a function is given the line and its place."""
    lines = [
        {**line, **{key: value(at, line) if callable(value) else value for key, value in of_line.items()}}
        for at, line in enumerate(run.train)
    ]
    return replace(run, train=lines)


def changed_config(run: Run, **settings: Any) -> Run:
    return replace(run, config={**run.config, **settings})


# --- the recorded runs


@pytest.mark.parametrize("name", [name for name in CASES if SICK / name not in HEALTHY])
def test_the_first_finding_is_the_cause_that_the_run_was_given(name: str) -> None:
    assert names(sick(name))[0] == FIRST.get(name, name)


@pytest.mark.parametrize("folder", HEALTHY, ids=lambda folder: folder.name)
def test_nothing_is_found_in_a_healthy_run(folder: Path) -> None:
    run = read_run(folder)
    assert names(run) == []
    assert "Nothing wrong found." in report(run)


@pytest.mark.parametrize("name", AT_THE_HEELS)
def test_a_consequence_names_its_cause(name: str) -> None:
    follows = {finding.name: finding.follows for finding in findings(sick(name))}
    assert AT_THE_HEELS[name].items() <= follows.items()
    assert follows[FIRST.get(name, name)] == ""


def test_every_case_is_recorded_and_every_record_is_a_case() -> None:
    assert {path.name for path in SICK.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(CASES)
    assert sum(path.stat().st_size for path in SICK.rglob("*.*") if path.suffix != ".pyc") < 600_000


def test_no_record_holds_a_path_of_the_machine_that_made_it() -> None:
    for path in SICK.glob("*/*.*"):
        assert not re.search(r"[\"' ]/\w+/|\\\\", path.read_text().replace("\\n", " ")), path


def test_every_finding_but_the_odd_ones_has_a_recorded_run() -> None:
    """Each symptom of the registry fires on at least one real run."""
    runs = [sick(name) for name in CASES]
    for symptom in GRPO:
        assert any(symptom(run) for run in runs if run.grpo), symptom.__name__
    for symptom in SFT:
        if symptom in GRPO:
            continue
        assert any(symptom(run) for run in runs if not run.grpo), symptom.__name__


# --- what is said


def all_findings() -> list[Finding]:
    return [finding for name in CASES for finding in findings(sick(name))]


def test_every_flag_that_is_named_exists() -> None:
    known = {field.name for cls in (GRPOConfig, SFTConfig) for field in fields(cls)}
    told = [f"{finding.what} {finding.evidence} {finding.advice}" for finding in all_findings()]
    told += [note for name in CASES for note in notes(sick(name))]
    told.append(Path(doctor.__file__).with_name("findings.py").read_text())
    flags = {flag for text in told for flag in re.findall(r"--([a-z_]+)", text)}
    assert {"lr", "max_completion_tokens"} <= flags <= known


def test_every_finding_gives_numbers_and_something_to_try() -> None:
    for finding in all_findings():
        assert re.search(r"\d", finding.evidence) and "nan" not in finding.evidence, finding
        assert finding.what.endswith(".") and len(finding.advice) > 20


def test_causes_come_before_what_they_cause() -> None:
    for name in CASES:
        order = names(sick(name))
        for finding in findings(sick(name)):
            assert not finding.follows or order.index(finding.follows) < order.index(finding.name)
    of_function = {"too_easy": "groups_alike", "too_hard": "groups_alike", "lr_too_low": "reward_flat"}
    rank = [symptom.__name__ for symptom in GRPO]
    for name, causes in CAUSES.items():
        assert all(rank.index(cause) < rank.index(of_function.get(name, name)) for cause in causes), name


def test_numbers_are_those_of_the_log() -> None:
    run = sick("everything_truncated")
    evidence = found(run, "everything_truncated").evidence
    assert evidence == "truncated_share 1 (steps 1-2) -> 1 (steps 11-12); the budget is 2 tokens"
    run = sick("dead_reward")
    assert found(run, "dead_reward").evidence == "strict_format_reward_func always 0"
    skipped = found(sick("skipped_steps"), "skipped_steps").evidence
    lost = [line["step"] for line in sick("skipped_steps").train if line["grad_norm"] is None]
    assert f"{len(lost)} of" in skipped and f"steps {lost[0]}, {lost[1]}" in skipped


def test_a_reward_that_reads_another_format_than_the_prompt_asks_for_is_found() -> None:
    finding = found(sick("never_rewarded"), "never_rewarded")
    assert "an answer was found in 100% of the completions" in finding.evidence
    unknown = replace(sick("never_rewarded"), completions=[], eval=[])
    assert "answer was found" not in found(unknown, "never_rewarded").evidence
    assert (
        "yet by the rule of --prompt_format hash 36% are right" in finding.evidence
        and "another format" in finding.advice
    )


def test_a_reward_that_everything_earns_is_not_called_one_that_looks_for_another_format() -> None:
    paid = changed(sick("never_rewarded"), **{"rewards/int_reward_func": 0.5})
    assert "all rewards are equal" in found(paid, "never_rewarded").advice
    wrong = changed(sick("never_rewarded"), accuracy=0.0)
    assert "SFT first" in found(wrong, "never_rewarded").advice


def test_the_shuffled_control_is_not_blamed_on_the_learning_rate() -> None:
    assert "--shuffle_rewards" in found(sick("shuffled_rewards"), "reward_flat").advice
    assert any("control" in note for note in notes(sick("shuffled_rewards")))
    assert (
        "--shuffle_rewards"
        not in found(changed_config(sick("shuffled_rewards"), shuffle_rewards=False), "reward_flat").advice
    )


# --- notes


def test_a_loss_near_0_and_a_ratio_of_1_are_called_normal_on_policy_alone() -> None:
    told = " ".join(notes(sick("healthy")))
    assert "A loss near 0" in told and "ratio of exactly 1" in told
    told = " ".join(notes(sick("healthy_mu2_beta")))
    assert "loss near 0" not in told and "ratio of exactly 1" not in told
    told = " ".join(notes(changed_config(sick("healthy"), beta=0.04)))
    assert "loss near 0" not in told and "ratio of exactly 1" in told


def test_a_run_too_short_to_tell_says_so() -> None:
    assert any("Too short to tell" in note for note in notes(sick("too_short")))
    assert not any("Too short to tell" in note for note in notes(sick("healthy")))
    run = sick("healthy")
    cut = replace(run, train=run.train[:LEAST_LINES])
    assert not any("Too short" in note for note in notes(cut)) and any("stopped at step" in note for note in notes(cut))
    assert not any("stopped at step" in note for note in notes(run))


def test_a_task_that_becomes_solved_is_a_note_and_not_a_finding() -> None:
    run = sick("healthy")
    last = len(run.train) * 3 // 4
    solved = changed(run, accuracy=lambda at, line: 0.95 if at >= last else line["accuracy"])
    assert any("nearly solved" in note for note in notes(solved))
    assert not any("nearly solved" in note for note in notes(run))
    assert not any("nearly solved" in note for note in notes(changed(run, accuracy=0.95)))


def test_greedy_accuracy_far_above_the_samples_is_explained() -> None:
    run = read_run(RESULTS / "embedded" / "seed-42")
    [told] = [note for note in notes(run) if "greedy" in note]
    samples = sum(line["accuracy"] for line in run.train[-16:]) / 16  # the last fifth
    assert f"{run.eval[-1]['accuracy']:.1%} of them right" in told and f"{samples:.1%} right" in told
    near = changed(run, accuracy=lambda at, line: 0.8)
    assert not any("greedy" in note for note in notes(near))


# --- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a recorded run, to spoil."""
    return Path(shutil.copytree(SICK / "too_hard", tmp_path / "run"))


# --- where the advice was tried


def test_what_was_tried_is_a_section_and_rows_of_the_atlas() -> None:
    sections = anchors((DOCS / "atlas.md").read_text(encoding="utf-8"))
    rows = {each.label: each.question for each in experiments()}
    assert MEASURED.keys() <= {*CAUSES, *CASES}
    for name, (section, tried) in MEASURED.items():
        assert section in sections and tried and rows.keys() >= {*tried}, name


def test_a_finding_names_the_rows_that_support_its_advice() -> None:
    text = " ".join(report(sick("entropy_collapse")).split())
    assert "tried: docs/atlas.md#entropy (ways/lr 5e-6; " in text
    told = as_json(sick("entropy_collapse"))["findings"][0]["measured"]
    assert told in text and "tried:" not in report(sick("never_rewarded")).split("\n\n")[1]
