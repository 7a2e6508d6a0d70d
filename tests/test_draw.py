"""Drawing the next token (eval/draw.py): by the weights, from all of the vocabulary, never a token of weight 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from eval import draw
from eval.draw import BLOCK, Draw, block_sums, by_triangle, token_at

NEXT_TO_ONE = 1 - 2**-53  # the largest number that torch.rand gives in float64


def uniform(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def some_weights(vocabulary: int) -> Tensor:
    """(V,): unlike, a third of them 0, the first and the last two among those."""
    generator = torch.Generator().manual_seed(vocabulary)
    weight_V = torch.randn(vocabulary, generator=generator).mul(2).exp()
    weight_V[torch.randperm(vocabulary, generator=generator)[: vocabulary // 3]] = 0
    weight_V[[0, -1, -2]] = 0
    return weight_V


@pytest.mark.parametrize("vocabulary", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_uniform_number_falls_on_the_token_that_a_single_cumulative_sum_says(vocabulary: int) -> None:
    weight_V = some_weights(vocabulary)
    end_V = weight_V.double().cumsum(0)
    middles = (end_V - weight_V.double() / 2)[weight_V > 0] / end_V[-1]
    tokens = token_at(weight_V.expand(len(middles), -1), middles[:, None]).squeeze(1)
    assert torch.equal(tokens, weight_V.nonzero().squeeze(1))


@pytest.mark.parametrize("vocabulary", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_the_ends_of_the_interval_fall_on_the_first_and_last_token_with_a_weight(vocabulary: int) -> None:
    weight_V = some_weights(vocabulary)
    possible = weight_V.nonzero().squeeze(1).tolist()
    tokens = token_at(weight_V.expand(2, -1), uniform(0.0, NEXT_TO_ONE)).squeeze(1).tolist()
    assert tokens == [possible[0], possible[-1]]


def test_tokens_come_as_often_as_their_weights_say() -> None:
    weight_V, draws = some_weights(2 * BLOCK + 100), 100_000
    generator = torch.Generator().manual_seed(1)
    uniform_N1 = torch.rand(draws, 1, dtype=torch.float64, generator=generator)
    tokens = torch.cat([token_at(weight_V.expand(1000, -1), part) for part in uniform_N1.split(1000)]).squeeze(1)
    p_V = (weight_V / weight_V.sum()).double()
    count_V, likely_V = torch.bincount(tokens, minlength=len(weight_V)), p_V * draws > 10
    apart = (count_V - p_V * draws)[likely_V] / (p_V * (1 - p_V) * draws)[likely_V].sqrt()
    assert int(likely_V.sum()) > 300
    assert apart.abs().max() < 5 and 0.9 < float(apart.std()) < 1.1  # standard deviations
    assert (weight_V[tokens] > 0).all()


def test_a_token_of_one_in_a_billion_keeps_its_share() -> None:
    """In float32 its weight would be lost in a sum of about 1."""
    weight_V = torch.tensor([1.0, 1e-9, 1.0])
    half = 1 / (2 + 1e-9)
    numbers = uniform(half - 1e-10, half + 2e-10, half + 6e-10)
    assert token_at(weight_V.expand(3, -1), numbers).squeeze(1).tolist() == [0, 1, 2]


def test_float32_does_where_there_is_nothing_wider() -> None:
    weight_V = some_weights(2 * BLOCK + 100)
    uniform_N1 = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1))
    tokens = token_at(weight_V.expand(len(uniform_N1), -1), uniform_N1).squeeze(1)
    wide = token_at(weight_V.expand(len(uniform_N1), -1), uniform_N1.double()).squeeze(1)
    assert (weight_V[tokens] > 0).all() and (tokens == wide).float().mean() > 0.99
    draw = Draw(0.7, torch.tensor([[0.3]]), eos_id=0)
    draw(torch.zeros(1, 1), torch.randn(1, 600, generator=torch.Generator().manual_seed(0)))
    assert draw.logp[0].dtype == torch.float32 and bool(draw.logp[0].isfinite())


def test_the_sums_of_blocks_are_those_of_their_words() -> None:
    weight_NV = torch.rand(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([part.sum(dim=1) for part in weight_NV.split(BLOCK, dim=1)], dim=1)
    torch.testing.assert_close(block_sums(weight_NV), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_log_probability_that_is_kept_is_that_of_the_drawn_token(temperature: float) -> None:
    logits = 5 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    draw = Draw(temperature, torch.rand(4, 2, dtype=torch.float64), eos_id=0)
    token_N = draw(torch.zeros(4, 1), logits.clone()).argmax(dim=1)
    expected = (logits / temperature).log_softmax(dim=1).gather(1, token_N[:, None]).squeeze(1)
    torch.testing.assert_close(draw.logp[0], expected, rtol=0, atol=1e-5)


def test_cuts_limit_what_is_drawn_and_not_the_log_probability() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(2000, -1)
    uniform_NT = torch.rand(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draw = Draw(1.0, uniform_NT, 0, [TopKLogitsWarper(5), TopPLogitsWarper(0.7)])
    token_N = draw(torch.zeros(2000, 1), logits.clone()).argmax(dim=1)
    kept = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(5)(None, logits[:1].clone())).isfinite().nonzero()[:, 1]
    assert 1 < len(kept) < 5 and set(token_N.tolist()) == set(kept.tolist())
    torch.testing.assert_close(draw.logp[0], logits.log_softmax(dim=1).gather(1, token_N[:, None]).squeeze(1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_nothing_can_be_drawn_for_ends_and_its_neighbour_draws_what_it_would(poison: float) -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = Draw(1.0, numbers[1:], eos_id=7)(torch.zeros(1, 1), logits[1:].clone()).argmax(dim=1)
    logits[0, 500] = poison
    draw = Draw(1.0, numbers, eos_id=7)
    assert draw(torch.zeros(2, 1), logits).argmax(dim=1).tolist() == [7, *alone.tolist()]
    assert draw.logp[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("words", [1, 5, BLOCK])
def test_running_sums_by_a_product_are_those_of_cumsum_and_never_fall(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    weight_NK = torch.randn(64, words, dtype=torch.float64, generator=generator).mul(20).exp()  # e**-80 to e**80
    weight_NK[:, ::3] = 0
    found = by_triangle(weight_NK)
    # Relative: each sum has at most BLOCK roundings of 2**-53.
    torch.testing.assert_close(found, weight_NK.cumsum(dim=1), rtol=BLOCK * 2**-53, atol=0)
    assert (found.diff(dim=1) >= 0).all() and (found.diff(dim=1)[:, 2::3] == 0).all()


def test_a_product_takes_the_place_of_cumsum_only_where_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        """Stands for a tensor on a GPU, and says what is asked of it."""

        device, shape, dtype = torch.device("cuda"), (2, 3), torch.float64

        def cumsum(self, dim: int) -> str:
            return "cumsum"

    monkeypatch.setattr(draw, "by_triangle", lambda weight_NK: "product")
    found = []
    for enabled in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda enabled=enabled: enabled)
        found.append(draw.running_sums(OnGPU()))  # type: ignore[arg-type]
        assert torch.equal(draw.running_sums(torch.ones(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))
    assert found == ["cumsum", "product"]
