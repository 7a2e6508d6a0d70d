"""What the atlas says of its records: estimates, verdicts, tables, and numbers in prose."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from benchmarks.atlas import words
from benchmarks.atlas.estimate import Study, agreement, study
from benchmarks.atlas.intervals import crossed, crossed_unpaired, paired
from benchmarks.atlas.page import fill, report
from benchmarks.atlas.records import CHECKS, Run, band, experiments, parsed
from tests.atlas_records import records

stats = pytest.importorskip("scipy.stats", reason="pip install '.[test]'")


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return records()


@pytest.fixture(scope="module")
def runs(lines: list[dict[str, Any]]) -> list[Run]:
    return parsed([json.dumps(line) for line in lines])


@pytest.fixture(scope="module")
def found(runs: list[Run]) -> Study:
    return study(runs)


def shares(lines: list[dict[str, Any]], experiment: str, task: str = "ways") -> Any:
    """The share of right samples by seed and problem, (S, P), read from the records by hand."""
    chosen = [line for line in lines if (line["task"], line["experiment"]) == (task, experiment)]
    return np.array([[int(c) / 4 for c in line["after"]["sampled"]] for line in chosen])


# --- estimates


def test_a_difference_is_of_the_same_seeds_and_problems(lines: list[dict[str, Any]], found: Study) -> None:
    expected = crossed(shares(lines, "mu 4") - shares(lines, "baseline"))
    assert found.results["ways", "mu 4"].difference == expected
    assert found.results["ways", "mu 4"].accuracy == crossed(shares(lines, "mu 4"))


def test_runs_in_another_order_give_the_same_differences(runs: list[Run], found: Study) -> None:
    other = study(runs[::-1])
    assert {key: each.q for key, each in other.results.items()} == {key: each.q for key, each in found.results.items()}


def test_runs_of_other_processors_are_no_pair_for_their_starts_differ(lines: list[dict[str, Any]]) -> None:
    pairs = [line for line in lines if line["task"] == "ways" and line["experiment"] in ("baseline", "mu 4")]
    elsewhere = copy.deepcopy([line for line in pairs if line["seed"] < 3])
    for line in elsewhere:
        line["processor"] = "another"
        line["after"]["sampled"] = "0" * len(line["after"]["sampled"])  # a bad start for both: their difference is 0
    found = study([Run.of(line) for line in [*pairs, *elsewhere]])
    mu, base = (shares([*pairs, *elsewhere], name) for name in ("mu 4", "baseline"))
    assert len(mu) == 7 and found.results["ways", "mu 4"].difference == crossed((mu - base)[[0, 5, 1, 6, 2, 3, 4]])
    alone = study([Run.of(line) for line in [*pairs, *(each for each in elsewhere if each["experiment"] == "mu 4")]])
    assert (
        alone.results["ways", "mu 4"].difference
        == study([Run.of(line) for line in pairs]).results["ways", "mu 4"].difference
    )


def test_only_shared_seeds_are_compared(runs: list[Run], found: Study) -> None:
    fewer = study([run for run in runs if (run.experiment, run.seed) != ("mu 4", 2)]).results["ways", "mu 4"]
    only = study([run for run in runs if run.seed != 2]).results["ways", "mu 4"]
    assert fewer.difference == only.difference != found.results["ways", "mu 4"].difference


def test_the_baseline_with_other_seeds_is_compared_unpaired(lines: list[dict[str, Any]], found: Study) -> None:
    again = found.results["ways", "baseline again"]
    assert again.difference == crossed_unpaired(shares(lines, "baseline"), shares(lines, "baseline again"))
    assert again.q is None


def test_trl_is_compared_with_all_seeds_of_the_baseline(lines: list[dict[str, Any]], found: Study) -> None:
    both = np.concatenate([shares(lines, "baseline"), shares(lines, "baseline again")])
    assert len(both) == 10
    assert found.results["ways", "TRL"].difference == crossed(shares(lines, "TRL") - both)
    assert [seed for seed, _ in found.of_all_seeds("ways").starts] == list(range(1, 11))


def test_the_comparisons_are_all_experiments_but_the_checks(found: Study) -> None:
    compared = {name for (_, name), each in found.results.items() if each.q is not None}
    assert compared == {name for _, name in found.results} - set(CHECKS)
    p = [each.difference.p for each in found.results.values() if each.q is not None and each.difference]
    q = [each.q for each in found.results.values() if each.q is not None]
    assert q == pytest.approx(list(stats.false_discovery_control(p)))


def test_a_scalar_is_compared_by_seed_and_a_run_that_has_none_is_left_out(runs: list[Run], found: Study) -> None:
    first, second = (found.results["ways", name].experiment for name in ("baseline", "mu 4"))
    ends_S = [np.mean([run.curve["entropy"][-4:].mean() for run in each.runs]) for each in (first, second)]
    entropy = found.between(first, second, "entropy")
    assert entropy and entropy.value == pytest.approx(ends_S[1] - ends_S[0]) and entropy.high < 0
    assert not np.isnan(found.values(second, "wrong length")).any()  # its last point is null
    assert found.between(first, found.results["ways", "shuffled rewards"].experiment, "steps") is None


def test_a_seed_without_a_number_is_left_out_but_one_that_never_got_there_is_not(lines: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(lines)
    line = next(line for line in changed if (line["experiment"], line["seed"]) == ("mu 4", 3))
    line["curve"]["wrong_length"] = [None] * 16
    line["curve"]["accuracy"] = [0.2] * 16
    found = study([Run.of(line) for line in changed])
    first, second = (found.results["ways", name].experiment for name in ("baseline", "mu 4"))
    length = found.between(first, second, "wrong length")
    values = [np.delete(found.values(each, "wrong length"), 2) for each in (first, second)]
    assert length == paired(values[1] - values[0])
    assert found.between(first, second, "steps") is None  # the four others would make it look quick
    assert "34 (4 of 5)" in fill("<!-- = ways/mu 4/steps --><!-- . -->", found)


def test_steps_count_to_half_of_the_baselines_way(found: Study) -> None:
    assert found.levels["ways"] == 0.45
    run = found.results["ways", "mu 4"].experiment.runs[0]
    step = found.values(found.results["ways", "mu 4"].experiment, "steps")[0]
    at = run.curve["step"].tolist().index(step)
    assert run.curve["accuracy"][at] >= 0.45 > max(run.curve["accuracy"][:at])


def test_curves_are_compared_with_each_others_bands(found: Study) -> None:
    named = {name: found.results["ways", name].experiment for name in ("baseline", "TRL", "mu 8, no clipping")}
    alike = agreement(named["TRL"], found.of_all_seeds("ways"))
    unlike = agreement(named["mu 8, no clipping"], named["baseline"])
    assert alike and alike.first_in_second == 1.0
    assert unlike and unlike.first_in_second < 0.2
    assert agreement(named["TRL"], named["baseline"], "no such curve") is None


def test_a_band_runs_from_the_lowest_to_the_highest_and_a_null_of_all_seeds_is_a_gap(found: Study) -> None:
    experiment = found.results["ways", "baseline"].experiment
    accuracy, wrong = band(experiment, "accuracy"), band(experiment, "wrong_length")
    values_SC = np.stack([run.curve["accuracy"] for run in experiment.runs])
    assert accuracy and wrong
    for got, want in zip((accuracy.low, accuracy.mean, accuracy.high), (np.min, np.mean, np.max), strict=True):
        assert got == pytest.approx(want(values_SC, axis=0))
    assert np.isnan(wrong.mean[-1]) and not np.isnan(wrong.mean[:-1]).any()


def test_records_that_contradict_each_other_are_refused(lines: list[dict[str, Any]], runs: list[Run]) -> None:
    with pytest.raises(ValueError, match="ways, baseline, seed 1 on a processor: recorded twice"):
        experiments([*runs, runs[0]])
    other = copy.deepcopy(lines[0]) | {"seed": 9}
    other["after"]["sampled"] += "0"
    with pytest.raises(ValueError, match="ways: runs with 64 and 65 held-out problems"):
        experiments([*runs, Run.of(other)])


# --- words and tables


def test_verdicts_say_what_was_found_and_what_is_excluded(found: Study) -> None:
    said = {name: words.verdict(result) for (task, name), result in found.results.items() if task == "ways"}
    assert said["mu 4"].startswith("better: +9.5 points [+4.0, +15.1], q = 0.0")
    assert said["mu 8, no clipping"].endswith("q < 0.001, by Holm's rule too")
    assert said["mu 2"].startswith("no difference found; more than +3.3 and less than -6.1 points are excluded, q = ")
    unclear = words.verdict(found.results["budget", "mask cut-off rows"])
    assert unclear.startswith("not clear: +8.7 points [+0.8, +16.6], q = 0.067")


def test_a_control_is_flat_where_its_change_may_be_nothing(found: Study) -> None:
    assert words.control(found.results["ways", "shuffled rewards"]).startswith("flat: ")
    assert words.control(found.results["ways", "baseline"]).startswith("not flat: +")


PAGE = """Text.

<!-- atlas: ways -->
<!-- end -->

<!-- atlas: ways / mu, more -->
old
<!-- end -->

mu 4 is better by <!-- = ways/mu 4/difference -->?<!-- . -->, q <!-- = ways/mu 4/q --><!-- . -->;
of <!-- = compared -->2<!-- . --> comparisons.
Against mu 2: <!-- = ways/mu 4/difference against mu 2 --><!-- . -->, in entropy
<!-- = ways/mu 4/entropy against mu 2 --><!-- . -->. <!-- = budget/Dr. GRPO/verdict --><!-- . -->.

<!-- atlas: checks -->
<!-- end -->
<!-- atlas: TRL -->
<!-- end -->
"""


def test_a_page_is_filled_once_and_stays(runs: list[Run], found: Study) -> None:
    text = fill(PAGE, found)
    assert fill(text, found) == text and text.startswith("Text.\n")
    assert "<!-- = ways/mu 4/difference -->+9.5 points [+4.0, +15.1]<!-- . -->, q " in text
    assert "<!-- = compared -->7<!-- . --> comparisons." in text
    ends = [run.after.sampled_P.mean() for run in runs if run.label == "ways/mu 4"]
    lowest, highest = (f"{100 * end:.1f}" for end in (min(ends), max(ends)))
    assert fill("<!-- = ways/mu 4/range --><!-- . -->", found).endswith(f"->{lowest} to {highest}%<!-- . -->")
    assert "| mu 4 | `--flag 4` | 75.2 [70.0, 80.5] | **+9.5 [+4.0, +15.1]** |" in text
    table = text.split("<!-- atlas: ways / mu, more -->")[1].split("<!-- end -->")[0]
    first_cells = [line.split(" | ")[0] for line in table.strip().splitlines()[2:]]
    assert first_cells == ["| baseline", "| mu 2", "| mu 4", "| mu 8, no clipping"]


def test_a_question_may_have_commas_in_its_name(lines: list[dict[str, Any]]) -> None:
    named = [line | {"question": "mu, at last, more"} if line["question"] == "mu" else line for line in lines]
    again = study([Run.of(line) for line in named])
    for mark in ("ways / mu, at last, more", "ways / mu, at last, more, more", "ways / mu, at last, more, verdicts"):
        text = fill(f"<!-- atlas: {mark} -->\n<!-- end -->", again)
        assert "mu 8, no clipping" in text and "group 16" not in text


def test_a_page_that_is_older_than_its_records_is_not_current(lines: list[dict[str, Any]], found: Study) -> None:
    text = fill(PAGE[PAGE.index("Against mu 2") :], found)
    other = study([Run.of(line | {"seconds": 1.0} if line["experiment"] != "mu 4" else line) for line in lines])
    assert fill(text, other) == text  # nothing on the page is about seconds
    moved = copy.deepcopy(lines)
    for line in moved:
        if line["experiment"] == "mu 4":
            line["after"]["sampled"] = "4" + line["after"]["sampled"][1:-2] + "00"
    assert fill(text, study([Run.of(line) for line in moved])) != text


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("<!-- = ways/mu 5/difference --><!-- . -->", "'mu 5' is not recorded; the nearest is 'mu 4'"),
        ("<!-- = way/mu 4/difference --><!-- . -->", "'way' is not recorded; the nearest is 'ways'"),
        ("<!-- = ways/mu 4/diference --><!-- . -->", "the nearest is 'difference'"),
        ("<!-- = run --><!-- . -->", "the nearest is 'runs'"),
        ("<!-- atlas: ways / mue -->\n<!-- end -->", "'mue' is not recorded; the nearest is 'mu'"),
        ("<!-- atlas: ways, mor -->\n<!-- end -->", "the nearest is 'more'"),
        ("<!-- atlas: ways / mu, mor -->\n<!-- end -->", "the nearest is 'more'"),
    ],
)
def test_a_mark_that_names_nothing_is_refused(found: Study, mark: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(mark, found)


def test_the_report_holds_every_experiment_and_what_made_it(runs: list[Run], found: Study) -> None:
    text = report(found)
    assert all(text.count(f"\n| {run.experiment} | ") >= 2 for run in runs)
    assert "70 runs, 0.4 CPU hours, a processor; torch 2; commit 0123abc." in text
    assert text.count("]: flat |") == 2  # the control of each task
