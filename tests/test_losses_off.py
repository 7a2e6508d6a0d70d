"""What is off costs nothing; what is asked for is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_core.step
import grpo_core.variants
from grpo_core.step import sample_groups
from grpo_core.variants import kept_tokens
from tests.helpers import (
    EXAMPLES,
    caught,
    ends_often,
    forward_calls,
    grpo_config,
    random_rows,
    step,
    tiny_policy,
    with_samples,
)
from tests.test_losses import VARIANTS

# --- what is off costs nothing ---


@pytest.fixture
def no_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a variant was computed that nobody asked for")

    for name in (*VARIANTS, "ended_rows", "kept_tokens", "decoupled_advantages", "corrected_kl"):
        monkeypatch.setattr(grpo_core.variants, name, refuse)
    monkeypatch.setattr(grpo_core.step, "k3_kl", refuse)


@pytest.mark.usefixtures("no_variants")
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo"])
def test_a_step_without_options_computes_no_variant(loss: Any) -> None:
    step(caught(ends_often(tiny_policy()), grpo_config(loss=loss, mu=2), lr=0.01))


@pytest.mark.usefixtures("no_variants")
@pytest.mark.parametrize(
    "option",
    [
        {"loss": "cispo"},
        {"loss": "sapo"},
        {"loss": "vespo"},
        {"top_entropy": 0.5},
        {"off_policy_threshold": 0.1},
        {"beta": 0.1},
        {"reward_aggregation": "normalize_then_sum"},
    ],
)
def test_an_option_that_is_asked_for_is_computed(option: dict[str, Any]) -> None:
    """The test above can fail."""
    with pytest.raises(AssertionError, match="nobody asked for"):
        step(caught(ends_often(tiny_policy()), grpo_config(**option)))


@pytest.mark.parametrize(("top_entropy", "passes"), [(1.0, 2), (0.5, 2 + 1)])
def test_choosing_tokens_by_entropy_costs_one_more_forward_pass_and_not_choosing_none(
    top_entropy: float, passes: int
) -> None:
    policy, config = ends_often(tiny_policy()), grpo_config(mu=2, micro_batch=4, top_entropy=top_entropy)
    samples = sample_groups(policy, EXAMPLES, config)
    with forward_calls(policy.model) as calls:
        step(with_samples(caught(policy, config), samples))
    assert len(calls) == 2 * passes  # micro-batches


def test_the_kept_tokens_are_chosen_over_the_whole_step_and_once() -> None:
    policy = tiny_policy()
    rows = random_rows(policy)
    assert torch.equal(kept_tokens(policy, rows, grpo_config(), 8), rows.mask_NT)
    kept = kept_tokens(policy, rows, grpo_config(top_entropy=0.3), 1)
    assert 4 <= kept.sum() <= 5 and not (kept & ~rows.mask_NT).any()  # of 14, not a share of each row
    assert not kept.requires_grad


@pytest.mark.parametrize(("entropy_coef", "kind"), [(0.0, "value"), (0.1, "gradient")])
def test_the_entropy_has_a_gradient_only_where_the_loss_holds_it(
    entropy_coef: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], grpo_core.step.token_logprobs

    def spy(*args: Any) -> Any:
        asked.append(args[3])
        return real(*args)

    monkeypatch.setattr(grpo_core.step, "token_logprobs", spy)
    step(caught(ends_often(tiny_policy()), grpo_config(entropy_coef=entropy_coef)))
    assert asked == [kind]


def test_an_entropy_bonus_makes_the_policy_less_sure() -> None:
    policy = ends_often(tiny_policy())
    config = grpo_config(entropy_coef=1.0, mu=2)
    parts = caught(policy, config, lambda prompts, **_: [1.0] * len(prompts), lr=1e-3)  # nothing else to learn
    samples = sample_groups(policy, EXAMPLES, config)
    step(with_samples(parts, samples))
    first, second = parts.optimizer.losses  # type: ignore[attr-defined]
    assert second < first < 0  # minus the mean entropy
