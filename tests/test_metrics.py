"""What `grpo_core.metrics` claims: padding counts nowhere, sums over micro-batches become means over tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from eval.samples import Samples
from grpo_core.config import LOSSES
from grpo_core.metrics import Tally, step_record
from grpo_core.step import Terms, sample_groups
from rewards import Reward
from sft_core.run.runlog import append_jsonl
from tests.helpers import EXAMPLES, caught, ends_often, grpo_config, measured, step, tiny_policy, with_samples

MASK = torch.tensor([[True, True, True], [True, False, False]])


def tally(padding: float) -> dict[str, float]:
    """A micro-batch of four tokens with `padding` in every quantity where the mask is False."""

    def padded(*values: list[float]) -> torch.Tensor:
        return torch.where(MASK, torch.tensor(values), padding)

    counted = Tally(grpo_config(epsilon_low=0.2, epsilon_high=0.3, beta=0.1))
    counted.add(
        Terms(
            torch.tensor(-0.95),
            MASK,
            MASK / 4,
            torch.tensor([[1.0], [-1.0]]) * MASK,
            padded([1.25, 1.5, 2.0], [0.5, 0.0, 0.0]),
            torch.where(MASK, -1.0, 0.0),
            torch.where(MASK, 0.5, 0.0),
            torch.where(MASK, 2.0, 0.0),
        )
    )
    counted.updates = 1
    return counted.means()


@pytest.mark.parametrize("padding", [1.0, 0.01, 99.0])
def test_padding_counts_in_no_metric(padding: float) -> None:
    means = tally(padding)
    assert means == pytest.approx(
        {
            "grpo_loss": -1.0 + 0.1 * 0.5,
            "policy_loss": -1.0,
            "kl_loss": 0.5,
            "kl": 0.5,
            "entropy": 2.0,
            "clip_ratio_low": 1 / 4,  # 0.5, which is below 0.8, where the advantage is negative
            "clip_ratio_high": 2 / 4,  # 1.5 and 2, which are above 1.3, where it is positive
            "clip_ratio_low_min": 0.0,
            "clip_ratio_high_max": 2 / 3,
            "ratio_min": 0.5,
            "ratio_max": 2.0,
            "ratio_first_min": 0.5,
            "ratio_first_max": 2.0,
        }
    )


# --- ratios ---


def counted(config: Any, mask: Any, ratio: Any, advantage: Any, updates: list[int] | None = None) -> dict[str, float]:
    """The means over micro-batches of one row each, all of one update or of the updates given."""
    mask, ratio, advantage = torch.tensor(mask), torch.tensor(ratio), torch.tensor(advantage)
    tally, zeros = Tally(config), torch.zeros(1, mask.shape[1])
    for row, update in enumerate(updates or [0] * len(mask)):
        own = mask[row : row + 1]
        tally.updates = update
        tally.add(
            Terms(
                torch.tensor(0.0),
                own,
                own / 4,
                advantage[row : row + 1, None] * own,
                ratio[row : row + 1],
                zeros,
                zeros,
                zeros,
            )
        )
    tally.updates += 1
    return tally.means()


THREE = [[True, True, True, True], [True, True, False, False], [True, True, True, True]]
BOTH = {"epsilon_low": 0.2, "epsilon_high": 0.3}


def test_the_least_and_the_most_clipped_completions_are_found_over_all_micro_batches() -> None:
    config = grpo_config(**BOTH)
    low = counted(config, THREE, [[0.5, 0.5, 1, 1], [0.5, 0.9, 0, 0], [0.1] * 4], [-1.0, -1.0, -1.0])
    assert low["clip_ratio_low_min"] == 0.5 and low["clip_ratio_low"] == pytest.approx(7 / 10)
    assert low["clip_ratio_high_max"] == 0
    high = counted(config, THREE, [[2.0, 1, 1, 1], [2.0, 9.0, 9, 9], [1.0] * 4], [1.0, 1.0, 1.0])
    assert high["clip_ratio_high_max"] == 1 and high["clip_ratio_high"] == pytest.approx(3 / 10)
    assert high["clip_ratio_low_min"] == 0


def test_the_clipped_extremes_are_means_over_the_updates() -> None:
    ratios = [[1.0] * 4, [1.0] * 4, [2.0, 2.0, 2.0, 1.0]]
    found = counted(grpo_config(**BOTH), [[True] * 4] * 3, ratios, [1.0] * 3, updates=[0, 1, 1])
    assert found["clip_ratio_high_max"] == pytest.approx((0 + 3 / 4) / 2)


def test_clipping_is_counted_only_where_it_stops_the_pull() -> None:
    ratios = [[0.5] * 4, [2.0] * 4, [0.5, 2.0, 0.5, 2.0]]
    assert counted(grpo_config(**BOTH), [[True] * 4] * 3, ratios, [1.0, -1.0, 0.0])["clip_ratio_low"] == 0
    assert counted(grpo_config(**BOTH), [[True] * 4] * 3, ratios, [1.0, -1.0, 0.0])["clip_ratio_high"] == 0


@pytest.mark.parametrize(
    ("loss", "low", "high"), [("dapo", 1 / 3, 1 / 3), ("cispo", 0, 1 / 3), ("sapo", 0, 0), ("vespo", 0, 0)]
)
def test_each_loss_counts_what_it_bounds(loss: Any, low: float, high: float) -> None:
    ratios = [[0.5] * 4, [2.0] * 4, [1.1] * 4]
    found = counted(grpo_config(loss=loss, **BOTH), [[True] * 4] * 3, ratios, [-1.0, 1.0, 1.0])
    assert (found["clip_ratio_low"], found["clip_ratio_high"]) == (pytest.approx(low), pytest.approx(high))


def test_a_sequences_ratio_counts_each_completion_once_whatever_its_length() -> None:
    config = grpo_config(loss="gspo", **BOTH)
    found = counted(config, THREE, [[2.0], [0.5], [1.1]], [1.0, -1.0, 1.0])
    assert found["clip_ratio_high"] == found["clip_ratio_low"] == pytest.approx(1 / 3)
    assert (found["ratio_min"], found["ratio_max"]) == (0.5, 2.0)


def test_the_first_updates_ratios_are_logged_apart_from_those_of_later_ones() -> None:
    ratios = [[1.0, 1.0, 0.9, 1.0], [1.0, 1.1, 1.0, 1.0], [0.5, 2.0, 1.0, 1.0]]
    found = counted(grpo_config(**BOTH), [[True] * 4] * 3, ratios, [1.0] * 3, updates=[0, 0, 1])
    assert (found["ratio_first_min"], found["ratio_first_max"]) == (pytest.approx(0.9), pytest.approx(1.1))
    assert (found["ratio_min"], found["ratio_max"]) == (0.5, 2.0)


def test_a_steps_first_update_has_ratio_1_and_the_next_ones_have_not() -> None:
    config = grpo_config(group_size=4, mu=3, micro_batch=3)
    record = measured(ends_often(tiny_policy()), config, sampled(config))
    assert record["ratio_first_min"] == record["ratio_first_max"] == 1
    assert record["ratio_min"] < 0.99 and record["ratio_max"] > 1.01


def test_a_log_line_shows_why_nothing_is_learned() -> None:
    """One of two groups has equal rewards."""
    config = grpo_config(group_size=4)
    samples = sampled(config)

    def first_group_alone(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(row) if row < 4 else 7.0 for row in range(8)]

    parts = caught(ends_often(tiny_policy()), config, first_group_alone)
    report = step(with_samples(parts, samples))
    record = step_record(report)
    assert record["zero_variance_share"] == 0.5
    assert record["zero_variance_tokens"] == int(samples.rows.completion_len_N[4:].sum())
    assert record["adv_abs_mean"] == pytest.approx(float(report.advantage_BG.abs().mean()))
    assert record["adv_abs_mean"] > 0.1
    assert record["truncated_share"] == float(samples.truncated_N.float().mean())
    assert 0 <= record["sampler_gap_mean"] <= record["sampler_gap_max"] < 1e-4
    assert {"grad_norm", "ratio_first_min", "ratio_first_max"} <= set(record)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_completions_that_teach_nothing_are_not_counted(loss: Any) -> None:
    """A masked row has no token and ratio 1."""
    config = grpo_config(loss=loss, **BOTH)
    mask = [[True] * 4, [False] * 4]
    ratios = [[2.0], [1.0]] if loss == "gspo" else [[2.0] * 4, [1.0] * 4]
    found = counted(config, mask, ratios, [1.0, 1.0])
    assert found["clip_ratio_high"] == found["clip_ratio_high_max"] == 1
    assert found["ratio_min"] == found["ratio_max"] == 2
    low = counted(config, mask, [[0.5], [1.0]] if loss == "gspo" else [[0.5] * 4, [1.0] * 4], [-1.0, -1.0])
    assert low["clip_ratio_low"] == low["clip_ratio_low_min"] == 1


# --- the log line ---


def sampled(config: Any) -> Samples:
    torch.manual_seed(0)
    samples = sample_groups(ends_often(tiny_policy()), EXAMPLES, config)
    assert samples.truncated_N.any() and not samples.truncated_N.all()
    return samples


def test_lengths_are_logged_of_all_completions_and_of_those_that_ended_themselves() -> None:
    config = grpo_config(group_size=4)
    samples = sampled(config)
    record = measured(ends_often(tiny_policy()), config, samples)
    lengths, cut_off = samples.rows.completion_len_N.tolist(), samples.truncated_N.tolist()
    ended = [length for length, cut in zip(lengths, cut_off, strict=True) if not cut]
    assert (record["length_min"], record["length_max"]) == (min(lengths), max(lengths))
    assert (record["ended_length_min"], record["ended_length_max"]) == (min(ended), max(ended))
    assert record["ended_length_mean"] == pytest.approx(fmean(ended)) != pytest.approx(record["length_mean"])
    assert record["truncated_share"] == sum(cut_off) / 8 and record["tokens_generated"] == sum(lengths)
    none_ended = replace(samples, truncated_N=torch.ones(8, dtype=torch.bool))
    record = measured(ends_often(tiny_policy()), config, none_ended)
    assert [record[f"ended_length_{kind}"] for kind in ("mean", "min", "max")] == [0, 0, 0]


def test_each_reward_functions_standard_deviation_is_logged_beside_its_mean() -> None:
    config = grpo_config()
    values: list[float | None] = [1, 4, None, 2, 2, 5]
    functions = {"several": values, "one": [None] * 5 + [3.0], "none": [None] * 6}
    rewards = [Reward(name, lambda name=name, **_: functions[name]) for name in functions]  # type: ignore[misc]
    record = step_record(step(replace(caught(ends_often(tiny_policy()), config), rewards=rewards)))
    known = [1, 4, 2, 2, 5]
    assert record["rewards/several"] == fmean(known) and record["rewards_std/several"] == pytest.approx(stdev(known))
    assert record["rewards/one"] == 3 and record["rewards_std/one"] is None
    assert record["rewards/none"] is None and record["rewards_std/none"] is None


def test_a_step_without_dynamic_sampling_replaced_no_group() -> None:
    config = grpo_config(group_size=4)
    assert measured(ends_often(tiny_policy()), config, sampled(config))["replaced_groups"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_whose_rows_are_all_masked_teaches_nothing_and_can_be_logged(loss: Any, tmp_path: Path) -> None:
    config = grpo_config(loss=loss, group_size=4, mu=2, mask_truncated=True, micro_batch=3, beta=0.1, top_entropy=0.5)
    config = replace(config, entropy_coef=0.1, off_policy_threshold=0.1, kl_correction=True)
    samples = sampled(config)
    parts = caught(ends_often(tiny_policy()), config, lr=0.1)
    report = step(with_samples(parts, replace(samples, truncated_N=torch.ones(8, dtype=torch.bool))))
    gradients = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert len(gradients) == 2 and all((g == 0).all() for gradient in gradients for g in gradient.values())
    record = step_record(report)
    assert all(math.isfinite(value) for value in record.values())
    assert record["ratio_min"] == record["ratio_max"] == record["ratio_first_min"] == record["ratio_first_max"] == 1
    assert record["clip_ratio_low_min"] == record["clip_ratio_high_max"] == 0
    assert record["length_max"] == 8 and record["truncated_share"] == 1  # what was sampled is told all the same
    append_jsonl(tmp_path / "log.jsonl", [record])
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    logged = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert None not in logged.values()
