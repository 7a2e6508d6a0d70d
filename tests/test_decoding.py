"""Each way to decode draws the same tokens by the same numbers, and notes the same log-probabilities."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from eval.decoding import compiled, paged
from eval.samples import Completion, Samples, Sampling
from eval.sampling import sample
from eval.trust import trusted_sampler
from sft_core.model import decoding
from sft_core.model.policy import Policy
from tests.helpers import FAMILIES, PEFT_IS_BEHIND, Family, adapted, completions, ends_often, tiny_policy

OF_NEW_TOKENS = (
    "requests_with_new_token" in inspect.signature(ContinuousBatchingLogitsProcessor.prepare_tensor_args).parameters
)
PAGED = pytest.param(
    "paged", marks=pytest.mark.skipif(not OF_NEW_TOKENS, reason="needs a later release of transformers")
)
ways = pytest.mark.parametrize("way", ["compiled", PAGED])

A, B, C, D = [9, 40, 77], [51], [8, 30, 31, 32, 33, 90, 91], [60, 61]
PROMPTS = [prompt for prompt in (A, B, C, D) for _ in range(3)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that were made. Passes are traced here, but no kernels are built for them: that takes ten times as long."""
    torch._dynamo.reset()
    made = list[Any]()

    def noting(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "COMPILE", {"mode": "default", "dynamic": False, "backend": noting})
    return made


def drawn(
    policy: Policy,
    way: Any,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    at_once: int | None = None,
    told: list[tuple[int, Completion]] | None = None,
) -> Samples:
    torch.manual_seed(0)
    tell = None if told is None else lambda *ended: told.extend(zip(*ended, strict=True))
    return sample(replace(policy, decoding=way), prompts, sampling, at_once, ended=tell)


def assert_same(found: Samples, expected: Samples) -> None:
    assert completions(found) == completions(expected) and found.texts == expected.texts
    assert torch.equal(found.truncated_N, expected.truncated_N)
    torch.testing.assert_close(found.logp_NT, expected.logp_NT, rtol=0, atol=1e-5)


CUT = Sampling(9, 0.9, top_k=20, top_p=0.9, min_p=0.02)


@ways
@pytest.mark.parametrize(
    ("family", "sampling"),
    [("qwen2", Sampling(9, 0.0)), ("gpt2", Sampling(9, 0.0)), ("gpt2", Sampling(9, 0.7)), ("qwen2", CUT)],
)
def test_every_way_draws_the_same_tokens_and_notes_the_same_log_probabilities(
    family: Family, way: str, sampling: Sampling, graphs: list[Any]
) -> None:
    policy = ends_often(tiny_policy(family))
    expected = drawn(policy, "segments", sampling)
    assert len(set(expected.rows.completion_len_N.tolist())) > (2 if sampling.temperature else 1)
    assert_same(drawn(policy, way, sampling), expected)
    assert len(graphs) == (way == "compiled")


@ways
def test_a_completion_is_the_same_however_many_are_drawn_at_a_time(way: str) -> None:
    policy, told = ends_often(tiny_policy()), list[tuple[int, Completion]]()
    expected = drawn(policy, "segments", Sampling(9))
    found = drawn(policy, way, Sampling(9), at_once=5, told=told)
    assert_same(found, expected)
    lengths, truncated = found.rows.completion_len_N.tolist(), found.truncated_N.tolist()
    assert [each for _, each in sorted(told)] == [*map(Completion, found.texts, lengths, truncated)]


@ways
@pytest.mark.parametrize("changes", [{"prefill": False, "rows_leave": False}, {"pads": False}])
def test_what_a_model_cannot_do_it_need_not_do_here(way: str, changes: dict[str, bool]) -> None:
    policy = replace(ends_often(tiny_policy()), **changes)
    assert_same(drawn(policy, way, Sampling(6)), drawn(policy, "segments", Sampling(6)))


@ways
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_it_is_the_half_precision_of_the_sampler(family: Family, way: str) -> None:
    """Rotary positions make keys float32 beside values in bf16; without them both are bf16."""
    policy = ends_often(tiny_policy(family, precision="bf16"))
    found, expected = drawn(policy, way, Sampling(6, 0.8)), drawn(policy, "segments", Sampling(6, 0.8))
    same = [a == b for a, b in zip(completions(found), completions(expected), strict=True)]
    assert sum(same) > len(same) / 2
    off_N = (found.logp_NT - expected.logp_NT).abs().amax(dim=1)[torch.tensor(same)]
    exact = drawn(replace(policy, precision=replace(policy.precision, autocast_dtype=None)), way, Sampling(6, 0.8))
    assert float(off_N.max()) < 0.1 and not torch.equal(exact.logp_NT, found.logp_NT)


# --- compiled


def test_the_steps_after_the_first_compile_nothing(graphs: list[Any]) -> None:
    """Prompts of other lengths, another number of rows, and rows that end at other times."""
    policy = ends_often(tiny_policy())
    drawn(policy, "compiled", Sampling(9), PROMPTS[:7])
    assert len(graphs) == 1
    cache = compiled.Kept.by(policy).cache
    for prompts in (PROMPTS[3:11], [C] * 5, [B] * 8):
        drawn(policy, "compiled", Sampling(9), prompts)
    assert len(graphs) == 1 and compiled.Kept.by(policy).cache is cache
    drawn(policy, "compiled", Sampling(9), PROMPTS)
    assert len(graphs) == 2


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_next_step_is_drawn_by_the_weights_that_the_optimizer_has_left(precision: Any) -> None:
    policy = ends_often(tiny_policy(precision=precision))
    before = drawn(policy, "compiled", Sampling(6))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    after, expected = drawn(policy, "compiled", Sampling(6)), drawn(policy, "segments", Sampling(6))
    assert completions(after) != completions(before)
    assert completions(after)[:3] == completions(expected)[:3]
    first_N = (after.logp_NT - expected.logp_NT)[:, 0].abs()
    assert float(first_N.max()) < (1e-5 if precision == "float32" else 0.02)


def test_a_copy_of_a_model_with_a_compiled_pass_computes_its_own() -> None:
    """Copying takes the attribute along that holds the pass: that of the weights which were copied."""
    policy = ends_often(tiny_policy(precision="bf16"))
    drawn(replace(policy, precision=replace(policy.precision, autocast_dtype=None)), "compiled", Sampling(3))
    drawn(policy, "compiled", Sampling(3))
    copy = compiled.Kept.by(policy).copy
    assert copy is not policy.model and copy._compiled_call is not policy.model._compiled_call


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_the_copy_is_made_anew_when_the_model_gets_another_adapter() -> None:
    """As the reference of a LoRA policy is: an adapter beside the trained one."""
    policy = ends_often(adapted(tiny_policy(precision="bf16")))
    before = drawn(policy, "compiled", Sampling(6))
    policy.model.add_adapter("reference", policy.model.peft_config["default"])
    policy.model.set_adapter("default")
    assert completions(drawn(policy, "compiled", Sampling(6))) == completions(before)


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_trial_keeps_a_right_way_and_leaves_nothing_behind(precision: str) -> None:
    policy = replace(adapted(tiny_policy(precision=precision)), decoding="compiled")
    found = trusted_sampler(policy)
    assert found.decoding == "compiled" and found.kept == policy.kept == {}
    assert not any("_compiled_call" in vars(module) for module in policy.model.modules())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_draw_the_same_tokens(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    policy = ends_often(tiny_policy(family))
    assert_same(drawn(policy, "compiled", Sampling(9)), drawn(policy, "segments", Sampling(9)))


# --- paged


@pytest.mark.skipif(not OF_NEW_TOKENS, reason="needs a later release of transformers")
def test_a_prompt_that_is_read_in_parts_draws_nothing_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "AT_A_TIME", 4)
    policy = ends_often(tiny_policy())
    assert_same(drawn(policy, "paged", Sampling(9), at_once=3), drawn(policy, "segments", Sampling(9)))


@pytest.mark.skipif(not OF_NEW_TOKENS, reason="needs a later release of transformers")
def test_attention_is_as_it_was_when_pages_are_done_with() -> None:
    policy = tiny_policy()
    attention = policy.model.config._attn_implementation
    drawn(policy, "paged", Sampling(2), [A])
    assert policy.model.config._attn_implementation == attention and "forward" not in vars(policy.model)


# --- which is taken


@ways
def test_a_way_that_works_is_kept_without_a_word(way: Any, capsys: pytest.CaptureFixture[str]) -> None:
    policy = replace(tiny_policy(), decoding=way)
    assert trusted_sampler(policy).decoding == way and capsys.readouterr().err == ""


@ways
def test_a_model_with_a_window_is_decoded_in_segments(way: Any, capsys: pytest.CaptureFixture[str]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    policy = replace(tiny_policy(**window), decoding=way, prefill=False, rows_leave=False, rows_join=False)
    assert trusted_sampler(policy).decoding == "segments"
    said = capsys.readouterr().err
    assert said.startswith(f"sampler without {way} decoding: ") and said.count("\n") == 1


def test_a_compiled_pass_that_fails_or_is_wrong_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = replace(tiny_policy(), decoding="compiled")
    monkeypatch.setattr(compiled, "COMPILE", {"backend": "no such backend"})
    assert trusted_sampler(policy).decoding == "segments"
    assert capsys.readouterr().err.startswith("sampler without compiled decoding: ")
    monkeypatch.setattr(compiled, "COMPILE", {"mode": "default", "backend": "eager"})
    update = compiled.FixedLayer.update
    monkeypatch.setattr(compiled.FixedLayer, "update", lambda layer, k, v, *more, **named: update(layer, k * 0.9, v))
    assert trusted_sampler(policy).decoding == "segments"
    said = capsys.readouterr().err
    assert said.startswith("sampler without compiled decoding: ") and said.count("\n") == 1


@pytest.mark.skipif(not OF_NEW_TOKENS, reason="needs a later release of transformers")
def test_continuous_batching_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no pages")

    monkeypatch.setattr(paged.PagedDraw, "__call__", broken)
    assert trusted_sampler(replace(tiny_policy(), decoding="paged")).decoding == "segments"
    said = capsys.readouterr().err
    assert "no pages" in said and said.count("\n") == 1


@pytest.mark.skipif(not OF_NEW_TOKENS, reason="needs a later release of transformers")
def test_a_way_that_draws_other_tokens_by_the_same_numbers_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = paged.PagedDraw.__call__

    def by_others(draw: Any, *given: Any) -> Any:
        kept, draw.uniform = draw.uniform, 1 - draw.uniform  # noted right, drawn by nobody's numbers
        marked = call(draw, *given)
        draw.uniform = kept
        return marked

    monkeypatch.setattr(paged.PagedDraw, "__call__", by_others)
    assert trusted_sampler(replace(tiny_policy(), decoding="paged")).decoding == "segments"
    assert capsys.readouterr().err.startswith("sampler without paged decoding: ")


def test_on_a_gpu_that_can_a_pass_is_compiled_and_elsewhere_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cuda = tiny_policy().model, torch.device("cuda")
    able = SimpleNamespace(capability=(7, 5), triton=True, compiler="/usr/bin/gcc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: able.capability)
    monkeypatch.setattr(decoding, "find_spec", lambda _: able.triton or None)
    monkeypatch.setattr(shutil, "which", lambda _: able.compiler)
    monkeypatch.delenv("CC", raising=False)
    assert decoding.decoding_for("auto", model, cuda) == "compiled"
    assert decoding.decoding_for("auto", model, torch.device("cpu")) == "segments"
    assert decoding.decoding_for("paged", model, torch.device("cpu")) == "paged"
    for name, lacking in (("capability", (6, 1)), ("triton", False), ("compiler", None)):
        was = getattr(able, name)
        setattr(able, name, lacking)
        assert decoding.decoding_for("auto", model, cuda) == "segments"
        setattr(able, name, was)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert decoding.decoding_for("auto", model, cuda) == "segments"
