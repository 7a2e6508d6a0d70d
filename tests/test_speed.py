"""What the benchmarks of speed claim: both sides do the same work, ratios and levels are computed from what was
measured, phases add up, and fp16 on a CPU is fp16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks import compare_trl, phases, step_time
from benchmarks.fp16_on_cpu import FP16Products
from benchmarks.speed.alternation import Pairs, Step
from benchmarks.speed.report import learning, report, seconds_until
from benchmarks.workload import Steps, names, with_start, workload
from sft_core.model.tiny import build_tiny
from sft_core.run.provenance import shown_flags


def step(seconds: float, reward: float = 0.0, peak: float = 1e9) -> Step:
    return {"seconds": seconds, "generation_seconds": seconds / 2, "tokens": 10, "reward": reward, "peak_bytes": peak}


def small(tmp_path: Path, *flags: str) -> list[str]:
    """Flags that make a workload of the untrained built-in model."""
    folder = str(build_tiny(tmp_path / "model", seed=0))
    sizes = ["--prompts_per_step=2", "--group_size=2", "--max_completion_tokens=4", "--micro_batch=4"]
    return ["--model", folder, *sizes, "--eval_problems=0", *flags]


def test_ratios_are_theirs_over_ours_pair_by_pair_without_the_warm_up() -> None:
    pairs = Pairs([step(9.0), step(1.0), step(2.0)], [step(1.0), step(3.0), step(5.0, peak=4e9)], warm_up=1)
    assert pairs.ratios() == [3.0, 2.5]
    assert pairs.memory_ratio() == 0.25
    text = report("tiny", ["--model", "/somewhere/of/mine"], pairs)
    assert "median **2.75**, from 2.50 to 3.00" in text and "**0.25** of TRL's" in text
    assert "/somewhere" not in text and "--speed tiny --model mine" in text


def test_a_level_is_reached_when_the_mean_of_five_steps_is_there() -> None:
    steps = [step(2.0, reward) for reward in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert seconds_until(0.2, steps) == 10.0 and seconds_until(0.4, steps) == 12.0
    assert seconds_until(0.9, steps) is None
    slow = [step(6.0, reward) for reward in (0, 0, 0, 0, 1, 1, 1, 1)]
    reached = {row["level"]: (row["ours"], row["theirs"]) for row in learning(Pairs(steps, slow, 0))}
    assert reached[0.4] == (12.0, 36.0)
    assert "| 0.4 | 12.0 s | 36.0 s | 3.00 |" in report("tiny", [], Pairs(steps, slow, 0))


def test_absolute_paths_are_not_shown_whole() -> None:
    assert shown_flags(["--model", "/a/b/c", "--lr", "1e-4", "runs/x"]) == "--model c --lr 1e-4 runs/x"


@pytest.mark.parametrize("name", names())
def test_every_workload_is_a_config_that_flags_override(name: str) -> None:
    assert workload(name, ["--lr=0.5"]).lr == 0.5


def test_random_weights_are_made_once_for_both_sides(tmp_path: Path) -> None:
    flags = small(tmp_path, "--from_scratch", "--config_overrides", "intermediate_size=64")
    config = with_start(workload("tiny", flags), tmp_path / "start")
    assert not config.from_scratch and config.model == str(tmp_path / "start")
    policies = [Steps.of(config).learner.policy.model for _ in range(2)]
    assert policies[0].config.intermediate_size == 64
    pairs = zip(policies[0].parameters(), policies[1].parameters(), strict=True)
    assert all(torch.equal(ours, again) for ours, again in pairs)


PEAKS = """
import torch
from benchmarks.memory import peak_bytes, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)
before = peak_bytes(cpu)
large = torch.ones(2**25)  # 128 MB
with_it = peak_bytes(cpu)
del large
reset_peak(cpu)
print(before, with_it, peak_bytes(cpu))
"""


@pytest.mark.slow
def test_a_peak_is_that_of_the_time_since_its_reset() -> None:
    # In a process of its own: this one may keep memory that other tests freed.
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=60)
    before, with_it, after = map(int, done.stdout.split())
    assert 120e6 < with_it - before < 200e6
    assert after < with_it - 100e6


@pytest.mark.slow
def test_phases_add_up_to_the_step_and_prefill_is_not_counted_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps.of(workload("tiny", small(tmp_path, "--beta=0.1")))
    clock, reports, whole = phases.measured(steps, 3, warm_up=1)
    assert len(clock.seconds) == len(reports) == len(whole) == 3
    shares = []
    for seconds, total in zip(clock.seconds, whole, strict=True):
        assert set(seconds) == set(phases.PHASES) and min(seconds.values()) > 0
        shares.append(sum(seconds.values()) / total)
    assert 0.5 < max(shares) <= 1  # a busy machine may hold up a step between its phases, but not each
    step_time.main(["tiny", "--steps=1", "--warm_up=0", "--output", str(tmp_path / "t.md"), *small(tmp_path)])
    printed = capsys.readouterr().out
    assert "| learner |" in printed and "| reference |" not in printed  # beta 0
    assert (tmp_path / "t.md").read_text() in printed + "\n" and str(tmp_path) not in printed


@pytest.mark.slow
def test_steps_by_length_are_a_table_and_a_picture(tmp_path: Path) -> None:
    report = tmp_path / "by-length.md"
    flags = ["--steps=1", "--warm_up=0", "--lengths=4,12", "--output", str(report), *small(tmp_path, "--beta=0.1")]
    step_time.main(["tiny", *flags])
    lines = [line.split(" | ") for line in report.read_text().splitlines() if line.startswith("| ")]
    titles = ["sampler", "learner", "reference", "learner, rows apart", "rows apart / one sequence |"]
    assert lines[0] == ["| longest completion", "mean length", *titles]
    assert [line[0] for line in lines[2:]] == ["| 4", "| 12"]
    seconds = [[float(cell.split(" s")[0]) for cell in line[2:6]] for line in lines[2:]]
    assert all(number > 0 for number in seconds[0]) and (tmp_path / "by-length.png").stat().st_size > 5000
    ratio, learner, apart = float(lines[2][6].rstrip(" |")), seconds[0][1], seconds[0][3]
    assert ratio == pytest.approx(apart / learner, rel=0.05)  # seconds have three digits


@pytest.mark.parametrize("lengths", ["0", "64,", "long"])
def test_lengths_that_are_no_numbers_of_tokens_end_in_one_line(
    lengths: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        step_time.main(["tiny", "--lengths", lengths])
    assert ended.value.code == 2 and "expected numbers of tokens" in capsys.readouterr().err


def test_a_wrong_flag_of_a_benchmark_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        step_time.main(["tiny", "--group_sise=4"])
    assert ended.value.code == 2 and "did you mean --group_size" in capsys.readouterr().err


@pytest.mark.trl
@pytest.mark.slow
def test_both_sides_run_the_same_problems_and_lengths_in_alternation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "speed.md"
    flags = ["--speed=tiny", "--steps=1", "--warm_up=0", "--output", str(output), *small(tmp_path, "--beta=0.1")]
    assert compare_trl.main(flags) == 0
    raw = json.loads(output.with_suffix(".json").read_text())
    for side in (raw["ours"], raw["theirs"]):
        assert len(side) == 1
        for taken in side:  # an untrained model hardly ever ends by itself
            assert 0 < taken["generation_seconds"] < taken["seconds"] and 12 <= taken["tokens"] <= 16
            assert taken["peak_bytes"] > 100e6
    assert "median **" in output.read_text() and output.read_text().strip() in capsys.readouterr().out


def products(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A linear layer and an attention under fp16 autocast, and their gradients."""
    with torch.autocast("cpu", dtype=torch.float16):
        linear = functional.linear(x, weight, bias)
        heads = linear[None, None]
        attended = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    loss = scale * attended.float().pow(2).sum()
    return [linear, attended], list(torch.autograd.grad(loss, (x, weight, bias)))


def test_fp16_on_a_cpu_has_fp16s_roundings_and_its_range() -> None:
    torch.manual_seed(0)
    given: Any = [torch.randn(shape, requires_grad=True) for shape in ((4, 6), (5, 6), (5,))]
    real, real_gradients = products(*given, scale=1.0)
    with FP16Products():
        ours, gradients = products(*given, scale=1.0)
        _, overflown = products(*given, scale=1e7)
    assert all(torch.equal(a, b) and b.dtype == torch.float16 for a, b in zip(real, ours, strict=True))
    for a, b in zip(real_gradients, gradients, strict=True):
        assert (a - b).norm() < 5e-3 * a.norm()
        assert not torch.equal(b, torch.autograd.grad(functional.linear(*given).pow(2).sum(), given)[0])
    assert not all(gradient.isfinite().all() for gradient in overflown)  # as fp16 would, and float32 would not


def test_outside_of_autocast_nothing_is_rounded() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with FP16Products():
        assert torch.equal(functional.linear(x, weight), x @ weight.T)
