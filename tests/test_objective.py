"""What `grpo_core.objective` claims: which tokens pull, which way, and how hard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_core.config import LOSSES, Aggregation
from grpo_core.objective import clipped_surrogate, importance_ratio, k3_kl, token_weights

AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "constant_length", "sequence_sum")
MASK_NT = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
LOW, HIGH = 0.1, 0.3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_has_no_weight_and_every_token_has_some(aggregation: Aggregation) -> None:
    assert torch.equal(token_weights(MASK_NT, aggregation, 8) > 0, MASK_NT)


def test_token_mean_gives_every_token_of_the_step_the_same_weight() -> None:
    assert token_weights(MASK_NT, "token_mean", 8)[MASK_NT].tolist() == pytest.approx([1 / 9] * 9)


def test_sequence_mean_gives_every_completion_the_same_weight() -> None:
    weight_NT = token_weights(MASK_NT, "sequence_mean", 8)
    assert weight_NT.sum(dim=1).tolist() == pytest.approx([1 / 3] * 3)
    assert weight_NT[2, :3].tolist() == pytest.approx([1 / 9] * 3)


def test_constant_length_gives_a_token_one_weight_whatever_the_lengths() -> None:
    assert token_weights(MASK_NT, "constant_length", 8)[MASK_NT].tolist() == pytest.approx([1 / 24] * 9)
    full = torch.ones(3, 5, dtype=torch.bool)
    assert token_weights(full, "constant_length", 8)[full].tolist() == pytest.approx([1 / 24] * 15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_wider_matrix_changes_no_weight(aggregation: Aggregation) -> None:
    wide = torch.nn.functional.pad(MASK_NT, (0, 4))
    assert torch.equal(token_weights(wide, aggregation, 8)[:, :5], token_weights(MASK_NT, aggregation, 8))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_without_any_token_are_zero_and_not_nan(aggregation: Aggregation) -> None:
    assert (token_weights(torch.zeros(2, 3, dtype=torch.bool), aggregation, 8) == 0).all()


def test_luspo_is_gspo_with_every_completion_weighted_by_its_length() -> None:
    luspo, gspo = LOSSES["luspo"], LOSSES["gspo"]
    assert (luspo.ratio_level, luspo.token_loss) == (gspo.ratio_level, gspo.token_loss) == ("sequence", "clip")
    weighted_NT = token_weights(MASK_NT, gspo.aggregation, 8) * MASK_NT.sum(dim=1, keepdim=True)
    torch.testing.assert_close(token_weights(MASK_NT, luspo.aggregation, 8), weighted_NT)


def test_the_ratio_is_that_of_the_probabilities() -> None:
    new, old = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.25, 0.4]])
    torch.testing.assert_close(
        importance_ratio(new.log(), old.log(), torch.ones(1, 2, dtype=torch.bool)), torch.tensor([[2.0, 0.5]])
    )


def test_the_sequences_ratio_is_the_geometric_mean_over_its_own_tokens() -> None:
    new, old = torch.tensor([[0.8, 0.2, 1.0], [0.3, 1.0, 1.0]]), torch.tensor([[0.1, 0.4, 1.0], [0.1, 1.0, 1.0]])
    mask_NT = torch.tensor([[True, True, False], [True, False, False]])
    found = importance_ratio(new.log(), old.log(), mask_NT, "sequence")
    torch.testing.assert_close(found, torch.tensor([[(8 * 0.5) ** 0.5], [3.0]]))


def test_a_completion_without_tokens_has_sequence_ratio_one() -> None:
    nothing_NT = torch.zeros(2, 3, requires_grad=True)
    ratio_N1 = importance_ratio(nothing_NT, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), "sequence")
    assert ratio_N1.tolist() == [[1.0], [1.0]]
    ratio_N1.sum().backward()
    assert nothing_NT.grad is not None and nothing_NT.grad.isfinite().all()


def test_padding_cannot_make_the_loss_or_its_gradient_nan() -> None:
    """Both log-probabilities are 0 on padding, so nothing overflows there, however far the own tokens have moved."""
    logp_NT = torch.where(MASK_NT, -50.0, 0.0).requires_grad_()
    old_NT, ref_NT = torch.where(MASK_NT, -0.1, 0.0), torch.where(MASK_NT, -10.0, 0.0)
    ratio_NT = importance_ratio(logp_NT, old_NT, MASK_NT)
    token_loss_NT = clipped_surrogate(ratio_NT, torch.tensor([[1.0], [-1.0], [3.0]]), LOW, HIGH) + k3_kl(
        logp_NT, ref_NT
    )
    assert (ratio_NT[~MASK_NT] == 1).all() and (k3_kl(logp_NT, ref_NT)[~MASK_NT] == 0).all()
    loss = (token_weights(MASK_NT, "token_mean", 8) * token_loss_NT).sum()
    loss.backward()
    assert loss.isfinite() and logp_NT.grad is not None and logp_NT.grad.isfinite().all()
    assert (logp_NT.grad[~MASK_NT] == 0).all()


def slope(ratio: float, advantage: float) -> float:
    """The gradient of a token's loss with respect to its ratio."""
    ratio_NT = torch.tensor([[ratio]], requires_grad=True)
    clipped_surrogate(ratio_NT, torch.tensor([[advantage]]), LOW, HIGH).sum().backward()
    assert ratio_NT.grad is not None
    return ratio_NT.grad.item()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.95, 1.0, 1.25])
def test_within_the_bounds_every_token_pulls_with_its_advantage(ratio: float, advantage: float) -> None:
    assert slope(ratio, advantage) == -advantage


def test_a_good_token_above_the_upper_bound_has_no_gradient() -> None:
    assert slope(1.29, 2.0) == -2.0
    assert slope(1.31, 2.0) == 0


def test_a_good_token_that_became_less_probable_is_never_clipped() -> None:
    assert slope(0.5, 2.0) == -2.0


def test_a_bad_token_that_became_rare_enough_pulls_no_more() -> None:
    assert slope(0.91, -2.0) == 2.0
    assert slope(0.89, -2.0) == 0


def test_a_bad_token_that_became_more_probable_is_never_clipped() -> None:
    assert slope(3.0, -2.0) == 2.0


def test_the_first_update_is_the_policy_gradient() -> None:
    """At ratio 1 the gradient with respect to a log-probability is -A, the advantage of the token's own row."""
    logp_NT = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    ratio_NT = importance_ratio(logp_NT, logp_NT.detach(), torch.ones(2, 2, dtype=torch.bool))
    clipped_surrogate(ratio_NT, torch.tensor([[2.0], [-0.5]]), LOW, HIGH).sum().backward()
    assert logp_NT.grad is not None
    assert logp_NT.grad.tolist() == [[-2.0, -2.0], [0.5, 0.5]]


def test_k3_is_never_negative_and_zero_only_where_the_two_agree() -> None:
    logp = torch.linspace(-8, 0, 33, dtype=torch.float64)
    k3 = k3_kl(logp[:, None], logp[None, :])
    assert (k3 >= 0).all()
    assert torch.equal(k3 == 0, torch.eye(33, dtype=torch.bool))


def test_k3_has_no_gradient_where_the_two_agree() -> None:
    logp = torch.tensor([-1.0, -5.0], requires_grad=True)
    k3_kl(logp, logp.detach()).sum().backward()
    assert logp.grad is not None and (logp.grad == 0).all()


def two_distributions() -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy (differentiable in its logits) and a reference over five tokens."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits.log_softmax(dim=0)


def test_the_mean_of_k3_over_the_policys_own_tokens_is_the_kl_divergence() -> None:
    logits, ref_logp = two_distributions()
    logp = logits.log_softmax(dim=0)
    expected = (logp.exp() * (logp - ref_logp)).sum()
    torch.testing.assert_close((logp.exp() * k3_kl(logp, ref_logp)).sum(), expected)


def test_the_mean_gradient_of_k3_pulls_towards_the_reference() -> None:
    """Over all tokens, as often as the policy samples them: that of KL(ref || policy), which is softmax(z) - ref. The
    plain log-ratio as a loss (k1) has none at all."""
    logits, ref_logp = two_distributions()
    chance = logits.log_softmax(dim=0).exp().detach()

    def mean_gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad((chance * loss).sum(), logits)[0]

    torch.testing.assert_close(mean_gradient(k3_kl(logits.log_softmax(dim=0), ref_logp)), chance - ref_logp.exp())
    k1 = mean_gradient(logits.log_softmax(dim=0) - ref_logp)
    torch.testing.assert_close(k1, torch.zeros(5, dtype=torch.float64))


def test_the_objectives_parts_leave_their_inputs_unchanged() -> None:
    mask_NT, logp_NT, old_NT = MASK_NT.clone(), torch.full((3, 5), -1.0), torch.full((3, 5), -2.0)
    ratio_NT, advantage_N1 = torch.full((3, 5), 2.0), torch.tensor([[1.0], [-1.0], [0.0]])
    inputs = [mask_NT, logp_NT, old_NT, ratio_NT, advantage_N1]
    before = [tensor.clone() for tensor in inputs]
    for aggregation in AGGREGATIONS:
        token_weights(mask_NT, aggregation, 8).zero_()
    importance_ratio(logp_NT, old_NT, mask_NT).zero_()
    clipped_surrogate(ratio_NT, advantage_N1, LOW, HIGH).zero_()
    k3_kl(logp_NT, old_NT).zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))
