"""The atlas's experiments, the plan of their runs, and what is recorded of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.atlas import pool, runs
from benchmarks.atlas.experiments import SEEDS, Cell, cells, experiments, named, questions
from benchmarks.atlas.pool import Plan
from benchmarks.atlas.records import AGAIN, BASELINE, CHECKS, SHUFFLED, TRL
from grpo_core.config import GRPOConfig
from grpo_core.job import prepare
from grpo_core.train import PRESETS, run
from rewards.jsonl import read_jsonl
from sft_core.cli import parse_config
from sft_core.model.tiny import build_tiny
from sft_core.run.provenance import provenance

KNOWN = experiments()
SMALL = ("--prompts_per_step", "2", "--group_size", "4", "--max_steps", "10", "--eval_problems", "6")
SHORT = ("--max_completion_tokens", "8", "--eval_samples", "2")


def test_forty_experiments_and_more_with_five_seeds_each() -> None:
    compared = [each for each in KNOWN if each.name not in CHECKS]
    assert len(compared) >= 40 and len(SEEDS) >= 5
    assert len({tuple(each.flags) for each in KNOWN if each.name in {BASELINE, *(e.name for e in compared)}}) == len(
        compared
    ) + len({each.task for each in KNOWN}), "two experiments have the same flags"


def test_each_task_has_a_baseline_a_rerun_and_a_control() -> None:
    for task in {each.task for each in KNOWN}:
        assert {BASELINE, AGAIN, SHUFFLED} <= {each.name for each in KNOWN if each.task == task}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("model"), seed=0)


@pytest.mark.parametrize("experiment", KNOWN, ids=lambda each: each.label)
def test_an_experiment_is_a_configuration_that_can_run(experiment: Any, model: Path) -> None:
    prepare(parse_config(GRPOConfig, [*experiment.flags, "--model", str(model), "--eval_problems", "1"], PRESETS))


def test_each_question_says_what_is_claimed_and_what_was_expected() -> None:
    asked = questions()
    assert {(each.name, each.task) for each in asked} == {
        (each.question, each.task) for each in KNOWN if each.question not in (BASELINE, TRL)
    }
    for each in asked:
        assert "arXiv" in each.paper or "(" in each.paper or each.paper.startswith("no paper's claim"), each.name
        assert len(each.predicted) > 40, each.name


def test_a_change_is_one_flag_or_belongs_together() -> None:
    together = {"--group_size", "--prompts_per_step"}, {"--lora", "--lora_r", "--lora_alpha", "--lr"}
    together += {"--epsilon_low", "--epsilon_high", "--loss", "--mu"}, {"--beta", "--ref_sync_every", "--kl_correction"}
    together += {"--rewards"}, {"--reward_weights", "--reward_aggregation"}, {"--scale_rewards", "--lr", "--loss"}
    together += ({"--precision", "--logit_chunk"},)
    for each in KNOWN:
        flags = {flag for flag in each.change if flag.startswith("--")}
        assert len(flags) <= 1 or any(flags <= allowed for allowed in together), each.label


def test_equal_samples_whatever_the_size_of_the_groups() -> None:
    for each in KNOWN:
        config = parse_config(GRPOConfig, each.flags, PRESETS)
        assert config.prompts_per_step * config.group_size == 128, each.label


def test_an_unknown_name_is_told_with_the_tasks() -> None:
    with pytest.raises(ValueError, match="'way'.*ways"):
        named(["way"], KNOWN)
    assert {each.task for each in named(["stale"], KNOWN)} == {"stale"}
    assert [each.label for each in named(["ways/mu 4"], KNOWN)] == ["ways/mu 4"]


def test_all_first_seeds_come_before_the_second_ones() -> None:
    chosen = named(["rare"], KNOWN)
    order = list(cells(chosen, 2))
    assert len(order) == 2 * len(chosen)
    assert [cell.experiment for cell in order[: len(chosen)]] == chosen
    assert {cell.seed for cell in order[: len(chosen)] if cell.experiment.name != AGAIN} == {1}
    assert {cell.seed for cell in order if cell.experiment.name == AGAIN}.isdisjoint(SEEDS)


def test_trl_runs_with_the_seeds_of_the_baseline_and_of_its_rerun() -> None:
    seeds = {name: {c.seed for c in cells(named([f"ways/{name}"], KNOWN), 5)} for name in (BASELINE, AGAIN, TRL)}
    assert len(seeds[TRL]) == 10 and seeds[TRL] == seeds[BASELINE] | seeds[AGAIN]


# --- the plan

HERE = provenance(None)["hardware"][0]


def record(cell: Cell, **changes: Any) -> dict[str, Any]:
    experiment = cell.experiment
    known = {"task": experiment.task, "experiment": experiment.name, "seed": cell.seed, "flags": experiment.flags}
    return {**known, "seconds": 10.0, "processor": HERE, **changes}


def test_what_is_recorded_is_not_run_again_unless_its_flags_have_changed(tmp_path: Path) -> None:
    wanted = list(cells(named(["rare"], KNOWN), 1))
    done = [record(cell) for cell in wanted[:3]]
    assert Plan.of(wanted, done, tmp_path).cells == wanted[3:]
    done[1]["flags"] = [*done[1]["flags"], "--lr", "1"]
    assert Plan.of(wanted, done, tmp_path).cells == [wanted[1], *wanted[3:]]
    assert Plan.of(wanted, [record(cell) for cell in wanted], tmp_path).lines(2) == "every run is recorded"


def test_the_time_is_that_of_other_seeds_or_of_the_baseline(tmp_path: Path) -> None:
    wanted = list(cells(named(["rare", "stale/CISPO"], KNOWN), 2))
    baseline, other, *_ = (cell for cell in wanted if cell.experiment.task == "rare" and cell.seed == 1)
    plan = Plan.of(wanted, [record(baseline, seconds=20.0), record(other, seconds=50.0)], tmp_path)
    by_label = {cell.experiment.label: plan.cost(cell) for cell in plan.cells}
    assert by_label[other.experiment.label] == 50 and by_label["rare/no scaling"] == 20
    assert by_label["stale/CISPO"] == pool.RUN_SECONDS
    assert "of 4 runs the time is a guess" in plan.lines(1)  # CISPO with two seeds, and the baselines beside it


def test_a_run_on_another_processor_than_its_baseline_has_the_baseline_run_there_too(tmp_path: Path) -> None:
    baseline, other = (Cell(named([f"rare/{name}"], KNOWN)[0], 2) for name in (BASELINE, "no scaling"))
    elsewhere = record(baseline, processor="another, 1 threads")
    assert Plan.of([baseline, other], [elsewhere], tmp_path).cells == [baseline, other]
    assert Plan.of([other], [elsewhere], tmp_path).cells == [baseline, other]
    assert Plan.of([other], [record(baseline)], tmp_path).cells == [other]
    assert Plan.of([baseline, other], [elsewhere, record(other)], tmp_path).cells == [baseline], "recorded alone"
    assert Plan.of([baseline, other], [elsewhere, record(other, processor="another")], tmp_path).cells == []
    trl, again = (Cell(named([f"ways/{name}"], KNOWN)[0], 7) for name in (TRL, AGAIN))
    assert Plan.of([trl], [], tmp_path).cells == [again, trl]


def test_a_run_waits_for_its_start_and_starts_are_made_when_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "starts" / "ways-1" / "final").mkdir(parents=True)
    first, second, third = (
        Cell(named([label], KNOWN)[0], seed)
        for label, seed in (("rare/no scaling", 1), ("ways/mu 4", 1), ("rare/no scaling", 2))
    )
    bases = [
        record(Cell(named([f"{cell.experiment.task}/{BASELINE}"], KNOWN)[0], cell.seed))
        for cell in (first, second, third)
    ]
    plan = Plan.of([first, second, third], bases, tmp_path)
    assert plan.starts == [("slips", 1), ("slips", 2)]
    left, todo, made = list(plan.starts), list(plan.cells), set[Any]()
    assert pool._next(left, todo, made, plan) == ("slips", 1)
    assert pool._next(left, todo, made, plan) == ("slips", 2)
    assert pool._next(left, todo, made, plan) == second
    assert pool._next(left, todo, made, plan) is None
    made.add(("slips", 2))
    assert pool._next(left, todo, made, plan) == third
    made.add(("slips", 1))
    assert pool._next(left, todo, made, plan) == first


# --- a run


@pytest.fixture(scope="module")
def cell_and_work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, Path]:
    """A small run whose start is there, of a model that knows nothing."""
    work = tmp_path_factory.mktemp("atlas")
    start = work / "starts" / "ways-3" / "final"
    start.parent.mkdir(parents=True)
    build_tiny(start, seed=3)
    known = named(["ways/5% flipped"], KNOWN)[0]
    flags = (*SMALL, *SHORT)
    return Cell(replace(known, change=(*known.change, *flags)), 3), work


def test_a_record_is_what_the_program_logs_with_the_same_flags(cell_and_work: tuple[Cell, Path]) -> None:
    cell, work = cell_and_work
    found = runs.record_of(cell, work)
    assert not list((work / "running").glob("*/*")), "the run's folder is gone"
    flags = [*cell.experiment.flags, "--model", str(work / "starts" / "ways-3" / "final"), "--seed", "3"]
    folder = run(prepare(parse_config(GRPOConfig, [*flags, "--output_dir", str(work / "by-hand")], PRESETS)))
    log = [line for line in read_jsonl(folder / "log.jsonl") if line["kind"] == "train"]
    rows = read_jsonl(folder / "completions.jsonl")
    assert found["curve"]["step"] == [5, 10]
    entropies = [sum(line["entropy"] for line in log[first : first + 5]) / 5 for first in (0, 5)]
    assert found["curve"]["entropy"] == pytest.approx(entropies, rel=1e-4)
    lengths = [row["tokens"] for row in rows if row["step"] > 5 and row["extracted"] != row["expected"]]
    assert found["curve"]["wrong_length"][1] == pytest.approx(sum(lengths) / len(lengths), rel=1e-4)
    noisy = [row["rewards"]["flipped_5"] for row in rows if row["step"] <= 5]
    assert found["curve"]["rewards"]["flipped_5"][0] == pytest.approx(sum(noisy) / len(noisy), rel=1e-4)
    answers = read_jsonl(folder / "heldout" / "step-000010.jsonl")
    tokens = [sample["tokens"] for answer in answers for sample in answer["samples"]]
    assert found["after"]["length"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
    assert len(found["after"]["greedy"]) == len(found["before"]["sampled"]) == 6 and found["after"]["samples"] == 2
    json.dumps(found, allow_nan=False)


def test_answers_are_counted_by_problem(tmp_path: Path) -> None:
    (tmp_path / "heldout").mkdir()
    reply = {"response": "", "extracted": "1", "lenient": True, "truncated": False}
    answer = {"question": "?", "expected": "1", **reply, "tokens": 5, "steps": 1}
    rows = [
        {**answer, "strict": right, "samples": [{**reply, "strict": s, "tokens": t} for s, t in samples]}
        for right, samples in ((True, [(True, 4), (True, 6)]), (False, [(False, 9), (True, 8)]))
    ]
    (tmp_path / "heldout" / "step-000007.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = runs.held_out(tmp_path, 7)
    assert (found["greedy"], found["sampled"], found["samples"]) == ("10", "21", 2)
    assert (found["length"], found["right_length"], found["wrong_length"]) == (6.75, 6.0, 9.0)


def test_a_mean_of_nothing_or_of_what_is_not_finite_is_none() -> None:
    assert runs._mean([]) is None and runs._mean([1.0, float("nan")]) is None and runs._mean([None, 2.0]) == 2.0


@pytest.mark.slow
def test_runs_on_two_processes_are_kept_as_they_end_and_a_failure_is_told(
    cell_and_work: tuple[Cell, Path],
) -> None:
    cell, work = cell_and_work
    broken = replace(cell.experiment, name="broken", change=(*cell.experiment.change, "--lr", "-1"))
    wanted, path = [Cell(broken, 3), cell, Cell(replace(cell.experiment, name="again"), 3)], work / "runs.jsonl"
    base = record(Cell(named([f"ways/{BASELINE}"], KNOWN)[0], 3))
    failed = pool.take(Plan.of(wanted, [base], work), path, work, processes=2, minutes=None)
    assert len(failed) == 1 and failed[0].startswith("ways/broken, seed 3: ") and "--lr" in failed[0]
    first, second = sorted(read_jsonl(path), key=lambda found: found["experiment"])
    assert (first["experiment"], second["experiment"]) == ("5% flipped", "again")
    assert first["curve"] == second["curve"] and first["after"] == second["after"]
    assert Plan.of(wanted, [base, first, second], work).cells == wanted[:1]
    assert pool.take(Plan.of(wanted, [base], work), path, work, processes=1, minutes=1e-9) == []
    assert len(read_jsonl(path)) == 2, "the time was over before the first run"


@pytest.mark.parametrize("name", ["5% flipped", "temperature 1.3"])
def test_a_run_that_reads_its_answers_before_training_has_the_record_of_one_that_gives_them(
    cell_and_work: tuple[Cell, Path], name: str
) -> None:
    _, work = cell_and_work
    known = named([f"ways/{name}"], KNOWN)[0]
    cell = Cell(replace(known, change=(*known.change, *SMALL, *SHORT)), 3)
    kept = work / "starts" / "ways-3" / "before-6x2-8-float32.jsonl"
    kept.unlink(missing_ok=True)
    first, second = runs.record_of(cell, work), runs.record_of(cell, work)
    assert kept.is_file()
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_held_out_answers_are_drawn_at_temperature_one_whatever_a_run_trains_with(
    cell_and_work: tuple[Cell, Path],
) -> None:
    _, work = cell_and_work
    small = "--prompts_per_step 1 --group_size 2 --max_steps 1 --eval_problems 4 --max_completion_tokens 8 --lr 1e-12"
    model = ["--model", str(work / "starts" / "ways-3" / "final")]
    answers = {}
    for name in ("baseline", "temperature 1.3", "top_p 0.9"):
        folder = work / name.replace(" ", "-")
        flags = [*named([f"ways/{name}"], KNOWN)[0].flags, *small.split(), *model, "--output_dir", str(folder)]
        log, _ = runs.trained(parse_config(GRPOConfig, flags, PRESETS))
        answers[name] = [read_jsonl(folder / "heldout" / f"step-00000{step}.jsonl") for step in (0, 1)]
        assert [line["kind"] for line in log] == ["train", "eval"]
    assert answers["temperature 1.3"] == answers["top_p 0.9"] == answers["baseline"]
