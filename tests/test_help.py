"""--help: a screen of the flags that people set most, all of them by what they are about."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import benchmarks.compare_trl
import benchmarks.plan.__main__
import benchmarks.step_time
import eval.__main__
import eval.ask
import eval.compare
import eval.export
import grpo_core.doctor.__main__
import grpo_core.pipeline.__main__
import grpo_core.train
import rewards.__main__
import sft_core.train
from grpo_core.config import GRPOConfig
from sft_core.helptext import GROUPS, names_of
from tests.test_names import FIELDS, OWN

MAINS: dict[str, Callable[[list[str]], Any]] = {
    "sft_core.train": sft_core.train.main,
    "grpo_core.train": grpo_core.train.main,
    "eval": eval.__main__.main,
    "eval.ask": eval.ask.main,
    "eval.export": eval.export.main,
    "eval.compare": eval.compare.main,
    "grpo_core.pipeline": grpo_core.pipeline.__main__.main,
    "grpo_core.doctor": grpo_core.doctor.__main__.main,
    "rewards": rewards.__main__.main,
    "benchmarks.plan": benchmarks.plan.__main__.main,
    "benchmarks.step_time": benchmarks.step_time.main,
    "benchmarks.compare_trl": benchmarks.compare_trl.main,
}


@pytest.mark.parametrize("program", MAINS)
def test_help_is_a_screen_that_ends_in_how_to_see_every_flag(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = {}
    for line in ("--help", "-h", "--help all", "-h all"):
        with pytest.raises(SystemExit, match="0"):
            MAINS[program](line.split())
        told[line] = capsys.readouterr().out
    assert told["--help"] == told["-h"] and told["--help all"] == told["-h all"]
    assert len(lines := told["--help"].splitlines()) <= 50 and lines[-1] == "`--help all` lists every flag."
    assert set(re.findall(r"^  (--\w+)", told["--help"], re.MULTILINE)) <= set(re.findall(r"--\w+", told["--help all"]))


def test_help_all_lists_the_flags_of_each_group_under_its_title(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for program in ("grpo_core.train", "benchmarks.plan", "grpo_core.pipeline"):
        with pytest.raises(SystemExit):
            MAINS[program](["--help", "all"])
        titles = re.split(r"^(\w[\w ]*):\n", capsys.readouterr().out, flags=re.MULTILINE)
        sections = dict(zip(titles[1::2], titles[2::2], strict=True))
        assert list(sections) == ["flags", *GROUPS]
        for title in GROUPS:
            listed = re.findall(r"^  --(\w+)", sections[title], re.MULTILINE)
            wanted = [name for part in names_of(title) for name in part if name in FIELDS[GRPOConfig]]
            assert set(wanted) - set(listed) <= (set(OWN) if program == "grpo_core.pipeline" else set())


def test_every_flag_is_in_one_group() -> None:
    grouped = [name for title in GROUPS for part in names_of(title) for name in part]
    assert sorted(grouped) == sorted(set().union(*FIELDS.values()))
