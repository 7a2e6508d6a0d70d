"""The thresholds of the doctor: the healthy run with one thing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_core.doctor.readlog import Run
from tests.test_doctor import changed, changed_config, found, names, sick

# --- thresholds: the healthy run with one thing changed


def rising(start: float, end: float) -> Any:
    return lambda at, line: start + (end - start) * at / 29 + 0.001 * (-1) ** at


def stepping(before: float, after: float) -> Any:
    return lambda at, line: before if at < 15 else after


FLAT = {"reward_mean": 0.3}


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("skipped_steps", {"skipped_steps": 1}, {"skipped_steps": 2}),  # of 60 updates
        ("first_ratio", {"ratio_first_max": 1.0009}, {"ratio_first_max": 1.0011}),
        ("first_ratio", {"ratio_first_min": 0.9991}, {"ratio_first_min": 0.9989}),
        ("sampler_gap", {"sampler_gap_mean": 9e-4}, {"sampler_gap_mean": 1.1e-3}),
        ("everything_truncated", {"truncated_share": 0.79}, {"truncated_share": 0.81}),
        ("too_easy", {"zero_variance_share": 0.69, "accuracy": 0.95}, {"zero_variance_share": 0.71, "accuracy": 0.95}),
        ("too_easy", {"zero_variance_share": 0.8, "accuracy": 0.89}, {"zero_variance_share": 0.8, "accuracy": 0.91}),
        ("too_hard", {"zero_variance_share": 0.8, "accuracy": 0.16}, {"zero_variance_share": 0.8, "accuracy": 0.14}),
        ("groups_alike", {"zero_variance_share": 0.69}, {"zero_variance_share": 0.71}),
        (
            "clipped",
            {"zero_variance_share": 0.5, "clip_ratio_low": 0.02, "clip_ratio_high": 0.029},
            {"zero_variance_share": 0.5, "clip_ratio_low": 0.02, "clip_ratio_high": 0.031},
        ),
        ("kl_explodes", {"kl": 0.99}, {"kl": 1.01}),
        ("entropy_collapse", {"entropy": rising(0.2, 0.06)}, {"entropy": rising(0.2, 0.02)}),
        ("entropy_collapse", {"entropy": stepping(0.16, 0.042)}, {"entropy": stepping(0.16, 0.038)}),
        ("entropy_collapse", {"entropy": stepping(1.0, 0.055)}, {"entropy": stepping(1.0, 0.045)}),
        ("lr_too_high", {**FLAT, "grad_norm": stepping(1.0, 9.0)}, {**FLAT, "grad_norm": stepping(1.0, 11.0)}),
        ("lr_too_high", {**FLAT, "entropy": stepping(0.2, 0.57)}, {**FLAT, "entropy": stepping(0.2, 0.63)}),
        ("length_to_budget", {"length_mean": rising(10, 37)}, {"length_mean": rising(10, 43)}),
        ("length_to_budget", {"length_mean": rising(40, 45)}, {"length_mean": rising(30, 45)}),
        ("reward_hacking", {"accuracy": rising(0.3, 0.31)}, {"accuracy": rising(0.3, 0.2)}),
        ("lr_too_high", {"reward_mean": rising(0.3, 0.35)}, {"reward_mean": rising(0.4, 0.2)}),
    ],
)
def test_a_finding_begins_at_its_threshold(name: str, below: dict[str, Any], above: dict[str, Any]) -> None:
    run = replace(sick("healthy"), eval=[])
    assert name not in names(changed(run, **below))
    assert name in names(changed(run, **above))


FALLING = [{"problems": 128, "accuracy": value} for value in (0.6, 0.6, 0.3)]
RISING = [{"problems": 128, "accuracy": value} for value in (0.2, 0.3, 0.6)]


@pytest.mark.parametrize(
    ("name", "excused", "ill", "heldout"),
    [
        ("entropy_collapse", {"accuracy": 0.95, "entropy": stepping(0.2, 0.01)}, {"entropy": stepping(0.2, 0.01)}, []),
        ("reward_hacking", {"accuracy": 0.95}, {"accuracy": 0.85}, []),
        ("reward_flat", {**FLAT, "accuracy": 0.3, "zero_variance_share": 0.8}, {**FLAT, "accuracy": 0.3}, []),
        (
            "groups_alike",
            {"zero_variance_share": lambda at, line: 0.1 if at < 6 else 1.0},
            {"zero_variance_share": lambda at, line: 0.4 if at < 6 else 1.0},
            [],
        ),
        ("heldout_falls", {"accuracy": 0.3}, {}, FALLING),
        ("heldout_falls", {**FLAT}, {}, FALLING),
        (
            "lr_too_high",
            {"reward_mean": lambda at, line: (0.1, 0.5, 0.35)[at // 10]},
            {"reward_mean": lambda at, line: (0.1, 0.5, 0.25)[at // 10]},
            [],
        ),
        (
            "never_rewarded",
            {"rewards/numeric_reward_func": lambda at, line: at, "rewards_std/numeric_reward_func": 0},
            {"rewards/numeric_reward_func": 0, "rewards_std/numeric_reward_func": 0},
            [],
        ),
    ],
)
def test_similar_signs_with_another_cause_are_no_finding(
    name: str, excused: dict[str, Any], ill: dict[str, Any], heldout: list[Any]
) -> None:
    run = replace(sick("healthy"), eval=heldout)
    assert name not in names(changed(run, **excused))
    assert name in names(changed(run, **ill))


def test_held_out_accuracy_that_rises_clears_a_reward_of_hacking() -> None:
    run = changed(sick("healthy"), accuracy=0.3)
    assert "reward_hacking" not in names(replace(run, eval=RISING))
    assert "reward_hacking" in names(replace(run, eval=[]))


def test_a_few_skipped_updates_are_no_finding() -> None:
    run = changed_config(sick("healthy"), mu=5)  # 300 updates
    assert "skipped_steps" not in names(changed(run, skipped_steps=6))
    assert "skipped_steps" in names(changed(run, skipped_steps=7))


@pytest.mark.parametrize(("answered", "is_found"), [(40, True), (60, False)])
def test_a_format_that_is_found_now_and_then_is_not_called_unknown(answered: int, is_found: bool) -> None:
    rows = [{"extracted": "7" if row < answered else ""} for row in range(1000)]
    run = replace(sick("format_never_earned"), completions=rows)
    assert ("format_never_earned" in names(run)) == is_found


def test_a_task_without_numbers_is_not_blamed_for_its_format() -> None:
    """The rule of --prompt_format finds no answer where a reward of one's own asks for something else, and pays."""
    run = replace(sick("healthy"), completions=[{"extracted": None}] * 100)
    assert names(run) == []


@pytest.mark.parametrize(("noise", "is_found"), [(0.026, True), (0.045, False)])
def test_a_reward_that_falls_must_fall_by_more_than_its_noise(noise: float, is_found: bool) -> None:
    """From 0.5 to 0.4, with lines that jump by twice `noise`: a fall of 5 errors, and one of 3."""
    run = changed(sick("healthy"), reward_mean=lambda at, line: (0.5 if at < 15 else 0.4) + noise * (-1) ** at)
    fall = run.change("reward_mean").fall
    assert (4 < fall < 6) if is_found else (2.5 < fall < 4), fall
    assert ("lr_too_high" in names(run)) == is_found


def test_an_optimizer_problem_is_found_by_its_signs_too() -> None:
    flat = changed(sick("healthy"), reward_mean=0.3)
    for key in ("grad_norm", "entropy"):
        wild = changed(flat, **{key: lambda at, line: 0.2 if at < 15 else 4.0 + 0.1 * (-1) ** at})
        assert names(wild)[0] == "lr_too_high"
    calm = changed(flat, grad_norm=lambda at, line: 0.2 if at < 15 else 1.9, entropy=0.1)
    assert "lr_too_high" not in names(calm)
    learns = changed(sick("healthy"), grad_norm=lambda at, line: 0.2 if at < 15 else 4.0)
    assert names(learns) == []  # the reward has risen all the same


def test_a_flat_reward_is_blamed_on_the_learning_rate_only_where_that_is_tiny() -> None:
    flat = replace(changed(sick("healthy"), reward_mean=0.3, accuracy=0.3), eval=[])
    assert names(flat) == ["reward_flat"]
    assert names(changed(flat, learning_rate=1.1e-7)) == ["reward_flat"]
    assert names(changed(flat, learning_rate=1e-7)) == ["lr_too_low"]
    assert names(changed(flat, grad_norm=0.0)) == []
    better = [{"problems": 128, "accuracy": value} for value in (0.24, 0.6)]
    assert names(replace(flat, eval=better)) == []  # greedy answers have become better


def test_held_out_accuracy_must_fall_by_more_than_chance() -> None:
    run = sick("healthy")

    def ending(accuracy: float) -> Run:
        return replace(run, eval=[{"problems": 128, "accuracy": value} for value in (0.3, 0.6, accuracy)])

    assert names(ending(0.5)) == []
    assert names(ending(0.45)) == ["heldout_falls"]
    from_nothing = [{"problems": 128, "accuracy": value} for value in (0.0, 0.6, 0.49)]
    assert names(replace(run, eval=from_nothing)) == []  # the best one's luck counts, not the first one's


def test_the_overlong_penalty_may_stay_at_0_and_a_reward_that_never_has_an_opinion_may_not() -> None:
    run = sick("healthy")
    extra: dict[str, Any] = {"rewards/soft_overlong_reward_func": 0.0, "rewards_std/soft_overlong_reward_func": 0.0}
    assert names(changed(run, **extra)) == []
    assert names(changed(run, **{"rewards/judge": 0.0, "rewards_std/judge": 0.0})) == ["dead_reward"]
    silent = changed(run, **{"rewards/judge": None, "rewards_std/judge": None})
    assert names(silent) == ["dead_reward"] and found(silent, "dead_reward").evidence == "judge always None"
    assert names(changed(run, **{"rewards/judge": 1.0, "rewards_std/judge": 0.06})) == []
    assert names(changed(run, **{"rewards/judge": 1.0, "rewards_std/judge": 0.04})) == ["dead_reward"]
    assert names(changed(run, **{"rewards/judge": 0.001, "rewards_std/judge": 0.03})) == []


def test_where_every_reward_is_earned_by_all_the_task_is_too_easy_and_no_function_dead() -> None:
    earned: dict[str, Any] = {f"{kind}/judge": value for kind, value in (("rewards", 1.0), ("rewards_std", 0.0))}
    earned |= {"rewards/numeric_reward_func": 0.99, "rewards_std/numeric_reward_func": 0.01}
    assert names(changed(sick("healthy"), **earned, accuracy=0.99, zero_variance_share=0.9)) == ["too_easy"]


def test_a_cut_sampler_or_half_precision_is_not_taken_for_a_bug() -> None:
    gap = changed(sick("healthy"), sampler_gap_mean=0.01)
    assert "a bug" in found(gap, "sampler_gap").advice
    assert "sampler_gap" not in names(changed_config(gap, precision="bf16"))
    assert "--top_k 5" in found(changed_config(gap, top_k=5), "sampler_gap").advice


def test_a_loss_that_ends_higher_or_moves_nowhere_is_found() -> None:
    run = sick("sft_healthy")
    assert names(changed(run, loss=rising(2.0, 2.5))) == []  # 20 lines: 2 to 2.33
    assert names(changed(run, loss=rising(2.0, 4.0))) == ["sft_diverges"]
    assert names(changed(run, loss=lambda at, line: [0.9, 5.0, 4.0, 3.0][min(at, 3)] - at / 12)) == ["sft_diverges"]
    assert names(changed(run, loss=lambda at, line: 2 + 0.1 * (-1) ** at)) == ["sft_loss_flat"]


def test_gspo_clips_more_by_intent() -> None:
    run = changed(sick("healthy"), zero_variance_share=0.0, clip_ratio_low=0.1, clip_ratio_high=0.1)
    assert "clipped" in names(run)
    assert "clipped" not in names(changed_config(run, loss="gspo"))
    assert "clipped" not in names(changed_config(run, ratio_level="sequence"))
