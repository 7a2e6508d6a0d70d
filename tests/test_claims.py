"""README's claims: the words that docs/claims.md lists stand in it, and its numbers are those of the records."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

import grpo_core.train
import grpo_core.warmstart
from benchmarks.parity.cases import all_cases
from sft_core.config import ModelConfig
from sft_core.model.shapes import shapes_of
from tests.bugs import MUTATIONS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EMBEDDED = RESULTS / "embedded"


def plain(text: str) -> str:
    """The words of a page without its marks, links and line ends."""
    text = re.sub(r"\]\([^()]*(?:\([^()]*\)[^()]*)*\)", "", text)
    return " ".join(re.sub(r"[\[\]*`|]", " ", text).split())


README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = re.findall(r"^\| (.+?) \| .+ \|$", (ROOT / "docs" / "claims.md").read_text(encoding="utf-8"), re.MULTILINE)[2:]
TABLES = re.compile(r"^the (table|largest|tables)\b")  # what stands for numbers that are compared below


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if not TABLES.match(claim)])
def test_a_claim_on_the_list_stands_in_the_readme(claim: str) -> None:
    for part in re.split(r"[;:,] ", claim):
        assert plain(part) in plain(README)


def test_a_sentence_with_a_number_is_on_the_list() -> None:
    """Of the prose; tables and code have tests of their own."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    sentences = re.split(
        r"(?<=[.:])\s",
        plain("\n".join(line for line in prose.splitlines() if not line.strip().startswith(("|", "!", "#")))),
    )
    listed = [plain(part) for claim in CLAIMS for part in re.split(r"[;:,] ", claim)]
    numbers = [
        sentence for sentence in sentences if re.search(r"\d%|\d (trajectories|ways|families|million)", sentence)
    ]
    assert len(numbers) >= 5
    for sentence in numbers:
        assert any(part in sentence for part in listed), sentence


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def share(found: dict[str, float]) -> str:
    low, high = (f"{100 * found[f'accuracy_{end}']:.1f}" for end in ("low", "high"))
    return f"{found['accuracy']:.1%} [{low}, {high}]"


@pytest.mark.parametrize("page", ["README.md", "benchmarks/results/README.md"])
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_table_of_the_embedded_job_is_that_of_its_records(seed: int, page: str) -> None:
    run, control = (summary(EMBEDDED / name) for name in (f"seed-{seed}", f"shuffled-rewards-{seed}"))
    gain, no_gain = (100 * (each["after"]["accuracy"] - each["before"]["accuracy"]) for each in (run, control))
    row = f"| {seed} | {share(run['before'])} | {share(run['after'])} | {gain:+.1f} points | {no_gain:+.1f} |"
    assert row in (ROOT / page).read_text(encoding="utf-8")
    assert run["before"]["problems"] == control["after"]["problems"] == 512


def seconds(seed: int) -> float:
    """Of a record's steps."""
    lines = map(json.loads, (EMBEDDED / f"seed-{seed}" / "log.jsonl").read_text().splitlines())
    return float(sum(line["time_per_step_s"] for line in lines if line["kind"] == "train"))


def test_the_seconds_of_the_embedded_job_are_those_of_its_records() -> None:
    steps = [json.loads(line) for line in (EMBEDDED / "seed-42" / "log.jsonl").read_text().splitlines()]
    sft = [json.loads(line) for line in (EMBEDDED / "sft-seed-42" / "log.jsonl").read_text().splitlines()]
    every_tenth = [line["time_per_step_s"] for line in sft if line["kind"] == "train"]
    said = re.search(r"(\d+) s of SFT, (\d+) s of GRPO on 2 Intel Xeon cores", README)
    assert said is not None and "Intel Xeon" in (EMBEDDED / "seed-42" / "provenance.json").read_text()
    assert round(sum(map(seconds, (42, 1, 2))) / 3) == int(said[2])
    assert 10 * sum(every_tenth) == pytest.approx(int(said[1]), rel=0.05)  # every tenth step is logged
    lengths = [line["length_mean"] for line in steps if line["kind"] == "train"]
    held_out = [line["accuracy"] for line in steps if line["kind"] == "eval"]
    assert sum(lengths[-10:]) > 1.3 * sum(lengths[:10]) and held_out[-1] > 2 * held_out[0]  # "rise together"


def test_the_gain_on_another_processor_is_that_of_its_record() -> None:
    run = summary(EMBEDDED / "epyc-42")
    said = re.search(r"seed 42 gained ([\d.]+) points on an AMD EPYC", README)
    assert said is not None and "AMD EPYC" in (EMBEDDED / "epyc-42" / "provenance.json").read_text()
    assert f"{100 * (run['after']['accuracy'] - run['before']['accuracy']):.1f}" == said[1]


def test_what_grpo_did_not_teach_is_on_record() -> None:
    found = [summary(EMBEDDED / f"seed-{seed}") for seed in (42, 1, 2)]
    rates = {
        name: [[each["ways"][end][name] for each in found] for end in ("first", "last")]
        for name in ("worked", "right_if_worked", "right_if_bare")
    }
    right, worked = ([f"{sum(of_seeds) / 3:.0%}" for of_seeds in rates[n]] for n in ("right_if_worked", "worked"))
    assert f"right in {right[0]} at first and {right[1]} at last" in plain(README)
    assert f"from {worked[0].removesuffix('%')} to {worked[1]}" in plain(README)
    greedy = [[each[end]["accuracy"] for each in found] for end in ("before", "after")]
    titles = {"worked out": rates["worked"], "right where worked out": rates["right_if_worked"]}
    titles |= {"right where not": rates["right_if_bare"], "greedy answers right (held out, before and after)": greedy}
    page = (ROOT / "docs" / "sharpening.md").read_text(encoding="utf-8")
    for title, (first, last) in titles.items():
        cells = [f"{a:.0%} to {b:.0%}" for a, b in zip(first, last, strict=True)]
        assert f"| {title} | {' | '.join(cells)} |" in page


def test_the_built_in_model_is_as_large_as_is_said_and_shown_as_many_worked_answers() -> None:
    weights = shapes_of(ModelConfig(), None).base
    preset = yaml.safe_load((ROOT / "sft_core" / "presets" / "tiny.yaml").read_text())
    assert f"a Qwen2 of {weights / 1e6:.2f} million parameters" in plain(README)
    told = f"{1 - preset['worked_share']:.0%} state only the answer and {preset['worked_share']:.0%} work it out"
    assert told in plain(README)


def test_the_comparison_with_trl_is_as_large_and_as_close_as_is_said() -> None:
    record = (RESULTS / "compare-trl.md").read_text(encoding="utf-8")
    cases = len(all_cases())
    for page in (README, (RESULTS / "README.md").read_text(encoding="utf-8"), record):
        assert f"{cases} trajectories" in page
    head, largest = (
        re.search(rf"^\| {name} \|.*$", record, re.MULTILINE)[0].strip("| ").split(" | ")  # type: ignore[index]
        for name in ("loss and option", r"\*\*largest\*\*")
    )
    of = dict(zip(head, largest, strict=True))
    said = re.search(r"\| largest difference \| (.*) \|", README)
    assert said is not None
    stages = ("advantages", "log-probs", "KL", "loss", "gradients", "weights")
    assert said[1].split(" | ") == [of[stage] for stage in stages]
    declared = record.partition("| difference | what is measured")[2].partition("\n\n")[0].strip().splitlines()[2:]
    assert len(declared) == 13 and "thirteen differences that are meant" in README


def test_families_and_bugs_are_counted_as_is_said() -> None:
    record = (RESULTS / "families.md").read_text(encoding="utf-8")
    found = re.search(r"\*\*(\d+) families: (\d+) right, (\d+) refused, (\d+) not built\.\*\*", record)
    assert found is not None
    assert f"{found[1]} families: {found[2]} train right" in plain(README)
    assert f"{len(MUTATIONS)} known ways" in plain(README) and f"all {len(MUTATIONS)}" in plain(README)


SPEED = {
    "speed-tiny": "the first command's model",
    "speed-qwen-0.5b": "Qwen2.5-0.5B's shape",
    "speed-qwen-0.5b-offload": "the same",
}


@pytest.mark.parametrize("name", SPEED)
def test_the_speeds_are_those_of_the_records(name: str) -> None:
    record = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    rows = [re.search(rf"^\| {side} \|(.*)\|$", record, re.MULTILINE) for side in ("this project", "TRL")]
    (here, *_, peak), (there, *_, their_peak) = (row[1].strip().split(" | ") for row in rows if row)
    speed_up = re.search(r"median \*\*([\d.]+)\*\*", record)
    assert speed_up is not None
    wanted = [here, there, f"**{speed_up[1]}**", peak, their_peak]
    [line] = [line for line in README.splitlines() if f"[{SPEED[name]}](" in line]
    said = line.strip("| ").split(" | ")[1:]
    assert len(said) == len(wanted)
    for told, recorded in zip(said, wanted, strict=True):
        number = told.split()[0].strip("*")
        last_digit = 10.0 ** -len(number.partition(".")[2])
        assert abs(float(number) - float(recorded.split()[0].strip("*"))) <= 0.51 * last_digit
    raw = json.loads((RESULTS / f"{name}.json").read_text())
    assert median(step["seconds"] for step in raw["ours"][raw["warm_up"] :]) == pytest.approx(float(here), rel=0.01)


def test_the_first_command_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        pytest.fail("a connection was opened")

    settings: Callable[..., Any] = grpo_core.warmstart._settings
    monkeypatch.setattr(grpo_core.warmstart, "_settings", lambda config: replace(settings(config), max_steps=1))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.chdir(tmp_path)
    grpo_core.train.main(["--max_steps", "1", "--eval_problems", "2", "--no_progress"])
    assert len(list(Path("runs").glob("grpo-*/final"))) == 1
