"""The doctor names the cause of every recorded sick run first, and finds nothing in healthy ones.

tests/sick holds the runs and the script that makes them; benchmarks/results holds healthy ones that were made for
other reasons.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core import doctor
from grpo_core.config import GRPOConfig
from grpo_core.doctor.__main__ import CAUSES, GRPO, SFT, as_json, findings, main, notes, report
from grpo_core.doctor.finding import FELL, MOVED, STILL, Finding
from grpo_core.doctor.readlog import LEAST_LINES, Change, Run, read_run
from rewards.jsonl import read_jsonl
from sft_core.job import SFTConfig
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


def test_a_reward_that_reads_another_format_than_the_prompt_asks_for_is_told_so() -> None:
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


def test_a_task_that_becomes_solved_is_a_note_and_no_illness() -> None:
    run = sick("healthy")
    last = len(run.train) * 3 // 4
    solved = changed(run, accuracy=lambda at, line: 0.95 if at >= last else line["accuracy"])
    assert any("nearly solved" in note for note in notes(solved))
    assert not any("nearly solved" in note for note in notes(run))
    assert not any("nearly solved" in note for note in notes(changed(run, accuracy=0.95)))


# --- thresholds: the healthy run with one thing changed


def rising(start: float, end: float) -> Any:
    return lambda at, line: start + (end - start) * at / 29 + 0.001 * (-1) ** at


def stepping(before: float, after: float) -> Any:
    return lambda at, line: before if at < 15 else after


FLAT = {"reward_mean": 0.3}


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("skipped_steps", {"skipped_steps": 1}, {"skipped_steps": 2}),  # of 60 updates
        ("first_ratio", {"ratio_first_max": 1.0009}, {"ratio_first_max": 1.0011}),
        ("first_ratio", {"ratio_first_min": 0.9991}, {"ratio_first_min": 0.9989}),
        ("sampler_gap", {"sampler_gap_mean": 9e-4}, {"sampler_gap_mean": 1.1e-3}),
        ("everything_truncated", {"truncated_share": 0.79}, {"truncated_share": 0.81}),
        ("too_easy", {"zero_variance_share": 0.69, "accuracy": 0.95}, {"zero_variance_share": 0.71, "accuracy": 0.95}),
        ("too_easy", {"zero_variance_share": 0.8, "accuracy": 0.89}, {"zero_variance_share": 0.8, "accuracy": 0.91}),
        ("too_hard", {"zero_variance_share": 0.8, "accuracy": 0.16}, {"zero_variance_share": 0.8, "accuracy": 0.14}),
        ("groups_alike", {"zero_variance_share": 0.69}, {"zero_variance_share": 0.71}),
        (
            "clipped",
            {"zero_variance_share": 0.5, "clip_ratio_low": 0.02, "clip_ratio_high": 0.029},
            {"zero_variance_share": 0.5, "clip_ratio_low": 0.02, "clip_ratio_high": 0.031},
        ),
        ("kl_explodes", {"kl": 0.99}, {"kl": 1.01}),
        ("entropy_collapse", {"entropy": rising(0.2, 0.06)}, {"entropy": rising(0.2, 0.02)}),
        ("entropy_collapse", {"entropy": stepping(0.16, 0.042)}, {"entropy": stepping(0.16, 0.038)}),
        ("entropy_collapse", {"entropy": stepping(1.0, 0.055)}, {"entropy": stepping(1.0, 0.045)}),
        ("lr_too_high", {**FLAT, "grad_norm": stepping(1.0, 9.0)}, {**FLAT, "grad_norm": stepping(1.0, 11.0)}),
        ("lr_too_high", {**FLAT, "entropy": stepping(0.2, 0.57)}, {**FLAT, "entropy": stepping(0.2, 0.63)}),
        ("length_to_budget", {"length_mean": rising(10, 37)}, {"length_mean": rising(10, 43)}),
        ("length_to_budget", {"length_mean": rising(40, 45)}, {"length_mean": rising(30, 45)}),
        ("reward_hacking", {"accuracy": rising(0.3, 0.31)}, {"accuracy": rising(0.3, 0.2)}),
        ("lr_too_high", {"reward_mean": rising(0.3, 0.35)}, {"reward_mean": rising(0.4, 0.2)}),
    ],
)
def test_a_finding_begins_at_its_threshold(name: str, below: dict[str, Any], above: dict[str, Any]) -> None:
    run = replace(sick("healthy"), eval=[])
    assert name not in names(changed(run, **below))
    assert name in names(changed(run, **above))


FALLING = [{"problems": 128, "accuracy": value} for value in (0.6, 0.6, 0.3)]
RISING = [{"problems": 128, "accuracy": value} for value in (0.2, 0.3, 0.6)]


@pytest.mark.parametrize(
    ("name", "excused", "ill", "heldout"),
    [
        ("entropy_collapse", {"accuracy": 0.95, "entropy": stepping(0.2, 0.01)}, {"entropy": stepping(0.2, 0.01)}, []),
        ("reward_hacking", {"accuracy": 0.95}, {"accuracy": 0.85}, []),
        ("reward_flat", {**FLAT, "accuracy": 0.3, "zero_variance_share": 0.8}, {**FLAT, "accuracy": 0.3}, []),
        (
            "groups_alike",
            {"zero_variance_share": lambda at, line: 0.1 if at < 6 else 1.0},
            {"zero_variance_share": lambda at, line: 0.4 if at < 6 else 1.0},
            [],
        ),
        ("heldout_falls", {"accuracy": 0.3}, {}, FALLING),
        ("heldout_falls", {**FLAT}, {}, FALLING),
        (
            "lr_too_high",
            {"reward_mean": lambda at, line: (0.1, 0.5, 0.35)[at // 10]},
            {"reward_mean": lambda at, line: (0.1, 0.5, 0.25)[at // 10]},
            [],
        ),
        (
            "never_rewarded",
            {"rewards/numeric_reward_func": lambda at, line: at, "rewards_std/numeric_reward_func": 0},
            {"rewards/numeric_reward_func": 0, "rewards_std/numeric_reward_func": 0},
            [],
        ),
    ],
)
def test_what_looks_alike_and_has_another_reason_is_not_found(
    name: str, excused: dict[str, Any], ill: dict[str, Any], heldout: list[Any]
) -> None:
    run = replace(sick("healthy"), eval=heldout)
    assert name not in names(changed(run, **excused))
    assert name in names(changed(run, **ill))


def test_held_out_accuracy_that_rises_clears_a_reward_of_hacking() -> None:
    run = changed(sick("healthy"), accuracy=0.3)
    assert "reward_hacking" not in names(replace(run, eval=RISING))
    assert "reward_hacking" in names(replace(run, eval=[]))


def test_a_few_skipped_updates_are_no_illness() -> None:
    run = changed_config(sick("healthy"), mu=5)  # 300 updates
    assert "skipped_steps" not in names(changed(run, skipped_steps=6))
    assert "skipped_steps" in names(changed(run, skipped_steps=7))


@pytest.mark.parametrize(("answered", "is_found"), [(40, True), (60, False)])
def test_a_format_that_is_found_now_and_then_is_not_called_unknown(answered: int, is_found: bool) -> None:
    rows = [{"extracted": "7" if row < answered else ""} for row in range(1000)]
    run = replace(sick("format_never_earned"), completions=rows)
    assert ("format_never_earned" in names(run)) == is_found


def test_a_task_without_numbers_is_not_blamed_for_its_format() -> None:
    """The rule of --prompt_format finds no answer where a reward of one's own asks for something else, and pays."""
    run = replace(sick("healthy"), completions=[{"extracted": None}] * 100)
    assert names(run) == []


@pytest.mark.parametrize(("noise", "is_found"), [(0.026, True), (0.045, False)])
def test_a_reward_that_falls_must_fall_by_more_than_its_noise(noise: float, is_found: bool) -> None:
    """From 0.5 to 0.4, with lines that jump by twice `noise`: a fall of 5 errors, and one of 3."""
    run = changed(sick("healthy"), reward_mean=lambda at, line: (0.5 if at < 15 else 0.4) + noise * (-1) ** at)
    fall = run.change("reward_mean").fall
    assert (4 < fall < 6) if is_found else (2.5 < fall < 4), fall
    assert ("lr_too_high" in names(run)) == is_found


def test_an_illness_of_the_optimizer_is_told_by_its_signs_too() -> None:
    flat = changed(sick("healthy"), reward_mean=0.3)
    for key in ("grad_norm", "entropy"):
        wild = changed(flat, **{key: lambda at, line: 0.2 if at < 15 else 4.0 + 0.1 * (-1) ** at})
        assert names(wild)[0] == "lr_too_high"
    calm = changed(flat, grad_norm=lambda at, line: 0.2 if at < 15 else 1.9, entropy=0.1)
    assert "lr_too_high" not in names(calm)
    learns = changed(sick("healthy"), grad_norm=lambda at, line: 0.2 if at < 15 else 4.0)
    assert names(learns) == []  # the reward has risen all the same


def test_a_flat_reward_is_a_matter_of_the_learning_rate_only_where_there_is_none() -> None:
    flat = replace(changed(sick("healthy"), reward_mean=0.3, accuracy=0.3), eval=[])
    assert names(flat) == ["reward_flat"]
    assert names(changed(flat, learning_rate=1.1e-7)) == ["reward_flat"]
    assert names(changed(flat, learning_rate=1e-7)) == ["lr_too_low"]
    assert names(changed(flat, grad_norm=0.0)) == []
    better = [{"problems": 128, "accuracy": value} for value in (0.24, 0.6)]
    assert names(replace(flat, eval=better)) == []  # greedy answers have become better


def test_held_out_accuracy_must_fall_by_more_than_chance() -> None:
    run = sick("healthy")

    def ending(accuracy: float) -> Run:
        return replace(run, eval=[{"problems": 128, "accuracy": value} for value in (0.3, 0.6, accuracy)])

    assert names(ending(0.5)) == []
    assert names(ending(0.45)) == ["heldout_falls"]
    from_nothing = [{"problems": 128, "accuracy": value} for value in (0.0, 0.6, 0.49)]
    assert names(replace(run, eval=from_nothing)) == []  # the best one's luck counts, not the first one's


def test_the_overlong_penalty_may_stay_at_0_and_a_reward_that_never_has_an_opinion_may_not() -> None:
    run = sick("healthy")
    extra: dict[str, Any] = {"rewards/soft_overlong_reward_func": 0.0, "rewards_std/soft_overlong_reward_func": 0.0}
    assert names(changed(run, **extra)) == []
    assert names(changed(run, **{"rewards/judge": 0.0, "rewards_std/judge": 0.0})) == ["dead_reward"]
    silent = changed(run, **{"rewards/judge": None, "rewards_std/judge": None})
    assert names(silent) == ["dead_reward"] and found(silent, "dead_reward").evidence == "judge always None"
    assert names(changed(run, **{"rewards/judge": 1.0, "rewards_std/judge": 0.06})) == []
    assert names(changed(run, **{"rewards/judge": 1.0, "rewards_std/judge": 0.04})) == ["dead_reward"]
    assert names(changed(run, **{"rewards/judge": 0.001, "rewards_std/judge": 0.03})) == []


def test_where_every_reward_is_earned_by_all_the_task_is_too_easy_and_no_function_dead() -> None:
    earned: dict[str, Any] = {f"{kind}/judge": value for kind, value in (("rewards", 1.0), ("rewards_std", 0.0))}
    earned |= {"rewards/numeric_reward_func": 0.99, "rewards_std/numeric_reward_func": 0.01}
    assert names(changed(sick("healthy"), **earned, accuracy=0.99, zero_variance_share=0.9)) == ["too_easy"]


def test_a_cut_sampler_and_half_precision_are_told_from_a_bug() -> None:
    gap = changed(sick("healthy"), sampler_gap_mean=0.01)
    assert "a bug" in found(gap, "sampler_gap").advice
    assert "sampler_gap" not in names(changed_config(gap, precision="bf16"))
    assert "--top_k 5" in found(changed_config(gap, top_k=5), "sampler_gap").advice


def test_a_loss_that_ends_higher_or_moves_nowhere_is_found() -> None:
    run = sick("sft_healthy")
    assert names(changed(run, loss=rising(2.0, 2.5))) == []  # 20 lines: 2 to 2.33
    assert names(changed(run, loss=rising(2.0, 4.0))) == ["sft_diverges"]
    assert names(changed(run, loss=lambda at, line: [0.9, 5.0, 4.0, 3.0][min(at, 3)] - at / 12)) == ["sft_diverges"]
    assert names(changed(run, loss=lambda at, line: 2 + 0.1 * (-1) ** at)) == ["sft_loss_flat"]


def test_gspo_clips_more_by_intent() -> None:
    run = changed(sick("healthy"), zero_variance_share=0.0, clip_ratio_low=0.1, clip_ratio_high=0.1)
    assert "clipped" in names(run)
    assert "clipped" not in names(changed_config(run, loss="gspo"))
    assert "clipped" not in names(changed_config(run, ratio_level="sequence"))


# --- a change and its noise


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=LEAST_LINES, max_size=60), st.floats(0.1, 10), st.floats(-100, 100))
def test_a_change_is_told_alike_in_other_units(values: list[float], scale: float, shift: float) -> None:
    values = [round(value, 3) for value in values]
    first, second = Change.of(values), Change.of([scale * value + shift for value in values])
    if first.error > 1e-3:
        assert second.z == pytest.approx(first.z, rel=1e-4, abs=1e-4)
        assert second.fall == pytest.approx(first.fall, rel=1e-4, abs=1e-4)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=LEAST_LINES, max_size=60))
def test_a_change_backwards_is_the_opposite_change(values: list[int]) -> None:
    forward, backward = Change.of(values), Change.of(values[::-1])
    assert forward.z == pytest.approx(-backward.z) and forward.peak == pytest.approx(backward.peak)
    assert forward.fall >= 0 and forward.fall >= -forward.z


def test_noise_alone_is_seldom_taken_for_a_change() -> None:
    """As seldom as MOVED, STILL and FELL say, a little more because the noise is estimated too."""
    rng = random.Random(0)
    changes = [Change.of([rng.gauss(0.5, 0.1) for _ in range(40)]) for _ in range(2000)]

    def share(beyond: float) -> float:
        return fmean(abs(change.z) >= beyond for change in changes)

    assert 0.03 < share(STILL) < 0.08 and share(MOVED) < 0.01
    assert fmean(change.fall >= FELL for change in changes) < 0.02


def test_a_change_is_found_where_there_is_no_noise_and_none_where_nothing_changes() -> None:
    assert Change.of([1.0] * 20).z == Change.of([1.0] * 20).fall == 0
    assert Change.of([1.0] * 10 + [2.0] * 10).z > 3


def test_a_fifth_is_two_lines_at_least() -> None:
    assert math.isnan(Change.of([1.0, 3.0, *[0.0] * 7]).first)
    assert Change.of([1.0, 3.0, *[0.0] * 8]).first == 2


# --- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a recorded run, to spoil."""
    return Path(shutil.copytree(SICK / "too_hard", tmp_path / "run"))


def test_a_torn_last_line_is_left_out(folder: Path) -> None:
    log = folder / "log.jsonl"
    whole = read_jsonl(log, torn_end=True)
    for torn in ('{"kind": "train", "st', '{"kind": "train", "text": "\xe4'):
        log.write_bytes((SICK / "too_hard" / "log.jsonl").read_bytes() + torn.encode("latin-1"))
        assert read_jsonl(log, torn_end=True) == whole and names(read_run(folder))[0] == "too_hard"


def test_a_line_that_is_torn_in_the_middle_is_an_error_that_names_it(folder: Path) -> None:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 4: is not JSON"):
        read_run(folder)


@pytest.mark.parametrize("text", ["", '{"kind": "tra', '{"kind": "eval", "step": 0, "problems": 4, "accuracy": 0.5}\n'])
def test_a_log_without_a_step_finds_nothing_and_says_so(folder: Path, text: str) -> None:
    (folder / "log.jsonl").write_text(text)
    run = read_run(folder)
    assert names(run) == [] and notes(run) == ["No step has been logged: nothing can be told."]
    assert "Nothing wrong" not in report(run) and as_json(run)["steps"] == []


@pytest.mark.parametrize("name", CASES)
def test_null_stands_for_a_number_that_was_not_finite(name: str) -> None:
    run = sick(name)
    for key in run.train[0].keys() - {"kind", "step"}:
        nulls = replace(run, train=[{**line, key: None} for line in run.train])
        report(nulls)
        json.dumps(as_json(nulls), allow_nan=False)


def test_one_lost_number_leaves_its_quantity_readable() -> None:
    run = sick("healthy")
    for key in run.train[0].keys() - {"kind", "step"}:
        one = replace(run, train=[{**run.train[0], key: None}, *run.train[1:]])
        assert names(one) == [] and "nan" not in report(one), key


@pytest.mark.parametrize("name", CASES)
def test_an_older_log_lacks_quantities_and_is_read_all_the_same(name: str) -> None:
    run = sick(name)
    for key in run.train[0].keys() - {"kind", "step"}:
        lacking = replace(run, train=[{k: v for k, v in line.items() if k != key} for line in run.train])
        assert report(lacking)


@pytest.mark.parametrize("missing", ["config.yaml", "log.jsonl", "both"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(
    folder: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "log.jsonl"):
        if missing in (name, "both"):
            (folder / name).unlink()
    with pytest.raises(SystemExit) as caught:
        main([str(folder)])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"error: [^\n]*expected a run folder[^\n]*\n", said.err)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "question: 3", "accuracy: 1\nlr: 1", "batch_size: 3"])
def test_a_config_that_is_of_no_run_is_one_line_and_exit_code_2(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main([str(folder)])
    assert caught.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


# --- the command


def test_the_command_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SICK / "everything_truncated")])
    said = capsys.readouterr().out
    assert said.startswith("everything_truncated: GRPO, steps 1 to 12, 12 log lines\n\n1. Completions do not end")
    assert "Probably a consequence of 1." in said and "--max_completion_tokens" in said
    assert re.search(r"completions cut off +100.0% +100.0%\n", said)
    assert max(map(len, said.splitlines())) <= 100


def test_the_command_prints_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SICK / "everything_truncated"), "--json"])
    said = json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(constant))
    assert (said["kind"], said["steps"]) == ("grpo", [1, 12])
    assert said["findings"][0]["name"] == "everything_truncated"
    assert said["findings"][0].keys() == {"name", "what", "evidence", "advice", "follows"}
    assert said["numbers"]["truncated_share"] == [1, 1]
    main([str(SICK / "sft_healthy"), "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "sft"


def test_the_config_that_is_kept_is_the_one_that_the_run_had() -> None:
    config = yaml.safe_load((SICK / "kl_explodes" / "config.yaml").read_text())
    assert config["beta"] == 0.0001 and config["model"] == "tiny"
