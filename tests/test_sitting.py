"""What benchmarks/on_gpu.sh claims: parts that fail alone, a record of each, a page made from the records."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lengths
from benchmarks.sitting import gain, record, resume, t4
from benchmarks.sitting.__main__ import main, sitting
from benchmarks.sitting.page import page
from benchmarks.sitting.parts import Part, parts
from benchmarks.sitting.record import Record, latest, run
from benchmarks.sitting.shape import make_shape
from benchmarks.workload import Steps, workload
from grpo_core.job import prepare
from sft_core.model.policy import load_tokenizer
from sft_core.model.tiny import build_tiny
from sft_core.text.prompts import prompt_ids

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
HERE: Record = {"hardware": ["a T4"], "versions": {"torch": "2.1.0+cu121", "python": "3.11.7"}, "commit": "abc"}
GOOD = ["-c", "print('figure: 1.5 s')"]
BAD = {
    "fails": Part("bad", "", 60, [["-c", "print('so far'); raise SystemExit('planted')"], GOOD]),
    "is killed": Part("bad", "", 60, [["-c", "import os; os.kill(os.getpid(), 9)"]]),
    "hangs": Part("bad", "", 0.0, [["-c", "import time; time.sleep(3600)"], GOOD]),
    "lacks a package": Part("bad", "", 60, [GOOD], packages=["json", "no_such_package"]),
    "tries nothing": Part("bad", "", 60, [GOOD], proof="passed"),
}
OUTCOME = {"fails": "failed", "is killed": "failed", "hangs": "timed out"}
SAID = {
    "fails": "planted",
    "is killed": "exit code -9",
    "hangs": "of which it had 0",
    "lacks a package": "not installed here: no_such_package",
    "tries nothing": "figure: 1.5 s",
}


def held(folder: Path, *chosen: Part, minutes: float = 5.0) -> tuple[bool, dict[str, Record]]:
    """A sitting's success and its records by part."""
    good = sitting(folder, chosen, minutes, {}, HERE)
    return good, {record["part"]: record for record in latest(folder)}


@pytest.mark.parametrize("kind", BAD)
def test_what_happens_to_one_part_leaves_the_others_as_they_are(kind: str, tmp_path: Path) -> None:
    for place in range(3):
        others = [Part(name, "", 60, [GOOD]) for name in ("first", "last")]
        folder = tmp_path / str(place)
        good, found = held(folder, *others[:place], BAD[kind], *others[place:])
        assert list(found) == [part.name for part in (*others[:place], BAD[kind], *others[place:])]
        assert [found[name]["outcome"] for name in ("first", "last")] == ["passed", "passed"]
        assert found["bad"]["outcome"] == OUTCOME.get(kind, "skipped") and SAID[kind] in found["bad"]["output"]
        assert good is (kind not in OUTCOME)
        text = (folder / "summary.md").read_text()
        assert "| first |  | passed | 0 | 1.5 s |" in text and f"## bad: {found['bad']['outcome']}" in text
        assert SAID[kind] in text


def test_the_other_commands_of_a_part_run_although_one_fails(tmp_path: Path) -> None:
    _, found = held(tmp_path, BAD["fails"])
    assert found["bad"]["figures"] == "1.5 s" and "so far" in found["bad"]["output"]


def test_a_part_whose_time_is_up_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, fifo, outlived = tmp_path / "lock", tmp_path / "fifo", tmp_path / "outlived"
    os.mkfifo(fifo)
    grandchild = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    grandchild += f"open({str(fifo)!r}, 'w').write('locked'); time.sleep(30); open({str(outlived)!r}, 'w')"
    child = (
        f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    waits = []

    class Waiting(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            waits.append(timeout)
            if len(waits) == 1:  # time is up as soon as the grandchild is there
                assert fifo.read_text() == "locked"
                raise subprocess.TimeoutExpired("child", timeout or 0)
            return super().wait(timeout)

    monkeypatch.setattr(record.subprocess, "Popen", Waiting)  # type: ignore[attr-defined]
    assert run([sys.executable, "-c", child], 5.0, {}) == (None, "begun\n")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # free as soon as its holder is no more
    assert not outlived.exists()


def test_no_part_begins_when_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, found = held(tmp_path, Part("first", "", 60, [GOOD]), minutes=0.0)
    assert not good and not found
    assert capsys.readouterr().out == "first: not begun, time is up\n"


def test_a_part_that_is_run_again_replaces_its_line_and_keeps_the_others(tmp_path: Path) -> None:
    held(tmp_path, Part("first", "", 60, [GOOD]), BAD["fails"])
    good, found = held(tmp_path, Part("bad", "", 60, [GOOD]))
    assert good and {name: each["outcome"] for name, each in found.items()} == {"first": "passed", "bad": "passed"}
    assert "2 parts: 2 passed." in (tmp_path / "summary.md").read_text()


def test_the_page_says_where_with_which_versions_and_which_were_tested(tmp_path: Path) -> None:
    _, found = held(tmp_path, Part("first", "", 60, [GOOD]))
    elsewhere = {**found["first"], "part": "second", "about": {**HERE, "hardware": ["an H100"]}}
    text = page([found["first"], elsewhere])
    for part, gpu in (("first", "a T4"), ("second", "an H100")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{part}, until ")]
        assert line.endswith(f": {gpu}; torch 2.1.0+cu121 (tested: 2.13.0), python 3.11.7; commit abc.")


def test_a_record_names_no_folder_of_its_machine(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shown = Part(
        "first", "", 60, [["-c", "import os, sys; print('figure:', os.getcwd(), *sys.argv[1:])", str(folder / "x")]]
    )
    _, found = held(folder, shown)
    assert found["first"]["figures"] == "HERE out/x"
    assert str(tmp_path) not in (folder / "records.jsonl").read_text() + (folder / "summary.md").read_text()


# --- the parts themselves


def test_each_part_ends_within_eight_minutes_and_all_in_an_hour(tmp_path: Path) -> None:
    found = parts(tmp_path, "cuda", False, None)
    assert " ".join(part.name for part in found) == "tests t4 embedded trl plan resume decode lengths nccl"
    assert max(part.limit for part in found) <= 8 * 60 and sum(part.limit for part in found) <= 3600


@pytest.mark.parametrize("small", [True, False])
def test_every_part_asks_for_what_its_program_knows(small: bool, tmp_path: Path) -> None:
    make_shape(tmp_path / "shape", small)
    build_tiny(tmp_path / "tiny", seed=0)
    checked = []
    for part in parts(tmp_path, "cpu", small, None):
        for command in part.commands:
            assert all(
                find_spec(command[at + 1]) for at, word in enumerate(command) if word == "-m" and part.name != "tests"
            )
            if "--from_scratch" in command:
                flags = command[command.index("--model") :]
                job = prepare(workload("t4" if part.name == "t4" else "qwen-0.5b", ["--max_steps", "3", *flags]))
                checked.append(part.name)
    assert checked == ["t4", "trl", "trl", "plan", "decode", "lengths"]
    assert job.source and job.source.model_config.hidden_size == (64 if small else 896)
    tokenizer = load_tokenizer(job.source)
    prompts = [len(prompt_ids(tokenizer, example, job.config)) for example in job.task.draw(0, 8, 0)]
    assert min(prompts) >= 85 and max(prompts) <= 115  # GSM8K's length


def test_key_figures_are_found_in_what_the_programs_print(tmp_path: Path) -> None:
    figures = {part.name: part.figures for part in parts(tmp_path, "cuda", False, None)}
    speed = (RESULTS / "speed-qwen-0.5b.md").read_text()
    assert figures["trl"](speed) == "Speed: `qwen-0.5b`; median 2.64 Peak memory 0.96"
    forecasts = figures["plan"]((RESULTS / "plan.md").read_text()).split("; ")
    assert forecasts[0] == "full fine-tuning 1.02" and len(forecasts) == 5
    line = "============ 2 failed, 6 passed, 1 skipped in 3.21s ============"
    assert figures["tests"](f"x\n{line}\n") == "2 failed, 6 passed, 1 skipped in 3.21s"
    at = lengths.Length(64, 60.0, {"sampler": 1.5, "learner": 2.5, lengths.APART: 5.0}, {"sampler": 0.5})
    assert figures["lengths"](lengths.table([at])) == "64 1.5 s 2.5 s"


def test_t4_fails_where_memory_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = build_tiny(tmp_path, seed=0)
    flags = ["--model", str(model), "--task=arithmetic", "--difficulty=2", "--prompt_format=hash", "--device=cpu"]
    flags += ["--eval_problems=0", "--max_prompt_tokens=200", "--max_completion_tokens=4", "--precision=float32"]
    flags += ["--prompts_per_step=2", "--group_size=2", "--steps=1"]
    assert t4.main(flags) == 0
    assert "figure: float32, peak " in capsys.readouterr().out

    def halving(steps: Steps, count: int, warm_up: int) -> Any:
        found = measured(steps, count, warm_up)
        steps.learner.optimizer.micro_batch = 2
        return found

    measured = t4.measured
    monkeypatch.setattr(t4, "measured", halving)
    assert t4.main(flags) == 1
    assert "memory ran out: micro-batches of 4 became 2" in capsys.readouterr().out


def test_the_embedded_job_fails_where_it_gains_less_than_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    before, after = ({"accuracy": share, "problems": 512} for share in (0.25, 0.5))
    (tmp_path / "summary.json").write_text(json.dumps({"before": before, "after": after}))
    (tmp_path / "log.jsonl").write_text('{"kind": "eval"}\n{"kind": "train", "time_per_step_s": 0.5}\n')
    assert gain.main([str(tmp_path), "25"]) == 0 and gain.main([str(tmp_path), "26"]) == 1
    assert (
        "figure: +25.0 points of greedy accuracy, 25.0% to 50.0% of 512 problems; 1 steps of 0.500 s"
        in capsys.readouterr().out
    )


def test_a_run_that_ends_before_it_is_killed_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    waits = f"import os, time; os.makedirs({str(checkpoint)!r}); time.sleep(3600)"
    monkeypatch.setattr(resume, "command", lambda run, flags: [sys.executable, "-c", waits])
    resume.killed(tmp_path, [])
    assert checkpoint.is_dir()
    checkpoint.rmdir()
    monkeypatch.setattr(resume, "command", lambda run, flags: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="ended with exit code 3"):
        resume.killed(tmp_path, [])


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--parts", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
