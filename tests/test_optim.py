"""What `sft_core.learn.optim` claims: unscaled before clipped, and nothing moves on a gradient that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sft_core.config import OptimConfig
from sft_core.learn.optim import Optimizer
from sft_core.model.policy import Policy
from tests.helpers import PEFT_IS_BEHIND, adapted, largest_difference, tiny_policy, weights


def optimizer(policy: Policy, steps: int = 10, **config: Any) -> Optimizer:
    return Optimizer(policy, OptimConfig(**({"lr": 0.1, "lr_schedule": "linear"} | config)), steps)


def loss(policy: Policy, slope: float = 1.0) -> Tensor:
    """Its gradient with respect to every weight is `slope`."""
    return slope * torch.stack([p.sum() for _, p in policy.trainable()]).sum()


def true_norm(policy: Policy, slope: float = 1.0) -> float:
    return slope * sum(p.numel() for _, p in policy.trainable()) ** 0.5


def gradients_at_step(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that AdamW will have worked with."""
    seen: list[Tensor] = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in optimizer.parameters))
    return seen


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_gradients_are_unscaled_before_they_are_clipped(precision: Any) -> None:
    policy = tiny_policy(precision=precision)
    learn = optimizer(policy, max_grad_norm=1.0)
    seen = gradients_at_step(learn)
    learn.backward(loss(policy))
    grad_norm, again = learn.clip_and_step()
    assert grad_norm == pytest.approx(true_norm(policy), rel=1e-5)  # the true one, before clipping
    assert torch.cat([g.flatten() for g in seen]).norm().item() == pytest.approx(1.0, rel=1e-4)
    assert not again


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_a_gradient_within_the_bound_is_left_alone(precision: Any, bound: float) -> None:
    policy = tiny_policy(precision=precision)
    learn = optimizer(policy, max_grad_norm=bound)  # 0: no bound
    seen = gradients_at_step(learn)
    learn.backward(loss(policy, slope=3.0))
    learn.clip_and_step()
    assert all((g == 3.0).all() for g in seen)


def test_backward_adds_up_and_a_step_clears() -> None:
    policy = tiny_policy()
    learn = optimizer(policy)
    learn.backward(loss(policy, slope=1.0))
    learn.backward(loss(policy, slope=2.0))
    assert learn.clip_and_step()[0] == pytest.approx(true_norm(policy, 3.0), rel=1e-5)
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing_in_float32(bad: float) -> None:
    policy = tiny_policy()
    learn = optimizer(policy, steps=4)
    learn.backward(loss(policy))
    learn.clip_and_step()
    before, lr, state = weights(policy), learn.lr, adamw_state(learn)

    learn.backward(loss(policy))
    policy.trainable()[0][1].grad[0] = bad
    grad_norm, again = learn.clip_and_step()
    assert grad_norm != grad_norm or grad_norm == float("inf")
    assert not again  # it would be as bad again
    assert largest_difference(weights(policy), before) == 0
    assert learn.lr == lr and adamw_state(learn) == state
    assert all(p.grad is None for p in policy.model.parameters())

    learn.backward(loss(policy))
    learn.clip_and_step()
    assert largest_difference(weights(policy), before) > 0 and learn.lr < lr


def test_an_overflow_in_fp16_moves_nothing_halves_the_scale_and_asks_for_the_batch_again() -> None:
    policy = tiny_policy(precision="fp16")
    learn = optimizer(policy, steps=4)
    learn.backward(loss(policy))
    learn.clip_and_step()
    before, lr, state, scale = weights(policy), learn.lr, adamw_state(learn), learn.scaler.get_scale()

    learn.backward(loss(policy))
    policy.trainable()[0][1].grad[0] = float("inf")
    _, again = learn.clip_and_step()
    assert again
    assert learn.scaler.get_scale() == scale / 2
    assert largest_difference(weights(policy), before) == 0
    assert learn.lr == lr and adamw_state(learn) == state
    assert all(p.grad is None for p in policy.model.parameters())

    learn.backward(loss(policy))
    grad_norm, again = learn.clip_and_step()
    assert not again and grad_norm == pytest.approx(true_norm(policy), rel=1e-5)
    assert largest_difference(weights(policy), before) > 0 and learn.lr < lr


def test_a_gradient_that_is_infinite_at_factor_one_is_not_asked_for_for_ever() -> None:
    policy = tiny_policy(precision="fp16")
    learn = optimizer(policy)
    before, passes, again = weights(policy), 0, True
    while again:
        learn.backward(loss(policy, slope=float("inf")))
        _, again = learn.clip_and_step()
        passes += 1
        assert passes < 50
    assert passes == 17  # at 2**16, 2**15, ... 1
    assert learn.scaler.get_scale() == 2**16 and learn.skipped == 1  # the next batch starts anew
    assert largest_difference(weights(policy), before) == 0


def test_only_bad_steps_in_a_row_end_a_run() -> None:
    policy = tiny_policy()
    learn = optimizer(policy)

    def take(slope: float, times: int) -> None:
        for _ in range(times):
            learn.backward(loss(policy, slope))
            learn.clip_and_step()
            learn.stop_if_lost(1, "")

    bad = float("nan")
    take(bad, times=4)
    take(1.0, times=1)
    take(bad, times=4)
    assert learn.skipped == 8
    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        take(bad, times=1)


def adamw_state(learn: Optimizer) -> list[list[float]]:
    """Every number that AdamW remembers, its count of steps included."""
    return [value.flatten().tolist() for values in learn.adamw.state.values() for value in values.values()]


def rates(steps: int, **config: Any) -> list[float]:
    policy = tiny_policy()
    learn = optimizer(policy, steps, **config)
    found = []
    for _ in range(steps):
        found.append(learn.lr)
        learn.backward(loss(policy))
        learn.clip_and_step()
    return found


def test_schedules_start_at_the_peak_and_decay_over_the_run() -> None:
    assert rates(4, lr_schedule="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rates(4, lr_schedule="cosine") == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-6)
    assert rates(4, lr_schedule="constant") == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_from_zero_over_its_share_of_the_run(schedule: str) -> None:
    assert rates(8, lr_schedule=schedule, warmup_ratio=0.5)[:5] == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_lr_is_the_rate_that_the_next_step_uses() -> None:
    policy = tiny_policy()
    learn = optimizer(policy, steps=4)
    for _ in range(3):
        before, lr = weights(policy), learn.lr
        learn.backward(loss(policy))
        learn.clip_and_step()
        # AdamW moves by the rate itself where the gradient never changes.
        assert largest_difference(weights(policy), before) == pytest.approx(lr, rel=1e-3)


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    policy = tiny_policy("gpt2")
    learn = optimizer(policy, weight_decay=0.5)
    before = weights(policy)
    learn.backward(loss(policy, slope=0.0))
    learn.clip_and_step()
    after = weights(policy)
    for name, weight in before.items():
        factor = 1.0 if name.endswith("bias") or ".ln_" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(after[name], weight * factor)


def test_adamw_gets_the_configured_decays_of_its_means() -> None:
    learn = optimizer(tiny_policy(), adam_beta1=0.8, adam_beta2=0.95)
    assert all(group["betas"] == (0.8, 0.95) for group in learn.adamw.param_groups)


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_with_lora_the_base_model_is_frozen() -> None:
    policy = adapted(tiny_policy())
    learn = optimizer(policy)
    before = weights(policy)
    learn.backward(loss(policy))
    learn.clip_and_step()
    moved = {name for name, weight in weights(policy).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_norm_that_overflows_where_no_element_does_is_not_learned_again_for_ever() -> None:
    policy = tiny_policy(precision="fp16")
    learn, before = optimizer(policy), weights(policy)
    learn.backward(loss(policy, slope=1e20))  # finite even times the scaler's factor; its square is not
    grad_norm, again = learn.clip_and_step()
    assert grad_norm == float("inf") and not again
    assert largest_difference(before, weights(policy)) == 0
