"""Whole runs of `python -m grpo_core.train`, small: what they write, what they repeat, what they start from."""

from __future__ import annotations

import itertools
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from rewards import numeric_reward_func
from tests.helpers import PEFT_IS_BEHIND
from tests.runs import (
    STEPS,
    B,
    G,
    Run,
    same,
    weights,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

# --- the run folder


def test_a_run_is_one_folder_of_known_files(recorded: Run) -> None:
    assert sorted(path.name for path in recorded.path.iterdir()) == [
        "checkpoints",
        "completions.jsonl",
        "config.yaml",
        "final",
        "heldout",
        "log.jsonl",
        "provenance.json",
        "summary.json",
        "tensorboard",
        "tokens.jsonl",
    ]


def test_the_log_has_every_field_of_g5_grpo_for_every_step(recorded: Run) -> None:
    fields = {
        *("timestamp_iso", "step", "epoch", "device", "seed", "grpo_loss", "policy_loss", "kl_loss"),
        *("reward_mean", "reward_std", "adv_mean", "adv_std", "grad_norm", "learning_rate", "tokens_generated"),
        *("time_per_step_s", "generation_time_s", "backward_time_s", "other_time_s"),
    }
    assert [line["step"] for line in recorded.train] == list(range(1, STEPS + 1))
    for line in recorded.train:
        assert fields <= set(line)
        assert all(line[name] is not None for name in fields)
        assert (line["device"], line["seed"]) == ("cpu", 42)
        assert line["epoch"] == pytest.approx(line["step"] * B / 12)
        assert line["grpo_loss"] == pytest.approx(line["policy_loss"] + 0.1 * line["kl_loss"], abs=1e-6)
        assert datetime.fromisoformat(line["timestamp_iso"]).tzinfo is not None
    # Measured, not filled in: no two steps are alike.
    for name in ("time_per_step_s", "generation_time_s", "backward_time_s", "grad_norm", "tokens_generated"):
        assert len({line[name] for line in recorded.train}) > 1


def test_the_timings_are_measured_and_add_up_to_the_step(recorded: Run) -> None:
    for line in recorded.train:
        parts = [line[f"{name}_time_s"] for name in ("generation", "reward", "reference", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(line["time_per_step_s"], rel=1e-6)
        assert line["other_time_s"] == pytest.approx(line["reward_time_s"] + line["reference_time_s"], rel=1e-6)


def test_tensorboard_shows_the_same_numbers_as_the_log(recorded: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recorded.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in recorded.jsonl("log.jsonl"):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                expected.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected) and "train/reward_mean" in expected
    for tag, points in expected.items():
        shown = events.Scalars(tag)
        assert [event.step for event in shown] == [step for step, _ in points]
        assert [event.value for event in shown] == pytest.approx([value for _, value in points], rel=1e-6)


def test_every_completion_is_on_file_with_its_group_and_what_it_earned(recorded: Run, data: Path) -> None:
    golds = {row["question"]: row["answer"] for row in map(json.loads, data.read_text().splitlines())}
    rows = recorded.completions
    assert [(row["step"], row["group"]) for row in rows] == [
        (step, group) for step in range(1, STEPS + 1) for group in range(B) for _ in range(G)
    ]
    for first in range(0, len(rows), G):
        group = rows[first : first + G]
        assert len({row["question"] for row in group}) == 1
        assert {f"#### {row['expected']}" for row in group} == {golds[group[0]["question"]].splitlines()[-1]}
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-5)
    for row in rows:
        parts = row["rewards"]
        assert parts["length_reward"] == len(row["response"]) % 7 / 4
        [right] = numeric_reward_func(prompts=["?"], completions=[row["response"]], answer=[row["expected"]])
        assert parts["numeric_reward_func"] == right
        assert parts["row_reward"] == len(row["question"]) + int(row["expected"]) / 100
        assert row["reward"] == pytest.approx(2 * parts["length_reward"] + right + 0.5 * parts["row_reward"])
        assert 1 <= row["tokens"] <= 12 and (not row["truncated"] or row["tokens"] == 12)
    assert 0 < sum(row["truncated"] for row in rows) < len(rows)


def test_the_logs_means_are_the_means_over_the_completions_on_file(recorded: Run) -> None:
    for line in recorded.train:
        rows = [row for row in recorded.completions if row["step"] == line["step"]]
        rewards = torch.tensor([row["reward"] for row in rows])
        assert line["reward_mean"] == pytest.approx(rewards.mean().item(), rel=1e-5)
        assert line["reward_std"] == pytest.approx(rewards.std().item(), rel=1e-5)
        advantages = torch.tensor([row["advantage"] for row in rows])
        assert line["adv_mean"] == pytest.approx(advantages.mean().item(), abs=1e-6)
        assert line["adv_std"] == pytest.approx(advantages.std().item(), rel=1e-5)
        assert line["tokens_generated"] == sum(row["tokens"] for row in rows)
        assert line["length_max"] == max(row["tokens"] for row in rows)
        assert line["truncated_share"] == pytest.approx(sum(row["truncated"] for row in rows) / len(rows))
        earned = [row["rewards"]["length_reward"] for row in rows]
        assert line["rewards/length_reward"] == pytest.approx(sum(earned) / len(rows))


def test_held_out_problems_are_asked_before_after_and_every_so_many_steps(recorded: Run) -> None:
    assert [line["step"] for line in recorded.eval] == [0, 2, 4, STEPS]
    assert all(line["problems"] == 4 for line in recorded.eval)
    for line in recorded.eval:
        rows = recorded.jsonl(f"heldout/step-{line['step']:06d}.jsonl")
        assert line["samples"] == 3 and all(len(row["samples"]) == 3 for row in rows)
        right = [sample["strict"] for row in rows for sample in row["samples"]]
        assert line["pass_at_1"] == line["maj_at_1"] == pytest.approx(sum(right) / 12)
        assert line["lenient_accuracy_low"] <= line["lenient_accuracy"] <= line["lenient_accuracy_high"]
        assert sum(line.get(f"steps/{steps}/problems", 0) for steps in (1, 2)) == 4


def test_the_memory_that_a_run_will_take_is_said_once_before_its_first_evaluation(recorded: Run) -> None:
    lines = [line for line in recorded.out.splitlines() if line.startswith("memory: about 0.")]
    assert len(lines) == 1
    assert recorded.out.index(lines[0]) < recorded.out.index("step    0: held-out accuracy")


def test_the_summary_is_the_first_and_the_last_evaluation(recorded: Run) -> None:
    summary = json.loads((recorded.path / "summary.json").read_text())
    for name, line in (("before", recorded.eval[0]), ("after", recorded.eval[-1])):
        assert {**line, **summary[name]} == line and summary[name]["problems"] == 4
    won, lost = (
        sum(old["strict"] < new["strict"] for old, new in zip(*pair, strict=True))
        for pair in itertools.permutations([recorded.jsonl(f"heldout/step-00000{step}.jsonl") for step in (0, STEPS)])
    )
    paired = summary["paired"]
    assert (paired["problems"], paired["won"], paired["lost"]) == (4, won, lost)
    assert paired["difference"] == summary["after"]["accuracy"] - summary["before"]["accuracy"]
    assert "before" in recorded.out and f"{won} won, {lost} lost, McNemar's exact p = " in recorded.out
    assert recorded.out.count("Before:") == recorded.out.count("After:") == 3  # three sample problems
    assert str(recorded.path) in recorded.out and str(recorded.path / "final") in recorded.out


def test_a_sample_is_shown_every_so_many_steps(recorded: Run) -> None:
    shown = recorded.out.split("--- step ")[1:]
    assert [text.partition(",")[0] for text in shown] == ["2", "4", "6"]
    first = next(row for row in recorded.completions if row["step"] == 2)
    for name, key in (("Question:", "question"), ("Expected:", "expected")):
        assert any(line.startswith(name) and line.endswith(first[key]) for line in shown[0].splitlines())
    assert "Response:" in shown[0] and "Extracted:" in shown[0]


def test_provenance_says_what_a_reader_needs_to_repeat_the_run(recorded: Run) -> None:
    about = json.loads((recorded.path / "provenance.json").read_text())
    assert torch.__version__.startswith(about["versions"]["torch"]) and about["seed"] == 42
    assert {"command", "commit", "hardware", "started"} <= set(about)
    assert {"python", "transformers", "datasets", "safetensors"} <= set(about["versions"])
    config = yaml.safe_load((recorded.path / "config.yaml").read_text())
    assert "output_dir" not in config  # or repeating the run would collide with it
    assert (config["beta"], config["group_size"], config["reward_weights"]) == (0.1, G, [2.0, 1.0, 0.5])


def test_provenance_holds_what_the_checks_at_loading_found(recorded: Run) -> None:
    checks = json.loads((recorded.path / "provenance.json").read_text())["checks"]
    assert [(check["part"], check["without"]) for check in checks] == [("sampler", ""), ("learner", "")]
    assert all(0 <= check["nats_off"] <= check["bound"] < 0.1 for check in checks)


def test_the_final_model_and_the_checkpoints_open_with_plain_transformers(recorded: Run, base: Path) -> None:
    folders = [base, *(recorded.path / "checkpoints" / f"step-00000{i}" for i in (2, 4, 6)), recorded.path / "final"]
    assert len(list((recorded.path / "checkpoints").iterdir())) == 3
    opened = [weights(folder) for folder in folders]
    assert not any(same(opened[i], opened[i + 1]) for i in range(3))  # each is further than the one before
    tok = AutoTokenizer.from_pretrained(recorded.path / "final")
    assert tok.chat_template == AutoTokenizer.from_pretrained(base).chat_template
