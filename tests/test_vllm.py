"""Completions by vLLM (grpo_core/vllm_sampler.py), of which there is a stand-in here: no real one has been tried."""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import math
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.samples import Sampling
from eval.sampling import sample
from grpo_core.job import prepare
from grpo_core.variants import sampler_correction
from grpo_core.vllm_sampler import VLLMSampler
from sft_core.model.policy import Policy
from sft_core.model.source import find_source
from tests.helpers import (
    EXAMPLES,
    caught,
    completions,
    ends_often,
    grpo_config,
    learner,
    message_of,
    relative_difference,
    step,
    tiny_policy,
)

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class SamplingParams:
    """As vLLM's: only fields that it has, too."""

    seed: int
    temperature: float
    max_tokens: int
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    logprobs: int
    ignore_eos: bool
    stop_token_ids: list[int]
    detokenize: bool


class LLM:
    """Draws with weights of its own what this project's sampler would draw with them; its log-probabilities are DRIFT
    off, in turn upwards and downwards."""

    like: Policy  # whose tokenizer and precision it has
    drift = 0.0

    def __init__(self, model: str, **options: Any) -> None:
        assert options["logprobs_mode"] == "processed_logprobs" and options["dtype"] == "float32"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "else the engine is in another process"
        own = AutoModelForCausalLM.from_pretrained(model).eval()
        self.policy = replace(self.like, model=own, layout="rows", kept={})
        self.handed_over = self.forgotten = 0
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    @torch.no_grad()
    def load_weights(self, named: Iterator[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.model.named_parameters())
        given = dict(named)
        assert given.keys() == own.keys()
        for name, tensor in given.items():
            own[name].copy_(tensor)
        self.handed_over += 1

    def reset_prefix_cache(self) -> None:
        self.forgotten += 1

    def generate(self, asked: list[dict[str, list[int]]], sampling_params: list[SamplingParams], use_tqdm: bool) -> Any:
        rules = sampling_params[0]
        assert len({each.seed for each in sampling_params}) == len(asked) == len(sampling_params)
        assert (rules.top_p, rules.top_k, rules.min_p, rules.repetition_penalty) == (1.0, -1, 0.0, 1.0)
        policy = replace(self.policy, eos_ids=tuple(rules.stop_token_ids))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prompts = [each["prompt_token_ids"] for each in asked]
            drawn = sample(policy, prompts, Sampling(rules.max_tokens, rules.temperature))
        for row, ids in enumerate(drawn.rows.completion_ids()):
            logps = drawn.logp_NT[row].tolist()
            numbers = [SimpleNamespace(logprob=logps[t] + self.drift * (-1) ** t) for t in range(len(ids))]
            ended = "stop" if ids[-1] in policy.eos_ids else "length"
            at = [{token: number} for token, number in zip(ids, numbers, strict=True)]
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=at, finish_reason=ended)])


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """One that vLLM's stand-in can be made of."""
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    policy = ends_often(tiny_policy())
    monkeypatch.setattr(LLM, "like", policy, raising=False)
    monkeypatch.setattr(LLM, "drift", 0.0)
    return policy


def test_a_run_with_vllms_numbers_is_a_run_with_the_default_sampler(policy: Policy) -> None:
    config = grpo_config(beta=0.1, mu=2)
    expected_policy = replace(policy, model=tiny_policy().model)
    expected = learner(expected_policy, config)
    with_vllm = replace(config, vllm=True)
    found = replace(learner(policy, with_vllm), sampler=VLLMSampler(policy, with_vllm))
    for _ in range(3):
        one, other = step(found), step(expected)
        assert completions(one.rollout.samples) == completions(other.rollout.samples)
        assert one.rollout.samples.texts == other.rollout.samples.texts
        torch.testing.assert_close(one.rollout.samples.logp_NT, other.rollout.samples.logp_NT, rtol=0, atol=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for own, theirs in zip(policy.model.parameters(), expected_policy.model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
    assert isinstance(found.sampler, VLLMSampler)
    assert found.sampler.llm.handed_over == found.sampler.llm.forgotten == 3


def test_what_vllm_notes_moves_the_gradient_by_the_importance_weight(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = grpo_config(vllm=True, sampler_cap=1.2, micro_batch=2)
    sampler = VLLMSampler(policy, config)
    surrogates, gradients = [], []
    for drift in (0.0, 0.3):
        monkeypatch.setattr(LLM, "drift", drift)
        parts = replace(caught(policy, config), sampler=sampler)
        surrogates.append(torch.cat([t.surrogate_NT[:, :3].flatten() for t in step(parts).updates[0]]))
        gradients.append(parts.optimizer.gradients[0])  # type: ignore[attr-defined]
    ratio = (surrogates[1] / surrogates[0])[surrogates[0].abs() > 1e-3]
    for wanted in (math.exp(-0.3), 1.2):
        assert (ratio - wanted).abs().min() < 1e-4
    assert (torch.minimum((ratio - math.exp(-0.3)).abs(), (ratio - 1.2).abs()) < 1e-4).all()
    assert relative_difference(*gradients) > 0.01


def test_a_drift_of_the_sampler_is_undone_in_expectation_up_to_the_cap() -> None:
    """All 25 completions of two tokens out of five, from a sampler q that is not the policy p."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    ids = torch.tensor(list(itertools.product(range(5), repeat=2)))
    value, chance = torch.randn(25, dtype=torch.float64), q[ids].sum(1).exp()
    expected = (p[ids].sum(1).exp() * value).sum()

    def of(mode: str, cap: float) -> Tensor:
        return sampler_correction(p[ids], q[ids], torch.ones(25, 2), mode, cap)

    assert not torch.isclose((chance * value).sum(), expected, rtol=0.05)
    for mode in MODES:
        torch.testing.assert_close((chance * of(mode, 1e9).prod(dim=1) * value).sum(), expected)
    cut = p[ids].sum(1) - q[ids].sum(1) > math.log(1.5)
    assert cut.any() and not cut.all()
    assert of("sequence_truncate", 1.5)[cut].unique().tolist() == [1.5]
    assert not of("sequence_mask", 1.5)[cut].any() and of("sequence_mask", 1.5)[~cut].all()


@pytest.mark.trl
@pytest.mark.parametrize("mode", MODES)
def test_the_importance_weight_is_trls(mode: str) -> None:
    """TRL computes it in the middle of a long method: those lines are run by themselves."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    lines = inspect.getsource(trainer._generate_and_score_completions).splitlines()
    begin = next(i for i, line in enumerate(lines) if "per_token_logps_diff = (old_per_token_logps" in line)
    end = next(i for i, line in enumerate(lines) if "# Compute the per-token log probabilities for the ref" in line)
    torch.manual_seed(0)
    old_NT, sampler_NT = -2 * torch.rand(2, 6, 9)
    mask_NT = torch.arange(9) < torch.tensor([[9], [1], [4], [7], [2], [9]])
    sampler_NT[0, 3] = torch.nan
    sampler_NT[5] = old_NT[5] - 0.5
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 2.0}
    given: dict[str, Any] = {"old_per_token_logps": old_NT, "sampling_per_token_logps": sampler_NT, "mask": mask_NT}
    given["self"] = SimpleNamespace(**settings, vllm_importance_sampling_clip_min=None)
    exec(textwrap.dedent("\n".join(lines[begin:end])), {"torch": torch, "math": math}, given)
    found = sampler_correction(old_NT, sampler_NT, mask_NT, mode, 2.0)
    torch.testing.assert_close(found, given["vllm_importance_sampling_ratio"], rtol=0, atol=0)
    assert (found >= 2).any() or mode.endswith("mask")


def test_the_flag_makes_the_learners_sampler(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    flags = {
        "model": str(tmp_path),
        "vllm": True,
        "task": "arithmetic",
        "max_steps": 1,
        "eval_problems": 0,
        "max_prompt_tokens": 99,
    }
    job = prepare(grpo_config(**flags))
    parts = job.learner(find_source(job.config), lambda count: EXAMPLES[:count], 64)
    assert isinstance(parts.sampler, VLLMSampler)
    assert len(parts.sampler(parts.policy, EXAMPLES, job.config).texts) == len(EXAMPLES) * job.config.group_size


def test_without_vllm_one_line_says_what_to_install() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    assert message_of(["--vllm"]) == "--vllm True: expected the vllm package: pip install '.[vllm]'"


@pytest.mark.parametrize("flags", [["--top_k", "5"], ["--top_p", "0.9"], ["--min_p", "0.1"], ["--loss", "vespo"]])
def test_what_the_weight_would_take_for_a_drift_is_refused(flags: list[str], policy: Policy) -> None:
    assert message_of(["--vllm", *flags]).startswith(f"{flags[0]} {flags[1]}: expected ")
