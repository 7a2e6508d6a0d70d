"""The pictures and the summary of runs: what is drawn is what was logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.plots.__main__ import main
from benchmarks.plots.lines import Line, Panel, by_settings, curve, logged, one_by_one, read_runs
from benchmarks.plots.panels import PARTS, SHEETS, panels
from benchmarks.plots.sheet import COLORS, mean_parts, style
from benchmarks.plots.summary import seeds, summary
from grpo_core.doctor.readlog import Run

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "benchmarks" / "results" / "embedded"
SICK = Path(__file__).parent / "sick"
REWARD = Panel("", "", logged("reward_mean"))
ACCURACY = next(panel for panel in SHEETS["curve"] if "accuracy" in panel.title)


def made(rewards: dict[int, float | None], name: str = "run", **config: Any) -> Run:
    """A GRPO run with these rewards by step."""
    train = [{"kind": "train", "step": step, "reward_mean": reward} for step, reward in rewards.items()]
    return Run(name, {"group_size": 8, "lr": 1e-5, "seed": 1, **config}, train)


def drawn(*runs: Run, window: int = 1, panel: Panel = REWARD) -> Any:
    """The curve of one line of these runs."""
    return curve(Line("", runs), panel, window)


def folder(path: Path, lines: list[str], source: Path = EMBEDDED / "seed-42", **config: Any) -> Path:
    """A run folder with these log lines and another run's config."""
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("\n".join(lines))
    settings = yaml.safe_load((source / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**settings, **config}))
    return path


@pytest.fixture(scope="module")
def recorded() -> list[str]:
    """The log lines of a recorded run."""
    return (EMBEDDED / "seed-42" / "log.jsonl").read_text().splitlines()


def sizes(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.png"))}


# --- what is drawn


def test_a_line_is_what_was_logged_and_a_null_is_a_gap() -> None:
    found = drawn(made({1: 0.5, 2: None, 4: 1.5}))
    assert found.steps == [1, 2, 4]
    assert found.middle.tolist() == pytest.approx([0.5, math.nan, 1.5], nan_ok=True)


def test_the_mean_of_seeds_runs_between_the_lowest_and_the_highest_at_the_steps_that_all_have() -> None:
    found = drawn(made({1: 1.0, 2: 2.0, 3: 3.0}), made({1: 5.0, 3: 0.0}), made({1: 3.0, 2: 9.0, 3: 6.0, 4: 7.0}))
    assert found.steps == [1, 3]
    assert (found.low.tolist(), found.middle.tolist(), found.high.tolist()) == ([1, 0], [3, 3], [5, 6])


def test_a_running_mean_is_of_the_lines_around_and_an_evaluation_is_not_averaged() -> None:
    run = made({1: 0.0, 2: 3.0, 3: 9.0, 4: 0.0})
    assert drawn(run, window=3).middle.tolist() == [1.5, 4.0, 4.0, 4.5]
    [recorded] = read_runs([EMBEDDED / "seed-42"])
    values = [line["accuracy"] for line in recorded.eval]
    assert drawn(recorded, window=9, panel=ACCURACY).middle.tolist() == values


def test_the_band_of_an_accuracy_is_its_interval() -> None:
    [run] = read_runs([EMBEDDED / "seed-42"])
    found = drawn(run, panel=ACCURACY)
    for ends, name in ((found.low, "accuracy_low"), (found.high, "accuracy_high")):
        assert ends.tolist() == [line[name] for line in run.eval]


def test_what_no_run_has_logged_is_no_panel() -> None:
    runs = [made({1: 0.5})]
    assert [panel.title for panel in panels("curve", runs)] == ["mean reward of the samples"]
    assert panels("timing", runs) == []
    kl = [{"kind": "train", "step": 1, "kl": 0.0}]
    without, beside = (Run("", {"group_size": 8, "beta": beta}, kl) for beta in (0.0, 0.1))
    assert panels("curve", [without]) == []  # without a reference no KL was measured, though 0 was logged
    assert [panel.title for panel in panels("curve", [beside])] == ["KL to the reference"]


def test_every_quantity_of_every_sheet_is_in_the_logs_of_the_recorded_runs() -> None:
    runs = read_runs([EMBEDDED / "seed-42", EMBEDDED / "sft-seed-42", SICK / "healthy_mu2_beta"])
    for sheet, wanted in SHEETS.items():
        assert panels(sheet, runs) == wanted
    rewards = read_runs([ROOT / "benchmarks" / "results" / "gsm8k-format" / "grpo"])
    assert "reward: xmlcount_reward_func" in [panel.title for panel in panels("rewards", rewards)]


def test_the_parts_of_a_step_add_up_to_it() -> None:
    for line in one_by_one(read_runs([EMBEDDED / "seed-42", EMBEDDED / "sft-seed-42"])):
        parts = mean_parts(line)
        assert sum(parts.values()) == pytest.approx(line.runs[0].mean("time_per_step_s"))
        assert parts["not divided"] == pytest.approx(0 if line.runs[0].grpo else sum(parts.values()))
        assert list(parts) == [*PARTS, "not divided"]


def test_lines_can_be_distinguished_without_their_colours() -> None:
    looks = [style(index) for index in range(30)]
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == len(looks)


def test_colour_blind_readers_can_distinguish_neighbouring_colours() -> None:
    # Machado et al. 2009, deuteranopia and protanopia, on linear RGB
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    rgb = np.array([[int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)] for color in COLORS])
    for seen in (deutan, protan):
        linear = np.clip(rgb**2.2 @ np.array(seen).T, 0, 1) ** (1 / 2.2)
        assert min(np.abs(a - b).max() for a, b in zip(linear, linear[1:], strict=False)) > 0.15


# --- which runs share a line


def test_runs_share_a_line_where_only_the_seed_differs() -> None:
    runs = [
        made({1: 0.0}, f"a-seed-{seed}", seed=seed, model=f"runs/sft-{seed}/final", log_every=seed) for seed in (1, 2)
    ]
    runs.append(made({1: 0.0}, "b-1", model="runs/sft-1/final", lr=2e-5))
    assert [(line.label, len(line.runs)) for line in by_settings(runs)] == [("a, seeds 1, 2", 2), ("b-1", 1)]
    embedded = read_runs([EMBEDDED / f"{kind}-{seed}" for kind in ("seed", "shuffled-rewards") for seed in (42, 1, 2)])
    assert [line.label for line in by_settings(embedded)] == ["seeds 42, 1, 2", "shuffled-rewards, seeds 42, 1, 2"]


def test_runs_of_one_name_are_labelled_with_their_folders(recorded: list[str], tmp_path: Path) -> None:
    paths = [folder(tmp_path / name / "run", recorded[:3]) for name in ("a", "b")]
    assert [run.name for run in read_runs([*paths, paths[0]])] == ["a/run", "b/run"]


# --- the summary


def test_the_summary_gives_the_recorded_runs_numbers() -> None:
    [run] = read_runs([EMBEDDED / "seed-42"])
    text = summary(run)
    assert text.startswith("seed-42 (GRPO, seed 42, cpu)\n  steps     80, 80 logged, 0 skipped\n")
    first, last = (
        f"{found['accuracy']:.1%} [{100 * found['accuracy_low']:.1f}, {100 * found['accuracy_high']:.1f}]"
        for found in (json.loads((EMBEDDED / "seed-42" / "summary.json").read_text())[at] for at in ("before", "after"))
    )
    assert f"{first} -> {last} of 512 problems (steps 0 and 80; 95% intervals)" in text
    rewards = [line["reward_mean"] for line in run.train]
    best = f"best {max(rewards):.3g} (step {rewards.index(max(rewards)) + 1})"
    assert f"first {rewards[0]:.3g}, last {rewards[-1]:.3g}, {best}" in text
    tokens = sum(line["tokens_generated"] for line in run.train)
    seconds = sum(line["generation_time_s"] for line in run.train)
    assert (
        f"{tokens:,} generated in the logged steps, {tokens / 80:,.0f} a step, {tokens / seconds:,.0f} a second" in text
    )
    step, generation, learner = (
        sum(line[name] for line in run.train) / 80
        for name in ("time_per_step_s", "generation_time_s", "backward_time_s")
    )
    assert f"time      {step:.3g} s a step: generation {generation:.3g}, learner {learner:.3g}, " in text


def test_the_summary_of_seeds_gives_their_mean_and_both_ends() -> None:
    runs = read_runs([EMBEDDED / f"seed-{seed}" for seed in (42, 1, 2)])
    ends = [run.eval[-1]["accuracy"] for run in runs]
    expected = f"mean {sum(ends) / 3:.1%}, lowest {min(ends):.1%}, highest {max(ends):.1%}"
    assert f"last held-out accuracy: {expected}" in seeds(by_settings(runs)[0])


@pytest.mark.parametrize("path", sorted(path.parent for path in SICK.glob("*/log.jsonl")), ids=lambda path: path.name)
def test_every_recorded_run_has_a_summary_and_panels(path: Path) -> None:
    [run] = read_runs([path])
    assert len(summary(run).splitlines()) >= 3 and "nan" not in summary(run)
    for panel in (panel for sheet in SHEETS for panel in panels(sheet, [run])):
        assert drawn(run, panel=panel) is not None


# --- the program


def test_a_run_gets_five_pictures_and_an_sft_run_all_but_the_rewards(
    recorded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path / "run", recorded[:12])
    main([str(run)])
    assert set(sizes(run / "plots")) == set(SHEETS) and min(sizes(run / "plots").values()) > 20_000
    assert f"wrote {run}/plots/curve.png\n" in capsys.readouterr().out
    main([str(EMBEDDED / "sft-seed-42"), "--output", str(tmp_path / "sft"), "--sheets", "rewards", "losses"])
    assert set(sizes(tmp_path / "sft")) == {"losses"}
    assert "no rewards.png: the runs have logged nothing of it" in capsys.readouterr().out


def test_runs_of_all_kinds_share_a_picture(
    recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torn, of one step, with nothing but nulls, with names that mean something to matplotlib, of SFT, and a healthy
    one."""
    first = json.loads(next(line for line in recorded if '"train"' in line))
    nulls = {name: None if isinstance(value, float) else value for name, value in first.items()}
    runs = [
        folder(tmp_path / "a_$x$" / "_run", [*recorded[:9], recorded[9][:40]]),
        folder(tmp_path / "b" / "_run", [json.dumps(first)], seed=7, beta=0.1),
        folder(tmp_path / "nulls", [json.dumps(nulls)], lr=1.0),
        SICK / "sft_healthy",
        EMBEDDED / "seed-42",
    ]
    monkeypatch.chdir(tmp_path)
    main([*map(str, runs), "--seeds", "--sheets", "timing", "curve"])
    assert set(sizes(tmp_path / "plots")) == {"timing", "curve"}
    assert "a_$x$/_run (GRPO, seed 42, cpu)\n  steps     8 of 80, 8 logged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "curve.png"], "--output curve.png: expected a folder; --sheets curve writes one picture alone"),
        (["--smoth", "1"], "--smoth: no such flag; did you mean --smooth?"),
        (["--smooth", "0"], "--smooth 0: expected 1 or more"),
        (["nowhere"], "nowhere: expected a run folder; there is no config.yaml in it"),
        (["EVALUATIONS"], "log.jsonl: holds no training step yet"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    flags: list[str], message: str, recorded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags == ["EVALUATIONS"]:
        flags = [str(folder(tmp_path / "run", recorded[:1]))]
    with pytest.raises(SystemExit, match="2"):
        main([str(EMBEDDED / "seed-1"), *flags])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(f"{message}\n") and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="1"):
        main([str(EMBEDDED / "seed-1"), "--output", str(tmp_path / "file" / "plots")])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file' / 'plots'} could not be written: ") and error.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.plots.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main([str(EMBEDDED / "seed-1")])
    assert capsys.readouterr().err == "error: benchmarks.plots needs matplotlib: pip install '.[plots]'\n"
