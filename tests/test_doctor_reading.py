"""How the doctor reads a log, measures a change against its noise, and prints what it has found."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.doctor.__main__ import as_json, main, notes, report
from grpo_core.doctor.finding import FELL, MOVED, STILL
from grpo_core.doctor.readlog import LEAST_LINES, Change, read_run
from rewards.jsonl import read_jsonl
from tests.sick.record import CASES
from tests.test_doctor import SICK, names, sick

# --- a change and its noise


@given(st.lists(st.floats(-5, 5), min_size=LEAST_LINES, max_size=60), st.floats(0.1, 10), st.floats(-100, 100))
def test_a_change_is_measured_the_same_in_other_units(values: list[float], scale: float, shift: float) -> None:
    values = [round(value, 3) for value in values]
    first, second = Change.of(values), Change.of([scale * value + shift for value in values])
    if first.error > 1e-3:
        assert second.z == pytest.approx(first.z, rel=1e-4, abs=1e-4)
        assert second.fall == pytest.approx(first.fall, rel=1e-4, abs=1e-4)


@given(st.lists(st.integers(0, 100), min_size=LEAST_LINES, max_size=60))
def test_a_change_backwards_is_the_opposite_change(values: list[int]) -> None:
    forward, backward = Change.of(values), Change.of(values[::-1])
    assert forward.z == pytest.approx(-backward.z) and forward.peak == pytest.approx(backward.peak)
    assert forward.fall >= 0 and forward.fall >= -forward.z


def test_noise_alone_is_rarely_taken_for_a_change() -> None:
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
def test_an_older_log_with_fewer_quantities_is_read(name: str) -> None:
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
    assert said["findings"][0].keys() == {"name", "what", "evidence", "advice", "follows", "measured"}
    assert said["numbers"]["truncated_share"] == [1, 1]
    main([str(SICK / "sft_healthy"), "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "sft"


def test_the_config_that_is_kept_is_the_one_that_the_run_had() -> None:
    config = yaml.safe_load((SICK / "kl_explodes" / "config.yaml").read_text())
    assert config["beta"] == 0.0001 and config["model"] == "tiny"
