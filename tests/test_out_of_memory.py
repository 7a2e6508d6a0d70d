"""What `Optimizer.accumulate` claims: where memory runs out, fewer rows at a time, and the same gradient."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import grpo_core.step
import sft_core.train
from grpo_core.metrics import Tally, step_record
from sft_core.config import OptimConfig
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from sft_core.train import sft_step
from tests.helpers import ends_often, grpo_config, learner, random_rows, relative_difference, step, tiny_policy, weights

Where = Literal["forward", "backward"]
places = pytest.mark.parametrize("where", ["forward", "backward"])
ERRORS: dict[str, Callable[[], RuntimeError]] = {
    "CUDA's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU's": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9437184000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}
errors = pytest.mark.parametrize("error", ERRORS)


class Memory:
    """Memory for micro-batches of `fits` rows. For more it runs out: at the end of the forward pass, or within the
    backward pass, when some weights have their gradient and some have not."""

    def __init__(
        self, patch: pytest.MonkeyPatch, policy: Policy, fits: int, where: Where = "backward", error: str = "CUDA's"
    ) -> None:
        self.policy, self.fits, self.where, self.error = policy, fits, where, ERRORS[error]
        self.tried: list[int] = []  # the size of each micro-batch
        self.partial = 0  # gradients that were there when memory ran out
        first_layer = next(p for name, p in policy.trainable() if "layers.0." in name or ".h.0." in name)
        first_layer.register_hook(self._in_backward)
        for module in (grpo_core.step, sft_core.train):
            patch.setattr(module, "token_logprobs", self._watched(module.token_logprobs))

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def token_logprobs(policy: Policy, rows: Rows, *args: Any, **kwargs: Any) -> Any:
            self.tried.append(len(rows))
            scores = real(policy, rows, *args, **kwargs)
            if len(rows) > self.fits and self.where == "forward":
                raise self.error()
            return scores

        return token_logprobs

    def _in_backward(self, gradient: Tensor) -> None:
        if self.tried[-1] > self.fits and self.where == "backward":
            self.partial = sum(p.grad is not None for _, p in self.policy.trainable())
            raise self.error()


def stepped_gradients(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """The gradient of every weight in each of the optimizer's steps."""
    seen: list[dict[str, Tensor]] = []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.append({str(i): p.grad.clone() for i, p in enumerate(optimizer.parameters)})
    )
    return seen


def grpo_outcome(patch: pytest.MonkeyPatch, fits: int, where: Where, error: str, **fields: Any) -> Any:
    """Gradients, log line and memory of a step of six rows, two updates, with a KL."""
    policy = ends_often(tiny_policy(dtype=torch.float64))
    config = grpo_config(mu=2, beta=0.1, lr=1e-2, micro_batch=64, loss="grpo", **fields)
    parts = learner(policy, config)
    seen, memory = stepped_gradients(parts.optimizer), Memory(patch, policy, fits, where, error)
    report = step(parts)
    record = {name: value for name, value in step_record(report).items() if not name.endswith("_s")}
    assert Tally.of(report).updates == 2
    assert float(Tally.of(report).sums["tokens"]) == 2 * int(report.rollout.samples.rows.mask_NT.sum())
    return seen, record, memory, parts.optimizer


@places
@errors
def test_a_grpo_step_that_runs_out_of_memory_has_the_same_gradients_and_metrics(
    where: Where, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        expected, line, plenty, undisturbed = grpo_outcome(patch, 64, where, error)
    assert capsys.readouterr().out == "" and plenty.tried == [6, 6] and undisturbed.micro_batch == 64
    with monkeypatch.context() as patch:
        found, disturbed_line, memory, optimizer = grpo_outcome(patch, 2, where, error)
    assert memory.tried == [6, 3, 2, 2, 2, 2, 2, 2] and optimizer.micro_batch == 2  # for the second update too
    assert bool(memory.partial) == (where == "backward")
    assert len(found) == len(expected) == 2
    for new, old in zip(found, expected, strict=True):
        assert relative_difference(old, new) < 1e-9
    assert disturbed_line == pytest.approx(line, rel=1e-6, abs=1e-6, nan_ok=True)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"out of memory: from here on {n} rows at a time; the gradient is the same" for n in (3, 2)]


@places
def test_memory_may_run_out_in_a_later_micro_batch(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the earlier ones have added to the gradient counts once."""
    rows, found = random_rows(tiny_policy(), (4, 7, 2, 5), (5, 1, 8, 3)), []
    for late in (False, True):
        policy = tiny_policy(dtype=torch.float64)
        optimizer = Optimizer(policy, OptimConfig(lr=1e-2, micro_batch=2), 10)
        with monkeypatch.context() as patch:
            memory = Memory(patch, policy, 2, where)
            found.append(stepped_gradients(optimizer))

            def shrinks(at: slice, micro: Rows, memory: Memory = memory, late: bool = late) -> None:
                memory.fits = 1 if late and at.start == 2 else 2

            learn_and_shrink(policy, optimizer, rows, shrinks)
        assert memory.tried == ([2, 2, 1, 1, 1, 1] if late else [2, 2])
    assert relative_difference(found[0][0], found[1][0]) < 1e-9


def learn_and_shrink(policy: Policy, optimizer: Optimizer, rows: Rows, before: Callable[[slice, Rows], None]) -> None:
    def learn(at: slice, micro: Rows) -> None:
        before(at, micro)
        optimizer.backward(-sft_core.train.token_logprobs(policy, micro)[0].sum())

    optimizer.accumulate(rows, learn)
    optimizer.clip_and_step()


@places
@errors
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_sft_step_that_runs_out_of_memory_learns_the_same(
    family: Any, where: Where, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for fits in (64, 1):
        policy = tiny_policy(family, dtype=torch.float64)
        optimizer = Optimizer(policy, OptimConfig(lr=1e-2, micro_batch=8), 10)
        with monkeypatch.context() as patch:
            memory = Memory(patch, policy, fits, where, error)
            record = sft_step(policy, optimizer, random_rows(policy))
        outcomes.append((record, weights(policy), memory.tried))
    (record, expected, _), (disturbed, found, tried) = outcomes
    assert tried == [3, 2, 1, 1, 1]
    assert disturbed == pytest.approx(record, rel=1e-9)
    assert relative_difference(expected, found) < 1e-9


def test_memory_that_does_not_hold_one_row_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    optimizer = Optimizer(policy, OptimConfig(micro_batch=3), 10)
    memory = Memory(monkeypatch, policy, fits=0)
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):
        sft_step(policy, optimizer, random_rows(policy))
    assert memory.tried == [3, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_other_errors_pass_through(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny_policy()
    optimizer, tried = Optimizer(policy, OptimConfig(micro_batch=3), 10), []

    def learn(at: slice, micro: Rows) -> None:
        tried.append(len(micro))
        raise error

    with pytest.raises(type(error)) as caught:
        optimizer.accumulate(random_rows(policy), learn)
    assert caught.value is error and tried == [3] and optimizer.micro_batch == 3
    assert capsys.readouterr().out == ""


@places
def test_what_the_failed_attempt_held_is_freed_before_the_next(where: Where) -> None:
    policy = tiny_policy()
    optimizer = Optimizer(policy, OptimConfig(micro_batch=4), 10)
    held: list[weakref.ref[Tensor]] = []
    weight = policy.trainable()[0][1]
    sizes = []

    def fail(gradient: Tensor) -> None:
        try:
            raise ERRORS["CUDA's"]()
        except RuntimeError as error:
            kept = error  # noqa: F841 - a cycle, as libraries make them: the frame holds the error, which holds it
            raise

    def learn(at: slice, micro: Rows) -> None:
        assert all(tensor() is None for tensor in held)
        sizes.append(len(micro))
        large = torch.ones(1000, 1000)
        product = weight.sum() * large  # whose backward pass keeps `large`
        held.extend([weakref.ref(large), weakref.ref(product)])
        if len(micro) > 1:
            if where == "forward":
                fail(large)
            product.register_hook(fail)
        optimizer.backward(product.sum())

    optimizer.accumulate(random_rows(policy, (4, 7, 2, 3), (5, 1, 8, 2)), learn)
    assert sizes == [4, 2, 1, 1, 1, 1] and len(held) == 12


def test_memory_and_fp16s_range_may_run_out_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ends_often(tiny_policy(precision="fp16"))
    parts = learner(policy, grpo_config(mu=2, beta=0.1, micro_batch=6))
    parts.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    memory, passes = Memory(monkeypatch, policy, fits=3), []

    def overflow_once(gradient: Tensor) -> Tensor:
        passes.append(memory.tried[-1])
        return gradient * math.inf if len(passes) == 2 else gradient

    policy.trainable()[-1][1].register_hook(overflow_once)
    before, moves = weights(policy), stepped_gradients(parts.optimizer)
    report = step(parts)
    # Six rows do not fit; the second half overflows; both halves again; then the second update.
    assert memory.tried == [6, 3, 3, 3, 3, 3, 3] and parts.optimizer.scaler.get_scale() == 512
    assert len(moves) == 2 and relative_difference(before, weights(policy)) > 0
    tally, tokens = Tally.of(report), int(report.rollout.samples.rows.mask_NT.sum())
    assert tally.updates == 2 and float(tally.sums["tokens"]) == 2 * tokens
    assert math.isfinite(report.grad_norm) and math.isfinite(tally.means()["grpo_loss"])


SMALL_MEMORY = """
import resource, sys
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from sft_core.config import OptimConfig
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.optim import Optimizer
from sft_core.model.policy import Policy
from sft_core.precision import pick_precision
from sft_core.learn.rows import pack_rows

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=400, **sizes))
policy = Policy(model, None, pick_precision("float32", torch.device("cpu")), (2,), 0, logit_chunk=0)
ids = torch.randint(3, 400, (128, 104)).tolist()
rows = pack_rows([row[:4] for row in ids], [row[4:] for row in ids], 0)

def gradient(micro_batch):
    optimizer = Optimizer(policy, OptimConfig(micro_batch=micro_batch), 1)
    learn = lambda at, micro: optimizer.backward(token_logprobs(policy, micro, entropy="none")[0].sum() / 12800)
    optimizer.accumulate(rows, learn)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found, optimizer.micro_batch

expected, _ = gradient(8)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found, micro_batch = gradient(128)
print("ended at", micro_batch, "off by", float((found - expected).abs().max() / expected.abs().max()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_process_that_really_runs_out_of_memory_continues_with_fewer_rows() -> None:
    """A micro-batch of all 128 rows wants more than the 64 MB that are left."""
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", SMALL_MEMORY], cwd=root, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    *told, last = ended.stdout.splitlines()
    sizes = [int(line.split("from here on ")[1].split()[0]) for line in told]
    assert sizes == [64, 32, 16, 8, 4, 2, 1][: len(sizes)] and 1 <= len(sizes) <= 5
    words = last.split()
    assert int(words[2]) == sizes[-1] and float(words[-1]) < 1e-5
