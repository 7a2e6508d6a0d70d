"""Whole runs of `python -m grpo_core.train`, small: what they write, what they repeat, what they start from."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval.__main__
import grpo_core.job
import grpo_core.train
import grpo_core.warmstart
import sft_core.train
from grpo_core.config import GRPOConfig
from grpo_core.reference import Reference
from rewards import numeric_reward_func
from sft_core.cli import parse_config
from sft_core.job import SFTJob
from sft_core.learn.optim import Optimizer
from sft_core.model.tiny import build_tiny
from sft_core.text.arithmetic import ArithmeticStream
from tests.helpers import PEFT_IS_BEHIND, SHARED

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

REAL_QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"
REAL_GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"

B, G, STEPS = 2, 4, 6  # prompts in a step, completions of each, steps
PROMPTS = ["--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
QUIET = ["--device", "cpu", "--no_progress"]
SMALL = ["--prompts_per_step", str(B), "--group_size", str(G), "--micro_batch", "3", "--max_completion_tokens", "12"]
# length_reward pays by the length of the text: a hardly trained model earns it, unlike the answer's own reward.
REWARDS = ["--rewards", "tests.helpers:length_reward", "numeric_reward_func", "tests.test_runs:row_reward"]
REWARDS += ["--reward_weights", "2", "1", "0.5"]


def row_reward(prompts: list[str], completions: list[str], answer: list[str], **columns: list[Any]) -> list[float]:
    """Says which row it was called for."""
    assert prompts == columns["question"]
    return [len(question) + int(gold) / 100 for question, gold in zip(prompts, answer, strict=True)]


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    path: Path
    out: str

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} in {name} is not JSON")

        lines = (self.path / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    @property
    def train(self) -> list[dict[str, Any]]:
        return [line for line in self.jsonl("log.jsonl") if line["kind"] == "train"]

    @property
    def eval(self) -> list[dict[str, Any]]:
        return [line for line in self.jsonl("log.jsonl") if line["kind"] == "eval"]

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self.jsonl("completions.jsonl")


def grpo(folder: Path, *flags: str) -> Run:
    """`python -m grpo_core.train`, small."""
    out = io.StringIO()
    argv = [*PROMPTS, *SMALL, *REWARDS, *QUIET, "--precision", "float32", "--lr", "1e-3", "--eval_batch_size", "4"]
    with contextlib.redirect_stdout(out):
        grpo_core.train.main([*argv, "--output_dir", str(folder), *flags])
    return Run(folder, out.getvalue())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: hardly trained, just enough to end some completions before the budget does."""
    folder = tmp_path_factory.mktemp("base")
    untrained = ["--model", str(build_tiny(folder / "untrained", seed=0)), "--task", "arithmetic"]
    return sft(folder / "sft", *untrained, "--max_steps", "12", "--lr", "2e-3", "--worked_share", "0.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 word problems, of which a run asks 4 and trains on 12."""
    stream = ArithmeticStream("train", seed=0, difficulty=2)
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(stream[i]) + "\n" for i in range(16)))
    return path


@pytest.fixture(scope="module")
def start(base: Path, data: Path) -> list[str]:
    """Where the runs of this file start, and on what."""
    return ["--model", str(base), "--task", str(data), "--eval_problems", "4"]


@pytest.fixture(scope="module")
def recorded(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with everything switched on."""
    every = ["--max_steps", str(STEPS), "--beta", "0.1", "--eval_every", "2", "--save_every", "2", "--show_every", "2"]
    every += ["--keep_last", "0", "--eval_samples", "3"]
    return grpo(tmp_path_factory.mktemp("recorded") / "run", *start, *every)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


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
    assert about["versions"]["torch"] == torch.__version__ and about["seed"] == 42
    assert {"command", "commit", "hardware", "started"} <= set(about)
    assert {"python", "transformers", "datasets", "safetensors"} <= set(about["versions"])
    config = yaml.safe_load((recorded.path / "config.yaml").read_text())
    assert "output_dir" not in config  # or repeating the run would collide with it
    assert (config["beta"], config["group_size"], config["reward_weights"]) == (0.1, G, [2.0, 1.0, 0.5])


def test_the_final_model_and_the_checkpoints_open_with_plain_transformers(recorded: Run, base: Path) -> None:
    folders = [base, *(recorded.path / "checkpoints" / f"step-00000{i}" for i in (2, 4, 6)), recorded.path / "final"]
    assert len(list((recorded.path / "checkpoints").iterdir())) == 3
    opened = [weights(folder) for folder in folders]
    assert not any(same(opened[i], opened[i + 1]) for i in range(3))  # each is further than the one before
    tok = AutoTokenizer.from_pretrained(recorded.path / "final")
    assert tok.chat_template == AutoTokenizer.from_pretrained(base).chat_template


# --- repeating


def test_the_resolved_config_repeats_the_run_completion_for_completion_and_bit_for_bit(
    recorded: Run, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    grpo_core.train.main(["--config", str(recorded.path / "config.yaml"), "--output_dir", str(out)])
    again = Run(out, "")
    assert (out / "config.yaml").read_text() == (recorded.path / "config.yaml").read_text()
    assert again.completions == recorded.completions
    assert same(weights(out / "final"), weights(recorded.path / "final"))
    measured = {"timestamp_iso", *(name for name in recorded.train[0] if name.endswith("_s"))}
    for line, first in zip(again.train, recorded.train, strict=True):
        assert {k: v for k, v in line.items() if k not in measured} == {
            k: v for k, v in first.items() if k not in measured
        }


def test_another_seed_is_another_run(recorded: Run, start: list[str], tmp_path: Path) -> None:
    other = grpo(tmp_path / "run", *start, "--max_steps", "1", "--seed", "7")
    first = [row for row in recorded.completions if row["step"] == 1]
    assert [row["question"] for row in other.completions] != [row["question"] for row in first]
    assert [row["response"] for row in other.completions] != [row["response"] for row in first]
    assert other.train[0]["seed"] == 7


def test_evaluating_in_between_with_samples_or_without_does_not_change_what_is_learned(
    recorded: Run, start: list[str], tmp_path: Path
) -> None:
    plain = grpo(tmp_path / "run", *start, "--max_steps", str(STEPS), "--beta", "0.1", "--log_every", "4")
    assert plain.completions == recorded.completions
    assert same(weights(plain.path / "final"), weights(recorded.path / "final"))
    assert [line["step"] for line in plain.train] == [4, STEPS]  # every fourth one, and the last
    assert [line["step"] for line in plain.eval] == [0, STEPS]
    assert not (plain.path / "checkpoints").exists()


# --- settings


def test_epochs_give_the_steps_where_max_steps_does_not(start: list[str], tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--max_samples", "5", "--no_tensorboard"]
    run = grpo(tmp_path / "run", *start[:4], "--eval_problems", "0", *flags)
    assert [line["step"] for line in run.train] == [1, 2, 3]  # 5 problems, 2 a step
    asked = [row["question"] for row in run.completions[::G]]
    assert len(set(asked[:5])) == 5
    assert run.eval == [] and not (run.path / "summary.json").exists() and not (run.path / "tensorboard").exists()


def test_beta_0_holds_no_reference(start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Reference] = []

    class Counted(Reference):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(grpo_core.job, "Reference", Counted)
    without = grpo(tmp_path / "without", *start, "--max_steps", "2", "--beta", "0")
    assert made == [] and [line["kl"] for line in without.train] == [0, 0]
    grpo(tmp_path / "with", *start, "--max_steps", "1", "--beta", "0.1")
    assert len(made) == 1


def test_the_kl_is_0_at_step_1_and_grows_when_the_weights_move(recorded: Run) -> None:
    assert recorded.train[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert recorded.train[-1]["kl"] > 1e-6


def test_fp16_runs_under_a_grad_scaler_over_float32_weights(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers: list[Optimizer] = []

    class Kept(Optimizer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            optimizers.append(self)

    monkeypatch.setattr(grpo_core.job, "Optimizer", Kept)
    run = grpo(tmp_path / "run", *start, "--eval_problems", "0", "--max_steps", "2", "--precision", "fp16")
    [optimizer] = optimizers
    assert optimizer.scaler.is_enabled()
    assert all(p.dtype == torch.float32 for p in optimizer.parameters)
    assert all(0 < line["grad_norm"] < 1e4 and line["skipped_steps"] == 0 for line in run.train)
    # Sampler and learner compute the same distribution in the same half precision: they differ by its rounding alone.
    assert all(line["sampler_gap_max"] < 0.05 for line in run.train)
    assert AutoModelForCausalLM.from_pretrained(run.path / "final").dtype == torch.float32


def test_five_gradients_in_a_row_that_are_not_finite_end_the_run_and_all_are_in_the_log(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(None)
        return torch.tensor(1.0 if len(calls) == 3 else float("nan"))  # a good one begins the count in a row anew

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    monkeypatch.setattr(Optimizer, "_rows_at_fault", lambda *_: [])  # tests/test_lost_numbers.py
    with pytest.raises(SystemExit) as caught:
        grpo(tmp_path / "run", *start, "--eval_problems", "0", "--max_steps", "20")
    assert caught.value.code == 1
    lines = Run(tmp_path / "run", "").train
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2, 3, 4, 5, 6, 7]
    assert [line["grad_norm"] for line in lines] == [None, None, 1.0] + [None] * 5
    saved = tmp_path / "run" / "checkpoints" / "step-000008"
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == f"saved: {saved}; go on with --resume {tmp_path / 'run'}"
    assert said[-1].startswith("error: 5 steps in a row had a loss or gradient that is not finite")


# --- starting points


def sft(folder: Path, *flags: str) -> Path:
    """`python -m sft_core.train`, small; its final/ folder."""
    argv = [*PROMPTS, *QUIET, "--no_tensorboard", "--precision", "float32", "--max_completion_tokens", "48"]
    sft_core.train.main([*argv, "--batch_size", "4", "--eval_problems", "2", "--output_dir", str(folder), *flags])
    return folder / "final"


def test_grpo_goes_on_from_an_sft_adapter_which_is_its_reference(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(base), "--task", str(data)]
    adapter = sft(tmp_path / "sft", *flags, "--lora", "--lora_r", "4", "--lr", "0.05", "--max_steps", "3")
    more = ["--task", str(data), "--eval_problems", "0", "--max_steps", "3", "--beta", "0.1", "--lr", "0.01"]
    run = grpo(tmp_path / "grpo", "--model", str(adapter), *more)
    kl = [line["kl"] for line in run.train]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] > 1e-6
    named = grpo(tmp_path / "named", "--model", str(base), "--adapter_path", str(adapter), *more)
    assert named.completions == run.completions

    def logits(*adapters: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base)
        for folder in adapters:
            model = peft.PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            return model.eval()(torch.arange(3, 40)[None]).logits

    final = run.path / "final"
    assert not torch.allclose(logits(adapter), logits(), atol=1e-3)  # SFT moved the adapter
    assert not torch.allclose(logits(final), logits(adapter), atol=1e-3)  # and GRPO moved it further
    assert not [path for path in final.iterdir() if path.is_dir()]  # the frozen reference is not saved beside it
    AutoTokenizer.from_pretrained(final)


def test_a_new_lora_starts_as_the_base_model_and_trains_nothing_else(
    base: Path, start: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    run = grpo(tmp_path / "run", *start, "--max_steps", "2", "--lora", "--lora_r", "4", "--beta", "0.1")
    assert run.train[0]["kl"] == pytest.approx(0, abs=1e-9) and run.train[1]["grad_norm"] > 0
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path / "final")
    stored = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in stored.items()}
    assert same(plain, original)
    assert any("lora_B" in name and float(p.detach().abs().max()) > 0 for name, p in model.named_parameters())


@pytest.fixture
def short_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """In an empty folder, with the built-in SFT cut to 2 steps; the runs of it that were made."""
    presets = tmp_path / "presets"
    presets.mkdir()
    values = yaml.safe_load((sft_core.train.PRESETS / "tiny.yaml").read_text())
    (presets / "tiny.yaml").write_text(yaml.safe_dump({**values, "max_steps": 2, "tensorboard": False}))
    monkeypatch.setattr(grpo_core.warmstart, "PRESETS", presets)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    made: list[Path] = []
    begin = sft_core.train.begin

    def noting(job: SFTJob) -> sft_core.train.SFTRun | None:
        made.append(Path(job.config.output_dir))
        return begin(job)

    monkeypatch.setattr(grpo_core.warmstart, "begin", noting)
    yield made


def the_embedded_job(*flags: str) -> str:
    """`python -m grpo_core.train`, smaller; what it printed. The run folder is its own choice, under runs/."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        small = ["--max_steps", "1", "--eval_problems", "4", "--eval_batch_size", "4", "--no_tensorboard"]
        grpo_core.train.main([*SMALL, *QUIET, *small, *flags])
    return out.getvalue()


def test_the_warm_start_is_made_once_and_found_again(short_warm_start: list[Path]) -> None:
    assert "supervised fine-tuning" in the_embedded_job()
    [made] = short_warm_start
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert len(folders) == 2 and folders[0].startswith("grpo-") and folders[1].startswith("tiny-sft-")
    trained = weights(Path("runs") / folders[1] / "final")

    assert f"an earlier run: {Path('runs') / folders[1]}" in the_embedded_job()
    assert short_warm_start == [made]
    assert len(list(Path("runs").glob("grpo-*"))) == 2  # even within a second: no run overwrites another
    assert same(weights(Path("runs") / folders[1] / "final"), trained)

    the_embedded_job("--seed", "7")
    assert len(short_warm_start) == 2 and len(list(Path("runs").glob("tiny-sft-*"))) == 2


def test_a_warm_start_that_was_stopped_half_way_is_gone_on_with(short_warm_start: list[Path]) -> None:
    the_embedded_job()
    [folder] = Path("runs").glob("tiny-sft-*")
    log, weights = (folder / "log.jsonl").read_text(), (folder / "final" / "model.safetensors").read_bytes()
    half = folder.rename(folder.with_name(folder.name + ".unfinished"))
    (half / "final").rename(half / "final.unfinished")
    the_embedded_job()
    assert len(short_warm_start) == 2 and not half.exists()
    assert (folder / "final" / "model.safetensors").read_bytes() == weights
    assert (folder / "log.jsonl").read_text() != log  # there was no checkpoint, so it has learned again


def test_the_embedded_job_is_what_no_arguments_mean() -> None:
    config = parse_config(GRPOConfig, [], grpo_core.train.PRESETS, "tiny")
    job = grpo_core.job.prepare(config)
    assert job.source is None and job.task.size is None
    assert [reward.name for reward in job.rewards] == ["numeric_reward_func"]


# --- real data


@pytest.mark.skipif(
    not (REAL_QWEN.is_dir() and REAL_GSM8K.is_file()), reason=f"no Qwen2.5 and GSM8K in {SHARED} (GRPO_SHARED)"
)
def test_sft_grpo_and_evaluation_run_on_gsm8k_in_qwens_own_vocabulary(tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(REAL_GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    task = ["--task", str(data), "--eval_problems", "2", "--prompt_format", "xml", "--max_prompt_tokens", "200"]
    task += ["--precision", "float32", *QUIET]
    # initializer_range: logits far enough from uniform that settings which change them would show
    shape = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "initializer_range=0.2"]
    shape += ["num_attention_heads=2", "num_key_value_heads=1"]
    scratch = ["--model", str(REAL_QWEN), "--from_scratch", "--config_overrides", *shape]
    budget = ["--batch_size", "2", "--micro_batch", "2", "--max_completion_tokens", "64", "--max_steps", "1"]
    sft_core.train.main([*task, *scratch, *budget, "--output_dir", str(tmp_path / "sft")])
    shipped = json.loads((REAL_QWEN / "generation_config.json").read_text())
    kept = json.loads((tmp_path / "sft" / "final" / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == shipped["repetition_penalty"] != 1  # there for whoever uses the model after us

    sizes = ["--prompts_per_step", "2", "--group_size", "2", "--max_completion_tokens", "10", "--max_steps", "1"]
    rewards = ["--rewards", "correctness_reward_func", "xmlcount_reward_func", "tests.helpers:length_reward"]
    model = ["--model", str(tmp_path / "sft" / "final")]
    grpo_core.train.main([*task, *model, *sizes, *rewards, "--output_dir", str(tmp_path / "grpo")])
    run = Run(tmp_path / "grpo", "")
    assert len(run.train) == 1 and len(run.completions) == 4 and len(run.eval) == 2
    assert run.train[0]["sampler_gap_max"] < 3e-5  # and not used by us: rounding alone

    final = run.path / "final"
    opened = AutoModelForCausalLM.from_pretrained(final)
    assert (opened.config.vocab_size, opened.config.hidden_size) == (151936, 32)
    assert len(AutoTokenizer.from_pretrained(final)) == len(AutoTokenizer.from_pretrained(REAL_QWEN))
    budget = ["--max_completion_tokens", "10", "--output_dir", str(tmp_path / "eval")]
    eval.__main__.main([*task, "--model", str(final), *budget])
    assert len(Run(tmp_path / "eval", "").jsonl("answers.jsonl")) == 2
