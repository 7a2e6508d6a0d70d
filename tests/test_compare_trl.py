"""What `python -m benchmarks.compare_trl` claims: equal numbers, a comparison that can fail, declared differences."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_core.step
from benchmarks import compare_trl
from benchmarks.parity.cases import FAMILIES, NOT_COMPARED, Case, Trace, all_cases, completions
from benchmarks.parity.compare import BOUNDS, LEAST_MOVED, differences, moved, over_bound, relative
from grpo_core.config import LOSSES
from grpo_core.recipes import settings_of

pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed (Python 3.11 and newer only)"),
    # TRL 1.16 uses names that transformers 5 and accelerate renamed, and warns of its experimental rollout_func.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@lru_cache(maxsize=3)
def trained_by_trl(folder: Path, loss: str, mask_truncated: bool = False, temperature: float = 0.7) -> Trace:
    """TRL's side of the case that several tests change on ours."""
    from benchmarks.parity import ours, theirs

    case = Case(loss, "qwen2", 0.1, 2, temperature, mask_truncated=mask_truncated)
    return theirs.run(case, ours.configuration(case, folder), folder)


def measured(case: Case, folder: Path, their_trace: Trace, **changed: Any) -> dict[str, float | None]:
    """Stage -> difference; `changed` are fields of our configuration that TRL did not get."""
    from benchmarks.parity import ours

    config = replace(ours.configuration(case, folder), **changed)
    our_trace = ours.run(case, config, their_trace.rollouts)
    assert moved(our_trace) > LEAST_MOVED
    return differences(case, our_trace, their_trace)


def over(found: dict[str, float | None]) -> set[str]:
    return set(over_bound(found))


# CI also runs every third of all cases: `python -m benchmarks.compare_trl --every 3`.
@pytest.mark.parametrize(("number", "loss"), list(enumerate(LOSSES)))
def test_every_named_loss_is_trls_in_every_stage(number: int, loss: str, folder: Path) -> None:
    """Off-policy, with a reference, truncated rows masked, rows without a reward, and accumulation where TRL's result
    does not depend on it; the two families in turn."""
    from benchmarks.parity import ours, theirs

    accumulation = 1 if loss == "bnpo" else 2
    family = FAMILIES[number % 2]
    case = Case(loss, family, 0.1, 2, 1.3, accumulation, mask_truncated=True, none_rewards=True)
    their_trace = theirs.run(case, ours.configuration(case, folder), folder)
    assert over(measured(case, folder, their_trace)) == set()


WITH_OPTIONS = [case for case in all_cases() if case.fields and "recipe" not in case.fields]
RECIPE_CASES = [case for case in all_cases() if "recipe" in case.fields and case.family == "qwen2"]


# Each option once, in the two families in turn: the list holds both, one after the other.
@pytest.mark.parametrize("case", [case for i, case in enumerate(WITH_OPTIONS) if i % 4 in (0, 3)], ids=str)
def test_every_option_is_trls_in_every_stage_and_changes_something(case: Case, folder: Path) -> None:
    from benchmarks.parity import ours, theirs

    config, without = ours.configuration(case, folder), ours.configuration(replace(case, fields={}), folder)
    their_trace = theirs.run(case, config, folder)
    our_trace = ours.run(case, config, their_trace.rollouts)
    assert over(differences(case, our_trace, their_trace)) == set()
    plain_trace = ours_as_theirs(case, without, their_trace)
    assert "weights" in over(differences(replace(case, fields={}), our_trace, plain_trace))


@pytest.mark.parametrize("case", RECIPE_CASES, ids=lambda case: case.fields["recipe"])
def test_every_recipe_is_trls_in_every_stage(case: Case, folder: Path) -> None:
    from benchmarks.parity import ours, theirs

    config = ours.configuration(case, folder)
    for name, value in settings_of(case.fields["recipe"]).items():
        if name not in (*NOT_COMPARED, "ref_sync_every"):
            assert getattr(config, name) == value
    their_trace = theirs.run(case, config, folder)
    assert over(measured(case, folder, their_trace)) == set()


def ours_as_theirs(case: Case, config: Any, their_trace: Trace) -> Trace:
    """Our trace of the same rollouts under another configuration, with TRL's metrics."""
    from benchmarks.parity import ours

    return replace(ours.run(case, config, their_trace.rollouts), metrics=their_trace.metrics)


def test_what_is_not_a_number_passes_no_stage(folder: Path) -> None:
    from benchmarks.parity import ours

    case, their_trace = Case("dapo", "qwen2", 0.1, 2), trained_by_trl(folder, "dapo")
    computed = ours.run(case, ours.configuration(case, folder), their_trace.rollouts)
    assert over(differences(case, computed, their_trace)) == set()
    nan = float("nan")
    for stage in BOUNDS.keys() - {"masks"}:
        our_trace = deepcopy(computed)
        if stage in ("gradients", "weights"):
            tensors = our_trace.gradient[3] if stage == "gradients" else our_trace.weights[3]
            next(iter(tensors.values())).view(-1)[0] = nan
        elif stage == "loss":
            our_trace.loss[3] = nan
        elif stage in ("KL", "metrics"):
            our_trace.metrics[1]["kl" if stage == "KL" else "entropy"] = nan
        else:
            of_stage = {
                "advantages": our_trace.advantage,
                "log-probs": our_trace.logp,
                "old log-probs": our_trace.old_logp,
                "reference log-probs": our_trace.ref_logp,
            }
            of_stage[stage][1].view(-1)[0] = nan
        assert stage in over(differences(case, our_trace, their_trace)), stage


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"epsilon_low": 0.39}, {"loss"}),
    ({"epsilon_high": 0.59}, {"loss"}),
    ({"temperature": 1.29}, {"log-probs", "old log-probs", "reference log-probs"}),
    ({"beta": 0.101}, {"loss"}),
    ({"aggregation": "sequence_mean"}, {"loss"}),
    ({"scale_rewards": "batch"}, {"advantages"}),
    ({"mask_truncated": False}, {"masks"}),
    ({"kl_correction": True}, {"gradients"}),
    ({"lr": 5.1e-3}, {"weights"}),
    ({"adam_beta1": 0.85}, {"weights"}),
    ({"reward_weights": [1.0, 0.51]}, {"advantages", "metrics"}),
]


@pytest.mark.parametrize(("changed", "stages"), CHANGES, ids=[" ".join(changed) for changed, _ in CHANGES])
def test_a_small_change_of_one_setting_is_noticed(changed: dict[str, Any], stages: set[str], folder: Path) -> None:
    their_trace = trained_by_trl(folder, "dapo", mask_truncated=True, temperature=1.3)
    case = Case("dapo", "qwen2", 0.1, 2, 1.3, mask_truncated=True)
    assert stages <= over(measured(case, folder, their_trace, **changed))


WRONG: dict[str, Any] = {
    "k3_kl": lambda logp, ref: logp - ref,
    "clipped_surrogate": lambda ratio, advantage, *_: -ratio * advantage,
    "token_weights": lambda mask, *_: mask / mask.numel(),
    "importance_ratio": lambda logp, old, *_: (logp - old + 1e-4).exp(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_is_noticed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_core.step, name, WRONG[name])
    found = measured(Case("dapo", "qwen2", 0.1, 2), folder, trained_by_trl(folder, "dapo"))
    assert {"loss", "gradients"} <= over(found)


def test_the_cases_are_every_combination_of_every_named_loss() -> None:
    cases = [case for case in all_cases() if not case.fields]
    for loss in LOSSES:
        accumulations = (1,) if loss == "bnpo" else (1, 2)
        settings = {
            (c.family, c.beta > 0, c.mu, c.accumulation, c.mask_truncated, c.none_rewards)
            for c in cases
            if c.loss == loss
        }
        assert len(settings) == 2 * 2 * 2 * len(accumulations) * 2 * 2
        assert {c.temperature for c in cases if c.loss == loss} == {0.7, 1.3}


def test_the_completions_are_of_all_kinds() -> None:
    for rollout in range(3):
        made = completions(rollout, 8)
        lengths = [len(ids) for ids in made]
        assert 1 in lengths and lengths.count(8) >= 2 and len({tuple(ids) for ids in made}) == 8


def test_a_relative_difference_is_of_the_parameter_itself_unless_it_is_tiny() -> None:
    theirs = {"large": torch.tensor([3.0, -4.0]), "small": torch.tensor([0.1]), "tiny": torch.tensor([1e-6])}
    shifted = {name: gradient.clone() for name, gradient in theirs.items()}
    assert relative(shifted, theirs) == 0
    shifted["large"][0] += 5e-3
    assert relative(shifted, theirs) == pytest.approx(1e-3, rel=1e-3)
    shifted["small"] *= 1.5
    assert relative(shifted, theirs) == pytest.approx(0.5)
    shifted["tiny"] *= 3
    assert relative(shifted, theirs) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_command_prints_its_tables_and_fails_when_a_bound_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.parity import declared

    monkeypatch.setattr(declared, "MEASURES", [declared.cispo_bound, declared.advantage_of_equal_rewards])
    file = tmp_path / "table.md"
    argv = ["--every", "400", "--output", str(file)]  # two cases
    assert compare_trl.main(argv) == 0
    printed = capsys.readouterr().out
    assert file.read_text() == printed
    assert "| **largest** | 2 |" in printed and "| CISPO's bound |" in printed

    monkeypatch.setitem(BOUNDS, "weights", 1e-12)
    assert compare_trl.main(argv) == 1
    assert "over its bound: weights" in capsys.readouterr().err


def test_without_trl_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_trl, "find_spec", lambda name: None)
    assert compare_trl.main([]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: the comparison needs trl: pip install -c constraints.txt '.[trl]'"
    )


@pytest.mark.slow
def test_every_declared_difference_is_one(folder: Path) -> None:
    from benchmarks.parity.declared import MEASURES

    for measure in MEASURES:
        difference = measure(folder)
        if "pieces" in difference.quantity or difference.quantity.startswith("the same"):
            assert difference.ours < 1e-5 < 3e-4 < difference.theirs, difference
        else:
            assert abs(difference.theirs - difference.ours) > 1e-6, difference
