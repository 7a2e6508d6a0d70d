"""What `tests/simulated_device.py` claims to be: a device that computes, refuses and waits as CUDA does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.simulated import NEEDS_THE_HOOKS, on_the_device
from tests.simulated_device import DEVICE, OnDevice

pytestmark = NEEDS_THE_HOOKS
THERE = "simulated"


def numbers(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same random numbers here and there, both with a gradient."""
    here = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return here.clone().requires_grad_(), here.to(THERE).requires_grad_()


def waits(run: Callable[[], Any]) -> list[str]:
    with DEVICE.watched() as found:
        run()
    return [wait.what for wait in found]


@on_the_device
def test_gradients_are_those_of_the_cpu_and_lie_on_the_device() -> None:
    here, there = numbers(3, 4)
    for x in (here, there):
        (x.softmax(dim=1) @ x.T.exp()).tril().sum().backward()
    assert isinstance(there.grad, OnDevice) and str(there.device) == str(there.grad.device) == "simulated:0"
    assert torch.equal(there.grad.cpu(), here.grad)


@on_the_device
def test_what_cuda_refuses_to_mix_is_refused() -> None:
    _, x = numbers(3, 4)
    refused: list[Callable[[], Any]] = [
        lambda: x + torch.ones(4),
        lambda: torch.ones(4).mul_(x[0].detach()),
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
        lambda: torch.where(torch.ones(3, 4, dtype=torch.bool), x, 0.0),
        lambda: torch.cat([x, torch.ones(1, 4)]),
        lambda: x @ torch.ones(4, 2),
        lambda: torch.nn.functional.embedding(torch.tensor([1]), x),
        lambda: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0.0),
        lambda: torch.ones(3)[torch.tensor([1], device=THERE)],
        lambda: torch.rand(3, device=THERE, generator=torch.Generator()),
        lambda: x.detach().numpy(),
    ]
    for number, run in enumerate(refused):
        with pytest.raises((RuntimeError, TypeError)):
            print(number, run())


@on_the_device
def test_numbers_and_indices_may_come_from_the_cpu() -> None:
    here, there = numbers(3, 4)
    allowed: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * torch.tensor(2.0) + 1,
        lambda x: torch.where(x > 0, 0.0, x),
        lambda x: x[torch.tensor([2, 0])],
        lambda x: x.masked_fill(x > 0, torch.tensor(5.0)),
        lambda x: x.detach().index_put((torch.tensor([1]),), torch.tensor(3.0, device=x.device)),
    ]
    for run in allowed:
        assert torch.equal(run(there).cpu(), run(here))


@on_the_device
def test_everything_that_the_host_waits_for_is_noted() -> None:
    _, x = numbers(3, 4)
    mask, place, zero = x > 0, torch.tensor(1, device=THERE), torch.zeros((), device=THERE)
    assert waits(lambda: x.sum().item()) == waits(lambda: bool(mask.any())) == waits(lambda: int(place))
    for run, count in (
        (lambda: x.tolist(), 1),
        (lambda: x.cpu(), 1),
        (lambda: x.to("cpu", torch.float64), 1),
        (lambda: torch.tensor([1, 2], device=THERE), 1),
        (lambda: torch.ones(3).to(THERE), 1),
        (lambda: x[mask], 1),
        (lambda: x.detach().index_put_((mask,), zero), 1),
        (lambda: x[[0, 2]], 1),
        (lambda: mask.nonzero(), 1),
        (lambda: x.masked_select(mask), 1),
        (lambda: torch.equal(x, x), 1),
        (lambda: place.repeat_interleave(place), 1),
        (lambda: torch.zeros(3, device=THERE) + torch.arange(3, device=THERE) * x.detach()[:, 0], 0),
        (lambda: torch.ones(3).pin_memory().to(THERE, non_blocking=True), 0),
        (lambda: x.sum().backward(), 0),
        (lambda: x.detach().masked_fill(mask, 0)[:, :2].to(torch.float16), 0),
    ):
        assert len(waits(run)) == count, waits(run)


@on_the_device
def test_a_wait_has_the_place_that_asked_for_it() -> None:
    from sft_core.learn.rows import pack_rows

    rows = replace(pack_rows([[5, 6], [7]], [[8, 2], [2]], pad_id=0).to(torch.device(THERE)))
    with DEVICE.watched() as found:
        rows.completion_ids()
    assert {(wait.file, wait.function) for wait in found} == {("sft_core/learn/rows.py", "lists")}


@on_the_device
def test_a_copy_that_nobody_waits_for_arrives_at_the_next_wait() -> None:
    x = torch.arange(3.0, device=THERE)
    target = torch.zeros(3, pin_memory=True)
    target.copy_(x, non_blocking=True)
    assert target.isnan().all()
    x.sum().item()
    assert target.tolist() == [0.0, 1.0, 2.0]


@on_the_device
def test_what_is_being_sent_must_not_change_before_it_has_left() -> None:
    source, other = torch.zeros(3).pin_memory(), torch.zeros(3, device=THERE)
    source.to(THERE, non_blocking=True)
    other.sum().item()
    source += 1  # it has left
    source.to(THERE, non_blocking=True)
    source += 1
    with pytest.raises(RuntimeError, match="before its copy"):
        other.sum().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@on_the_device
def test_autocast_multiplies_in_half_precision_and_sums_in_float32(dtype: torch.dtype) -> None:
    _, x = numbers(1, 4, 4)
    layer = torch.nn.Linear(4, 4).to(THERE)
    with torch.autocast(THERE, dtype=dtype):
        half = layer(x)
        assert half.dtype == scaled_dot_product_attention(x, x, x).dtype == dtype
        assert {half.softmax(-1).dtype, half.exp().dtype, half.sum().dtype, half.rsqrt().dtype} == {torch.float32}
        half.sum().backward()
    assert layer(x).dtype == layer.weight.grad.dtype == x.grad.dtype == torch.float32


@on_the_device
def test_modules_move_and_are_copied_with_their_ties() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    moved = torch.nn.ModuleList([first, second]).to(THERE)
    copied = copy.deepcopy(moved)
    for pair in (moved, copied):
        assert pair[0].weight is pair[1].weight and isinstance(pair[0].weight, torch.nn.Parameter)
        assert pair[0].weight.device.type == THERE
    assert copied[0].weight is not moved[0].weight
    assert torch.equal(copied[0].weight.cpu(), moved[0].weight.cpu())


@on_the_device
def test_the_device_draws_by_a_generator_of_its_own() -> None:
    torch.manual_seed(0)
    here = torch.rand(3)
    torch.manual_seed(0)
    there = torch.rand(3, device=THERE)
    assert torch.equal(torch.rand(3), here)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device=THERE).cpu(), there.cpu())


def test_other_tests_do_not_see_the_device() -> None:
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    with pytest.raises(RuntimeError):
        torch.device(THERE)
