"""Every part of a step on the simulated device: the numbers are the CPU's, and nothing is left on the wrong side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.samples import Sampling
from eval.sampling import sample
from grpo_core.config import LOSSES
from grpo_core.dynamic import replacing_equal_groups
from grpo_core.metrics import step_record
from grpo_core.step import StepReport
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Tokens
from sft_core.model.policy import Policy
from tests.helpers import (
    EXAMPLES,
    adapted,
    checkpoint_activations,
    completions,
    ends_often,
    grpo_config,
    learner,
    random_rows,
    step,
    tiny_policy,
    weights,
)
from tests.simulated import NEEDS_THE_HOOKS, moved, on_the_device

pytestmark = NEEDS_THE_HOOKS
# Attention is another kernel there; float32, sums of up to 400 numbers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pairs(*, kind: str = "qwen2", half: torch.dtype | None = None, **changes: Any) -> tuple[Policy, Policy]:
    """The same policy here and there."""

    def policy() -> Policy:
        made = tiny_policy("gpt2" if kind == "gpt2" else "qwen2", precision=NAMES[half])
        return replace(ends_often(adapted(made) if kind == "lora" else made), **changes)

    return policy(), moved(policy(), half)


NAMES: dict[torch.dtype | None, Any] = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def numbers(report: StepReport) -> dict[str, float]:
    """What a step logs, without its times."""
    return {name: value for name, value in step_record(report).items() if not name.endswith("_s")}


def stepped(policy: Policy, steps: int = 1, **options: Any) -> tuple[Policy, list[dict[str, float]]]:
    """The log of some steps."""
    parts = learner(policy, grpo_config(**options))
    if options.get("dynamic_sampling"):
        parts = replace(parts, roll_out=replacing_equal_groups(lambda count: (EXAMPLES * count)[:count]))
    return policy, [numbers(step(parts, seed)) for seed in range(steps)]


def agree(here: tuple[Policy, list[dict[str, float]]], there: tuple[Policy, list[dict[str, float]]]) -> None:
    for ours, its in zip(here[1], there[1], strict=True):
        assert its == pytest.approx(ours, rel=1e-3, abs=1e-5)
    for name, weight in weights(there[0]).items():
        torch.testing.assert_close(weight.cpu(), weights(here[0])[name], rtol=1e-3, atol=2e-5)


CUT = Sampling(6, 0.7, top_k=50, top_p=0.9, min_p=0.001)


@pytest.mark.parametrize(
    ("kind", "at_once", "sampling"),
    [("qwen2", 2, Sampling(6)), ("gpt2", None, CUT), ("lora", 2, Sampling(6, 0))],
    ids=["in turn", "with cuts", "greedy, with an adapter"],
)
@on_the_device
def test_completions_are_the_cpus(kind: str, at_once: int | None, sampling: Sampling) -> None:
    prompts = [[5, 6, 7]] * 3 + [[8]] * 2
    found = []
    for policy in pairs(kind=kind):
        torch.manual_seed(1)
        found.append(sample(policy, prompts, sampling, at_once))
    assert completions(found[0]) == completions(found[1])
    torch.testing.assert_close(found[1].logp_NT.cpu(), found[0].logp_NT, **CLOSE)


@pytest.mark.parametrize("changes", [{"prefill": False}, {"rows_leave": False}, {"pads": False}, {"cached": False}])
@on_the_device
def test_slower_ways_to_sample_give_the_same(changes: dict[str, bool]) -> None:
    found = []
    for policy in pairs(**changes):
        torch.manual_seed(1)
        found.append(completions(sample(policy, [[5, 6, 7]] * 2 + [[8]] * 2, Sampling(6))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("layout", "chunk", "entropy"), [("sequence", 1000, "gradient"), ("groups", 0, "value"), ("rows", 1000, "none")]
)
@on_the_device
def test_log_probabilities_and_gradients_are_the_cpus(layout: Any, chunk: int, entropy: Any) -> None:
    found = []
    for policy in pairs(layout=layout, logit_chunk=chunk):
        checkpoint_activations(policy)
        policy.model.train()
        rows = random_rows(policy, (4, 4, 2), (5, 1, 8)).to(policy.device)
        logp_NT, entropy_NT = token_logprobs(policy, rows, 0.7, entropy)
        (logp_NT.sum() + entropy_NT.sum() if entropy == "gradient" else logp_NT.sum()).backward()
        found.append([logp_NT, entropy_NT, *(p.grad for _, p in policy.trainable())])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@on_the_device
def test_each_loss_teaches_what_it_teaches_on_the_cpu(loss: str) -> None:
    here, there = (stepped(policy, loss=loss, beta=0.1, mu=2, micro_batch=4) for policy in pairs())
    agree(here, there)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "mu": 2, "kl_correction": True, "ref_sync_every": 1, "entropy_coef": 0.1},
        {"mu": 2, "off_policy_threshold": 1e-3, "delta": 4.0, "scale_rewards": "batch"},
        {"mask_truncated": True, "top_entropy": 0.3, "reward_aggregation": "normalize_then_sum"},
        {"dynamic_sampling": 2, "shuffle_rewards": False, "scale_rewards": "none"},
        {"shuffle_rewards": True, "temperature": 0.7, "max_grad_norm": 0.0, "weight_decay": 0.1},
    ],
    ids=lambda options: ", ".join(options),
)
@on_the_device
def test_options_act_as_on_the_cpu(options: dict[str, Any]) -> None:
    here, there = (stepped(policy, **options) for policy in pairs())
    agree(here, there)


@on_the_device
def test_micro_batches_of_tokens_act_as_on_the_cpu() -> None:
    found = []
    for policy in pairs():
        parts = learner(policy, grpo_config(beta=0.1))
        parts.optimizer.micro_batch = Tokens(40)
        found.append((policy, [numbers(step(parts))]))
    agree(*found)


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.1, "ref_sync_every": 1, "ref_sync_mix": 1.0}])
@on_the_device
def test_an_adapter_learns_against_its_reference_as_on_the_cpu(options: dict[str, Any]) -> None:
    here, there = (stepped(policy, **options) for policy in pairs(kind="lora"))
    agree(here, there)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@on_the_device
def test_half_precision_steps_with_half_copies(half: torch.dtype) -> None:
    _, policy = pairs(half=half)
    before = weights(policy)
    _, logs = stepped(policy, beta=0.1)
    # 8 and 11 bits: sampler and learner sum in other orders.
    assert 0 < logs[0]["sampler_gap_max"] < {torch.bfloat16: 0.4, torch.float16: 0.05}[half]
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(policy).items())


@on_the_device
def test_an_overflow_moves_nothing_and_the_batch_is_repeated_with_half_the_factor() -> None:
    _, policy = pairs(half=torch.float16)
    parts = learner(policy, grpo_config(beta=0.1))
    step(parts)
    parts.optimizer.scaler.update(2.0**30)
    before = parts.optimizer.passes
    report = step(parts)
    repeats = parts.optimizer.passes - before - 1
    assert repeats > 1 and parts.optimizer.scaler.get_scale() == 2.0 ** (30 - repeats)
    assert parts.optimizer.schedule.last_epoch == 2 and 0 < report.grad_norm < float("inf")


@on_the_device
def test_a_row_that_is_not_finite_is_found() -> None:
    _, policy = pairs()
    rewards = [1e300, 0.0, 0.0, 1.0, 0.0, 0.5]  # float32 has no such advantage
    parts = learner(policy, grpo_config(scale_rewards="none"), lambda **columns: rewards)
    step(parts)
    assert parts.optimizer.skipped == 1 and parts.optimizer.skipped_rows == [0, 1, 2]


@pytest.mark.parametrize("where", ["cpu", "folder"])
@on_the_device
def test_moments_kept_elsewhere_move_the_weights_alike(where: str, tmp_path: Path) -> None:
    import sft_core.learn.offload

    whole, sft_core.learn.offload.PIECE = sft_core.learn.offload.PIECE, 64
    try:
        place = {"offload_optimizer": where if where == "cpu" else str(tmp_path)}
        agree(*(stepped(policy, steps=3, **place) for policy in pairs()))
    finally:
        sft_core.learn.offload.PIECE = whole


@on_the_device
def test_memory_that_runs_out_halves_the_micro_batch() -> None:
    _, policy = pairs()
    parts = learner(policy, grpo_config(micro_batch=4))
    backward: Callable[..., Any] = parts.optimizer.backward
    failing = iter([True])

    def once(loss: torch.Tensor) -> None:
        if next(failing, False):
            raise torch.OutOfMemoryError("planted")
        backward(loss)

    parts.optimizer.backward = once  # type: ignore[method-assign]
    step(parts)
    assert parts.optimizer.micro_batch == 2
