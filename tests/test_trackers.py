"""TensorBoard and Weights & Biases show what the run folder holds, each step once, and no training ends with them."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sft_core.config
from rewards.jsonl import read_jsonl
from sft_core.run.progress import Progress
from sft_core.run.trackers import shown
from tests.faulty import FORKS, Action, command, dies, ended, fails, on_call
from tests.helpers import message_of
from tests.killing import differences, log

pytestmark = FORKS


# --- TensorBoard


def test_tensorboard_shows_the_config_and_the_completions_that_the_terminal_shows(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    texts = {
        tag: [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")
        ]
        for tag in ("config", "completion")
    }
    [(_, config)] = texts["config"]
    assert [line[4:] for line in config.splitlines()] == (whole / "config.yaml").read_text().splitlines()
    first = {row["step"]: row for row in reversed(read_jsonl(whole / "completions.jsonl"))}
    assert [step for step, _ in texts["completion"]] == [2]  # --show_every 2, of 3 steps
    for step, text in texts["completion"]:
        assert "\n".join(line[4:] for line in text.splitlines()) == shown(first[step])


# --- Weights & Biases, a stand-in: it notes what it is told


class StandIn(ModuleType):
    """A module `wandb` that writes each call to a file. `fails_at`: the call, by name and number, that raises."""

    def __init__(self, note: Path, fails_at: tuple[str, int] = ("", 0)) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="a stand-in")
        self.note_path, self.fails_at, self.count = note, fails_at, 0

    def note(self, call: str, **values: Any) -> None:
        self.count += call == self.fails_at[0]
        if (call, self.count) == self.fails_at:
            raise ConnectionError("no network\nat all")
        with self.note_path.open("a") as file:
            file.write(json.dumps({"call": call, **values}) + "\n")

    def init(self, **settings: Any) -> StandIn:
        self.note("init", **settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert step_metric == "step"

    def log(self, row: dict[str, Any]) -> None:
        self.note("log", row=row)

    def finish(self, exit_code: int) -> None:
        self.note("finish", exit_code=exit_code)

    def Html(self, text: str) -> str:  # noqa: N802
        return text


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "told.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def wandb(note: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Stands in for the package in this process and its children."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    module = StandIn(note)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def told(note: Path, call: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, note.read_text().splitlines()) if line["call"] == call]


def steps_told(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By kind: the steps of the rows, in their order."""
    found: dict[str, list[int]] = {}
    for row in rows:
        [kind] = {name.split("/")[0] for name in row if name != "step"}
        found.setdefault(kind, []).append(row["step"])
    return found


ONCE = {"eval": [0, 3], "train": [1, 2, 3], "completion": [2]}


def killed(argv: list[str], act: Action = dies) -> None:
    """In the third step, its log line written and no checkpoint; under --resume in the first that is taken."""
    number = 1 if "--resume" in argv else 3
    assert ended(argv, partial(on_call, Progress, "completed", number, act)).code in (1, 9)


def test_wandb_gets_each_line_once_however_often_a_run_is_resumed(
    wandb: StandIn, note: Path, model: Path, whole: Path, run: Path
) -> None:
    argv = command(model, run, "--track", "wandb")
    for again in ([], ["--resume"], ["--resume"]):
        killed([*argv, *again])
    assert ended([*argv, "--resume"]).code == 0
    rows = [line["row"] for line in told(note, "log")]
    assert steps_told(rows) == ONCE
    logged = {(f"{line['kind']}/{name}", line["step"]): value for line in log(run) for name, value in line.items()}
    for row in rows:
        for name, value in row.items():
            if (name, row["step"]) in logged and value == value:
                assert value == logged[name, row["step"]]
    starts = told(note, "init")
    assert len(starts) == 4 and len({start["id"] for start in starts}) == 1
    assert starts[0]["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert [line["exit_code"] for line in told(note, "finish")] == [0]
    assert differences(whole, run) == []


def test_wandb_gets_the_whole_of_a_run_that_began_without_it(
    wandb: StandIn, note: Path, model: Path, run: Path
) -> None:
    killed(command(model, run))
    assert ended(command(model, run, "--track", "wandb", "--resume")).code == 0
    assert steps_told([line["row"] for line in told(note, "log")]) == ONCE


def test_a_run_that_is_overwritten_is_another_one_at_wandb(wandb: StandIn, note: Path, model: Path, run: Path) -> None:
    for again in ([], ["--overwrite"]):
        assert ended(command(model, run, "--track", "wandb", *again)).code == 0
    assert len({start["id"] for start in told(note, "init")}) == 2
    assert len(told(note, "log")) == 2 * sum(map(len, ONCE.values()))


@pytest.mark.parametrize("where", [("init", 1), ("log", 3), ("finish", 1)])
def test_a_tracker_that_fails_is_one_line_and_the_run_continues(
    where: tuple[str, int], wandb: StandIn, model: Path, whole: Path, run: Path
) -> None:
    wandb.fails_at = where
    end = ended(command(model, run, "--track", "wandb"))
    assert end.code == 0, end.text
    assert len([line for line in end.text.splitlines() if line.startswith("W&B could not be")]) == 1
    assert ": no network at all\n" in end.text
    assert differences(whole, run) == []


def test_wandb_shows_that_a_run_has_failed(wandb: StandIn, note: Path, model: Path, run: Path) -> None:
    killed(command(model, run, "--track", "wandb"), fails())
    assert [line["exit_code"] for line in told(note, "finish")] == [1]


def test_wandbs_own_names_in_the_environment_are_left_to_it(
    wandb: StandIn, note: Path, model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "my-run")
    assert ended(command(model, run, "--track", "wandb", "--max_steps", "1")).code == 0
    [start] = told(note, "init")
    assert start["id"] == "my-run" and "project" not in start and start["name"] == "run"


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)])  # the second: a folder that happens to be there
def test_a_missing_package_is_refused_at_start(found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_core.config, "find_spec", lambda name: found)
    assert message_of(["--track", "wandb"]) == "--track wandb: expected the wandb package: pip install '.[wandb]'"


# --- the real package, without a network


def rows_on_disk(path: Path) -> Iterator[dict[str, Any]]:
    """The history of an offline run. The file is LevelDB's log: blocks of 32 KB, in them records of CRC, length, kind
    (1: a whole one; 2, 3, 4: its first, a middle, its last part), content."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_the_real_wandb_keeps_an_offline_run_of_the_same_numbers(
    model: Path, whole: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    end = ended(command(model, run, "--track", "wandb"))
    assert end.code == 0 and "W&B" not in end.text.replace("W&B syncing", ""), end.text
    assert differences(whole, run) == []  # no random number was drawn for it
    [path] = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = [{name: row[name] for name in row if not name.startswith("_")} for row in rows_on_disk(path)]
    plain = [{name.split("/_type")[0]: value for name, value in row.items()} for row in rows]
    means = [line["reward_mean"] for line in log(run) if line["kind"] == "train"]
    assert [row["train/reward_mean"] for row in plain if "train/reward_mean" in row] == pytest.approx(means)
    assert [row["step"] for row in plain if "eval/accuracy" in row] == [0, 3]
    assert [row["step"] for row in plain if any(name.startswith("completion/text") for name in row)] == [2]
