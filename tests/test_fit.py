"""`--micro_batch auto` (sft_core/learn/fit.py): the fastest choice whose forecast fits, and a word about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sft_core.learn.fit
from benchmarks.auto import base_in, limit_for, some_shape, under
from benchmarks.plan.sizes import known_shape
from benchmarks.workload import workload
from grpo_core.forecast.memory import fitted, plan
from sft_core import job as sft_job
from sft_core.cli import parse_config
from sft_core.config import size_of
from sft_core.learn.fit import SHARE, SMALLEST, WORTH_IT, Fit, fit, memory_for
from sft_core.learn.footprint import Plan
from sft_core.learn.optim import Optimizer
from sft_core.learn.recovery import halved
from sft_core.learn.rows import LARGEST, Tokens, pack_rows
from sft_core.model.shapes import shapes_of
from sft_core.model.tiny import build_tiny
from tests.helpers import ends_often, grpo_config, learner, random_rows, relative_difference, step, tiny_policy
from tests.test_plan import small, source_of

# Half a billion weights, and 16 prompts of 4 completions, rows of up to 500 tokens.
AUTO = small(micro_batch=0, max_prompt_tokens=100, max_completion_tokens=400, prompts_per_step=16)
QWEN = shapes_of(AUTO, known_shape("Qwen/Qwen2.5-0.5B"))


def chosen(limit: float, kind: str = "cpu", **values: Any) -> Fit[Any]:
    def plan_of(config: Any, size: int | Tokens) -> Plan:
        return plan(config, QWEN, True, kind, None, size)

    return fit(replace(AUTO, **values), kind, limit, plan_of)


def test_a_micro_batch_in_rows_is_taken_as_it_is() -> None:
    found = chosen(0, micro_batch=3)
    assert found.micro_batch == 3 and found.config.micro_batch == 3 and not found.config.gradient_checkpointing


def test_plenty_of_memory_changes_nothing_but_the_size() -> None:
    found = chosen(1e12)
    assert found.micro_batch == LARGEST and found.config == AUTO
    assert found.line.endswith("; with 1000.0 GB: micro-batches of up to 16,384 tokens")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_less_memory_means_fewer_tokens_then_checkpointing_then_moments_in_main_memory(kind: str) -> None:
    most, least = chosen(1e12, kind).plan, chosen(0, kind).plan
    assert most and least and least.peak < most.peak / 2
    limits = [(most.peak + (least.peak - most.peak) * share / 20) / SHARE * 1.0001 for share in range(21)]
    found = [chosen(limit, kind) for limit in limits]
    ways = [(bool(each.config.offload_optimizer), each.config.gradient_checkpointing) for each in found]
    assert ways == sorted(ways)  # a slower way only where the faster ones do not fit
    assert set(ways) == {(False, False), (False, True)} | ({(True, False), (True, True)} if kind == "cuda" else set())
    for each, limit in zip(found, limits, strict=True):
        assert each.plan and each.plan.peak <= SHARE * limit
        assert isinstance(each.micro_batch, Tokens)
        assert each.micro_batch.count >= (SMALLEST if each.config.gradient_checkpointing else WORTH_IT)
    assert len({each.micro_batch for each in found}) > 3


def test_of_several_ranks_each_has_all_weights_where_they_fit_and_else_a_part() -> None:
    def chosen_by(ranks: int, limit: float, **values: Any) -> Fit[Any]:
        def plan_of(config: Any, size: int | Tokens) -> Plan:
            return plan(config, QWEN, True, "cpu", None, size, ranks)

        return fit(replace(AUTO, **values), "cpu", limit, plan_of, ranks)

    assert chosen_by(2, 1e12).config.parallel == "auto"
    assert chosen_by(2, 1e12).line.endswith(
        ", on each of 2 ranks; with 1000.0 GB: micro-batches of up to 16,384 tokens"
    )
    for size, limit in ((0, 8e9), (4, 16e9)):
        found = chosen_by(4, limit, micro_batch=size)
        assert found.config.parallel == "fsdp" and "--parallel fsdp" in found.line
        assert found.plan and found.plan.peak <= SHARE * limit
        assert chosen_by(4, limit, parallel="ddp", micro_batch=size).config.parallel == "ddp"
        assert chosen_by(1, limit, micro_batch=size).config.parallel == "auto"


def test_a_gpu_without_room_for_what_a_compiled_pass_keeps_decodes_in_segments() -> None:
    roomy = chosen(1e12, "cuda", micro_batch=4, decoding="auto")
    assert roomy.plan and roomy.config.decoding == "auto" and "half-precision twin" in roomy.plan.items
    limit = 0.99 * roomy.plan.peak / SHARE
    tight = chosen(limit, "cuda", micro_batch=4, decoding="auto")
    assert tight.plan and tight.config.decoding == "segments" and tight.line.endswith(", --decoding segments")
    assert tight.plan.peak < 0.95 * roomy.plan.peak
    assert chosen(limit, "cuda", micro_batch=4, decoding="compiled").config.decoding == "compiled"
    assert chosen(limit, "cpu", micro_batch=4, decoding="auto").config.decoding == "auto"


def test_where_nothing_fits_the_one_that_needs_least_is_tried_and_said() -> None:
    found = chosen(0)  # fewer tokens than a row has save nothing
    assert found.micro_batch == Tokens(512) and found.config.gradient_checkpointing
    told = "with 0.0 GB, which may not be enough: micro-batches of up to 512 tokens, --gradient_checkpointing True"
    assert found.line.endswith(told)


def test_nothing_is_given_up_for_a_peak_that_is_not_the_learners() -> None:
    found = chosen(0, "a device of which nothing is kept when freed", eval_problems=10_000, eval_batch_size=10_000)
    assert found.plan and found.plan.worst == "evaluation"
    assert found.micro_batch == LARGEST and not found.config.gradient_checkpointing


def test_the_limit_is_what_was_given_or_what_this_process_has_and_could_get() -> None:
    cpu = torch.device("cpu")
    assert memory_for(replace(AUTO, memory="15GiB"), cpu) == 15 * 2**30
    free = memory_for(AUTO, cpu)
    assert 1e8 < free < 1e14


def test_a_container_with_a_limit_has_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_core.learn.fit, "_left_to_group", lambda: 5e7)
    monkeypatch.setattr(sft_core.learn.fit, "_own", lambda: 1e7)
    assert memory_for(AUTO, torch.device("cpu")) == 6e7


def test_a_model_that_cannot_be_forecast_gets_the_largest_and_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_core.learn.fit, "shapes_of", lambda *_: {}["a recurrent model"])
    found = fitted(AUTO, None)
    assert found.micro_batch == LARGEST and found.plan is None
    assert found.line == "memory: no forecast for this model (KeyError: 'a recurrent model')"


@pytest.mark.parametrize(
    ("text", "size"), [("15GiB", 15 * 2**30), ("800MB", 8e8), ("1.5 GB", 1.5e9), ("64 KiB", 2**16)]
)
def test_sizes_are_read_as_they_are_written(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["15", "GiB", "15 gigs", "-1GB", "15GiB/s", "0GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--memory"):
        parse_config(sft_job.SFTConfig, ["--model", "tiny", "--memory", text])


def test_auto_is_a_word_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("micro_batch: auto\nmemory: 2GB\ntask: arithmetic\nmax_steps: 5\n")
    for flags in (
        ["--micro_batch", "auto", "--task", "arithmetic", "--max_steps", "5"],
        ["--config", str(tmp_path / "own.yaml")],
    ):
        assert parse_config(sft_job.SFTConfig, ["--model", "tiny", *flags]).micro_batch == 0
    with pytest.raises(ValueError, match="--micro_batch: 'some': expected auto, or a number of rows"):
        parse_config(sft_job.SFTConfig, ["--model", "tiny", "--micro_batch", "some"])
    with pytest.raises(ValueError, match="only together with --micro_batch auto"):
        parse_config(sft_job.SFTConfig, ["--model", "tiny", "--micro_batch", "4", "--memory", "2GB"])


def test_sft_is_forecast_too(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path, seed=0)
    config = sft_job.SFTConfig(model=str(folder), max_steps=1, task="arithmetic", micro_batch=0)
    _, source = source_of(folder)
    little, much = (
        sft_core.learn.fit.fitted(replace(config, memory=memory), source, sft_job.plan) for memory in ("1MB", "900GB")
    )
    assert little.config.gradient_checkpointing and little.micro_batch == Tokens(1024)  # fewer than in its longest row
    assert much.config == replace(config, memory="900GB") and much.micro_batch == LARGEST


# ------------------------------------------------------------------------------------------------- what does not change


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("count", [20, 50, 1000])
def test_the_gradient_does_not_depend_on_the_tokens_of_a_micro_batch(count: int, share: bool) -> None:
    found = []
    for size in (64, Tokens(count, padded=not share)):
        policy = replace(ends_often(tiny_policy(dtype=torch.float64)), layout="sequence" if share else "rows")
        parts = learner(policy, grpo_config(mu=2, beta=0.1, lr=1e-2, top_entropy=0.5))
        parts.optimizer.micro_batch = size
        torch.manual_seed(0)
        report = step(parts)
        found.append({name: p.detach().clone() for name, p in policy.trainable()})
    assert (len(report.updates[0]) > 1) == (count < 1000)
    assert relative_difference(*found) < 1e-12


def test_rows_that_lie_apart_are_counted_with_their_padding() -> None:
    config = grpo_config(micro_batch=0)
    sizes = [Optimizer(replace(tiny_policy(), layout=layout), config, 1).micro_batch for layout in ("rows", "sequence")]  # type: ignore[arg-type]
    assert sizes == [replace(LARGEST, padded=True), LARGEST]


def test_what_a_run_began_with_is_what_it_goes_on_with_where_memory_has_become_more() -> None:
    policy, config = tiny_policy(), grpo_config(micro_batch=0)
    before = Optimizer(policy, config, 1, Tokens(300))
    for now, expected in ((Tokens(800), 300), (Tokens(200), 200)):
        optimizer = Optimizer(policy, config, 1, now)
        optimizer.load(before.numbers(), before.tensors())
        assert optimizer.micro_batch == Tokens(expected)
    in_rows = Optimizer(policy, replace(config, micro_batch=5), 1)
    in_rows.load(before.numbers(), {})
    assert in_rows.micro_batch == 5


def test_half_of_a_micro_batch_is_half_of_the_largest_that_there_is() -> None:
    rows = random_rows(tiny_policy(), (4, 4, 4, 4), (10, 10, 10, 10))
    assert halved(Tokens(1000), rows) == Tokens(28)  # of 56
    assert halved(Tokens(28), rows) == Tokens(14) and halved(Tokens(14), rows) is None


def test_rows_without_a_completion_are_cut_too() -> None:
    rows = pack_rows([[1, 2], [1, 2], [3]], [[], [4], []], pad_id=0)
    assert [(at.start, at.stop) for at, _ in rows.micro_batches(Tokens(3))] == [(0, 2), (2, 3)]


# --------------------------------------------------------------------------------------------------- in a real process


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("number", range(4))
def test_a_process_that_can_get_no_more_than_its_memory_trains(number: int, tmp_path: Path) -> None:
    import random

    base = base_in(tmp_path / "base")
    flags = some_shape(number, base)
    found = under(limit_for(workload("tiny", flags), random.Random(number)), flags)
    assert "failed" not in found, found
    assert not found["halved"] and min(found["counts"]) >= 1
