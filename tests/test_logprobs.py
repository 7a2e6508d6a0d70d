"""Padding, its side and its amount change no log-probability, and the stop token is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from tests.helpers import FAMILIES, Family, largest_difference, random_rows, tiny_policy, widened

families = pytest.mark.parametrize("family", FAMILIES)


def alone(policy: Policy, rows: Rows, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies by the definition: a row at a time, no padding, no mask, no position ids."""
    logps, entropies = [], []
    for row in range(len(rows)):
        start, width = int(rows.prompt_width - rows.prompt_len_N[row]), rows.prompt_width
        ids_L = rows.ids_NL[row, start : width + int(rows.completion_len_N[row])]
        logp_LV = (policy.model(ids_L[None]).logits[0] / temperature).log_softmax(dim=-1)
        first = int(rows.prompt_len_N[row])
        logps.append(torch.stack([logp_LV[t - 1, ids_L[t]] for t in range(first, len(ids_L))]))
        entropy_L = -(logp_LV.exp() * logp_LV).sum(dim=-1)
        entropies.append(entropy_L[first - 1 : -1])
    return logps, entropies


def own(values_NT: Tensor, rows: Rows) -> Tensor:
    """The values on the completions' own tokens, one after the other."""
    return values_NT[rows.mask_NT]


@contextmanager
def caught_logits(policy: Policy) -> Iterator[list[Tensor]]:
    """The logits that the head hands out while the block runs, with their gradients kept: those of all own tokens,
    row by row, where the policy does not compute them in chunks."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        caught.append(output)

    handle = policy.model.get_output_embeddings().register_forward_hook(catch)
    yield caught
    handle.remove()


@families
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_rows_in_a_padded_batch_score_as_each_row_alone(family: Family, temperature: float) -> None:
    policy = tiny_policy(family, torch.float64)
    rows = random_rows(policy)
    logp_NT, entropy_NT = token_logprobs(policy, rows, temperature)
    logps, entropies = alone(policy, rows, temperature)
    # Qwen2 takes its norms in float32 even in a float64 model.
    close = {"rtol": 0, "atol": 1e-12 if family == "gpt2" else 1e-6}
    torch.testing.assert_close(own(logp_NT, rows), torch.cat(logps), **close)
    torch.testing.assert_close(own(entropy_NT, rows), torch.cat(entropies), **close)


@families
def test_the_amount_and_the_side_of_padding_change_no_logprob(family: Family) -> None:
    policy = tiny_policy(family)
    rows = random_rows(policy)
    expected = own(token_logprobs(policy, rows)[0], rows)
    for left, right in ((5, 0), (0, 5), (9, 3)):
        wide = widened(rows, left, right)
        torch.testing.assert_close(own(token_logprobs(policy, wide)[0], wide), expected, rtol=0, atol=1e-5)


@families
def test_what_stands_in_the_padding_changes_no_logprob(family: Family) -> None:
    policy = tiny_policy(family)
    rows = widened(random_rows(policy), 2, 2)
    scored = [token_logprobs(policy, widened(rows, 0, 0, filler))[0] for filler in (0, policy.eos_ids[0], 77)]
    assert torch.equal(scored[0], scored[1]) and torch.equal(scored[0], scored[2])


@families
def test_the_stop_token_is_trained(family: Family) -> None:
    policy = replace(tiny_policy(family), pad_id=2, logit_chunk=0)  # padded with the end-of-sequence id itself
    rows = random_rows(policy, (4, 7, 2), (5, 1, 8))
    (eos,) = policy.eos_ids
    with caught_logits(policy) as logits:
        token_logprobs(policy, rows)[0].sum().backward()
    assert logits[0].shape[0] == 5 + 1 + 8  # the same id as padding is not trained
    for stop in (4, 5, 13):
        chance = logits[0][stop].softmax(dim=-1)[eos]
        # d log p(eos) / d logit(eos) = 1 - p(eos)
        torch.testing.assert_close(logits[0].grad[stop, eos], 1 - chance)


def test_padding_has_exactly_zero_logprob_and_entropy_and_every_other_token_a_gradient() -> None:
    policy = replace(tiny_policy(), logit_chunk=0)
    rows = random_rows(policy)
    with caught_logits(policy) as logits:
        logp_NT, entropy_NT = token_logprobs(policy, rows)
        (logp_NT.exp().sum() + (3 * logp_NT).sum()).backward()
    assert (logp_NT[~rows.mask_NT] == 0).all() and (entropy_NT[~rows.mask_NT] == 0).all()
    assert logits[0].shape[0] == int(rows.mask_NT.sum())
    assert (logits[0].grad.abs().sum(dim=-1) > 0).all()


def test_the_temperature_matters_to_every_token() -> None:
    policy = tiny_policy()
    rows = random_rows(policy)
    hot, cold = (own(token_logprobs(policy, rows, temperature)[0], rows) for temperature in (1.3, 0.7))
    assert ((hot - cold).abs() > 1e-3).all()


def test_entropy_carries_no_gradient() -> None:
    policy = tiny_policy()
    logp_NT, entropy_NT = token_logprobs(policy, random_rows(policy))
    assert logp_NT.requires_grad and not entropy_NT.requires_grad


@families
@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
def test_logits_in_chunks_of_any_size_leave_results_and_gradient_unchanged(family: Family, entropy: Any) -> None:
    rows = random_rows(tiny_policy(family), (4, 7, 2, 3), (5, 1, 8, 2))

    def learned(tokens_at_once: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        policy = tiny_policy(family, torch.float64)
        policy = replace(policy, logit_chunk=tokens_at_once * len(policy.tokenizer))
        logp_NT, entropy_NT = token_logprobs(policy, rows, 0.7, entropy)
        (logp_NT.square().sum() + entropy_NT.exp().sum()).backward()
        return logp_NT.detach(), entropy_NT.detach(), {name: p.grad for name, p in policy.trainable()}

    logp_NT, entropy_NT, gradient = learned(0)
    for tokens_at_once in (1, 3, 16, 1000):
        found = learned(tokens_at_once)
        torch.testing.assert_close(found[0], logp_NT, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], entropy_NT, rtol=0, atol=1e-12)
        assert largest_difference(found[2], gradient) < 1e-10


def saved_bytes(policy: Policy, rows: Rows) -> int:
    """What the forward pass keeps for the backward pass, each storage once, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = token_logprobs(policy, rows, 0.7)[0]
    assert held.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    small, large = 375, 8 * 375
    rows = random_rows(tiny_policy(), (4, 7, 2), (20, 30, 16))
    tokens = int(rows.mask_NT.sum())

    def kept(vocabulary: int, logit_chunk: int) -> int:
        return saved_bytes(replace(tiny_policy(vocab_size=vocabulary), logit_chunk=logit_chunk), rows)

    assert abs(kept(large, 10 * large) - kept(small, 10 * small)) < 1000
    whole = kept(large, 0) - kept(small, 0)
    assert whole >= tokens * (large - small) * 4  # without chunks at least one float32 copy of all logits


def test_leaving_the_entropy_out_changes_no_logprob() -> None:
    policy = tiny_policy()
    rows = random_rows(policy)
    logp_NT, entropy_NT = token_logprobs(policy, rows, 0.7, entropy="none")
    assert torch.equal(logp_NT, token_logprobs(policy, rows, 0.7)[0])
    assert entropy_NT.shape == logp_NT.shape and not entropy_NT.any() and not entropy_NT.requires_grad


def test_the_head_runs_on_the_completions_own_tokens_only() -> None:
    policy = tiny_policy()
    with caught_logits(policy) as logits:
        token_logprobs(policy, random_rows(policy, (30, 40), (2, 3)))
    assert [chunk.shape[0] for chunk in logits] == [2 + 3]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_log_softmax_is_float32_under_autocast(precision: Any) -> None:
    policy = replace(tiny_policy(precision=precision), logit_chunk=0)
    rows = random_rows(policy)
    with caught_logits(policy) as logits:
        logp_NT, entropy_NT = token_logprobs(policy, rows, 0.7)
    assert logits[0].dtype == policy.precision.autocast_dtype  # the matrix products did run in half precision
    assert logp_NT.dtype == entropy_NT.dtype == torch.float32
    exact_MV = (logits[0].double() / 0.7).log_softmax(dim=-1)
    exact_M = exact_MV.gather(-1, own(rows.completion_NT, rows)[:, None]).squeeze(-1)
    torch.testing.assert_close(own(logp_NT, rows).double(), exact_M, rtol=0, atol=1e-5)


def test_scoring_leaves_the_rows_unchanged() -> None:
    policy = tiny_policy()
    rows = random_rows(policy)
    before = rows.ids_NL.clone(), rows.prompt_len_N.clone(), rows.completion_len_N.clone()
    token_logprobs(policy, rows, 0.5)[0].sum().backward()
    after = rows.ids_NL, rows.prompt_len_N, rows.completion_len_N
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_is_added_up_in_an_order_that_depends_on_the_threads(family: Family) -> None:
    """Indexing's backward pass adds with atomic operations where several threads run it, and the prompt's last token,
    from which all completions of a group begin, collects a sum: the bits would differ from run to run."""
    policy = tiny_policy(family)
    logp_NT, _ = token_logprobs(policy, random_rows(policy))
    seen, waiting = set(), [logp_NT.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [each for each, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert any(name.startswith("IndexSelect") for name in names)
    assert not [name for name in names if name.startswith(("IndexBackward", "IndexPut", "TakeBackward"))]
