"""What a run says and keeps of the model and the machine that it finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import grpo_core.train
from tests.faulty import FORKS, command, ended
from tests.helpers import PEFT_IS_BEHIND

pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), FORKS]


def test_a_run_whose_sampler_and_learner_disagree_ends_after_its_first_step_in_one_line(
    model: Path, tmp_path: Path
) -> None:
    def disagreeing() -> None:
        real = grpo_core.train.step_record
        grpo_core.train.step_record = lambda report: {**real(report), "sampler_gap_mean": 0.2}

    end = ended(command(model, tmp_path / "run"), disagreeing)
    said = "error: --model: sampler and learner disagree on the texts of the first step by 0.2 nats a token"
    assert end.code == 2 and len(end.errors) == 1 and end.errors[0].startswith(said), end.text
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_that_continues_on_another_processor_says_so_and_one_on_the_same_does_not(model: Path, run: Path) -> None:
    file = run / "provenance.json"
    about = json.loads(file.read_text())
    here, now = about["hardware"][0], about["versions"]["torch"]
    about["hardware"], about["versions"]["torch"] = ["Z80, 1 threads"], "0.1"
    file.write_text(json.dumps(about))
    end = ended(command(model, run, "--resume"))
    said = f"the run continues elsewhere, so not to the same bits: Z80, 1 threads, now {here}; torch 0.1, now {now}\n"
    assert end.code == 0 and said in end.text
    resumed = json.loads(file.read_text())["resumed"]
    assert [(entry["after_step"], entry["hardware"]) for entry in resumed] == [(2, [here])]
    assert [check["part"] for check in resumed[0]["checks"]] == ["sampler", "learner"]
    shutil.rmtree(run / "final")
    assert "elsewhere" not in ended(command(model, run, "--resume")).text  # the resume before was here
