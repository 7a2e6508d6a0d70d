"""What `eval.sampling` claims: samples come from the very distribution that the learner scores, and end where they
end."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from eval.samples import Samples, Sampling, completion_lengths
from eval.sampling import sample
from sft_core.learn.logprobs import token_logprobs
from sft_core.model.policy import Policy
from tests.helpers import FAMILIES, Family, checkpoint_activations, ends_often, forward_calls, tiny_policy

families = pytest.mark.parametrize("family", FAMILIES)

PROMPTS = [[9, 40, 77], [51], [8, 30, 31, 32, 33, 90, 91], [60, 61]] * 2
EIGHT = Sampling(max_completion_tokens=8)


def seeded(policy: Policy, sampling: Sampling = EIGHT, prompts: list[list[int]] = PROMPTS, seed: int = 0) -> Samples:
    torch.manual_seed(seed)
    return sample(policy, prompts, sampling)


def test_a_completion_ends_with_its_first_end_of_sequence_id() -> None:
    lengths, ended = completion_lengths(torch.tensor([[5, 2, 6, 2], [5, 6, 7, 8], [5, 6, 7, 2]]), eos_ids=[2])
    assert lengths.tolist() == [2, 4, 4]
    assert ended.tolist() == [True, False, True]


def test_any_of_several_end_of_sequence_ids_ends_a_completion() -> None:
    lengths, ended = completion_lengths(torch.tensor([[5, 3, 2], [5, 2, 3], [4, 4, 4], [5, 5, 3]]), eos_ids=[2, 3])
    assert lengths.tolist() == [2, 2, 3, 3]
    assert ended.tolist() == [True, True, False, True]


def test_an_immediate_end_is_a_completion_of_one_token() -> None:
    lengths, ended = completion_lengths(torch.tensor([[2, 2, 2], [2, 5, 5]]), eos_ids=[2])
    assert lengths.tolist() == [1, 1]
    assert ended.tolist() == [True, True]


def test_measuring_lengths_leaves_the_ids_unchanged() -> None:
    ids = torch.tensor([[5, 2, 6], [2, 2, 2]])
    completion_lengths(ids, [2])
    assert ids.tolist() == [[5, 2, 6], [2, 2, 2]]


@families
def test_sampled_completions_stop_at_every_one_of_the_policys_stop_ids(family: Family) -> None:
    policy = ends_often(tiny_policy(family))
    samples = seeded(policy)
    stopped_by = set()
    for row, (ids, length) in enumerate(
        zip(samples.rows.completion_NT.tolist(), samples.rows.completion_len_N.tolist(), strict=True)
    ):
        assert not set(ids[: length - 1]) & set(policy.eos_ids)
        assert samples.truncated_N[row] == (ids[length - 1] not in policy.eos_ids)
        assert length == 8 or not samples.truncated_N[row]
        stopped_by |= {ids[length - 1]} & set(policy.eos_ids)
    assert len(stopped_by) > 2
    assert samples.rows.completion_len_N.unique().numel() > 2


def test_a_completion_of_nothing_but_its_stop_token_has_length_one() -> None:
    policy = tiny_policy()
    policy = replace(policy, eos_ids=tuple(range(len(policy.tokenizer))))
    samples = seeded(policy)
    assert samples.rows.completion_len_N.tolist() == [1] * len(PROMPTS)
    assert not samples.truncated_N.any()
    assert samples.logp_NT.isfinite().all() and samples.rows.mask_NT.all()


@families
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_sampler_records_the_logprob_that_the_learner_computes(family: Family, temperature: float) -> None:
    policy = ends_often(tiny_policy(family))
    samples = seeded(policy, replace(EIGHT, temperature=temperature))
    rows = samples.rows
    # Both kinds of padding are there to go wrong: left of the prompts, right of the completions.
    assert (rows.prompt_len_N < rows.prompt_width).any() and rows.prompt_len_N.min() == 1 and rows.prompt_width == 7
    assert not rows.mask_NT.all() and rows.completion_len_N.max() > 1
    learned_NT = token_logprobs(policy, samples.rows, temperature)[0]
    assert samples.logp_NT.shape == learned_NT.shape and samples.logp_NT.dtype == torch.float32
    torch.testing.assert_close(samples.logp_NT, learned_NT, rtol=0, atol=1e-5)
    assert (samples.logp_NT[~samples.rows.mask_NT] == 0).all()
    # At another temperature they differ, and so they do where the learner takes the left padding for tokens: the
    # comparison can fail.
    assert (samples.logp_NT - token_logprobs(policy, samples.rows, temperature + 0.1)[0]).abs().max() > 0.05
    unmasked = replace(rows, prompt_len_N=torch.full_like(rows.prompt_len_N, rows.prompt_width))
    padded_N = rows.prompt_len_N < rows.prompt_width
    assert (samples.logp_NT - token_logprobs(policy, unmasked, temperature)[0])[padded_N].abs().max() > 0.05


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}])
def test_the_sampler_records_logprobs_of_the_uncut_distribution(cut: dict[str, Any]) -> None:
    policy = tiny_policy()
    sampling = replace(EIGHT, temperature=0.7, **cut)
    samples = seeded(policy, sampling)
    assert not torch.equal(samples.rows.ids_NL, seeded(policy, replace(EIGHT, temperature=0.7)).rows.ids_NL)
    torch.testing.assert_close(samples.logp_NT, token_logprobs(policy, samples.rows, 0.7)[0], rtol=0, atol=1e-5)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    """The mean log-probability of many draws is minus the entropy; at 0.8 or 1.2 times the temperature it is not."""
    policy, draws = tiny_policy(), 4000
    samples = seeded(policy, Sampling(1, temperature=0.7), [PROMPTS[2]] * draws)
    with torch.no_grad():
        logp_NT, entropy_NT = token_logprobs(policy, samples.rows, 0.7)
        error = logp_NT.std() / draws**0.5
        assert (logp_NT.mean() + entropy_NT[0]).abs() < 4 * error
        for factor in (0.8, 1.2):
            logp_NT, entropy_NT = token_logprobs(policy, samples.rows, 0.7 * factor)
            assert (logp_NT.mean() + entropy_NT[0]).abs() > 8 * error


def test_tokens_are_drawn_from_the_whole_vocabulary() -> None:
    policy = tiny_policy(initializer_range=0.001)  # all tokens about equally likely
    drawn = seeded(policy, Sampling(1), [PROMPTS[0]] * 4000).rows.completion_NT
    assert drawn.unique().numel() > 0.95 * len(policy.tokenizer)


@families
def test_greedy_tokens_are_the_most_probable_with_any_padding(family: Family) -> None:
    policy = ends_often(tiny_policy(family))
    rows = sample(policy, PROMPTS, replace(EIGHT, temperature=0)).rows
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for token in rows.completion_NT[row, : rows.completion_len_N[row]].tolist():
            assert token == int(policy.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_a_greedy_sample_records_no_logprobs() -> None:
    assert sample(tiny_policy(), PROMPTS, replace(EIGHT, temperature=0)).logp_NT.numel() == 0


@families
def test_dropout_is_off_while_sampling(family: Family) -> None:
    dropout = {"attention_dropout": 0.5} if family == "qwen2" else {"resid_pdrop": 0.5, "attn_pdrop": 0.5}
    with_dropout, without = tiny_policy(family, **dropout), tiny_policy(family)
    with_dropout.model.train()
    assert torch.equal(seeded(with_dropout).rows.ids_NL, seeded(without).rows.ids_NL)


@families
def test_gradient_checkpointing_leaves_the_cache_on(family: Family) -> None:
    policy = replace(tiny_policy(family), prefill=False)
    checkpoint_activations(policy)
    policy.model.train()
    with forward_calls(policy.model) as calls:
        samples = seeded(policy)
    widths = [call["input_ids"].shape[1] for call in calls]
    assert widths == [7] + [1] * (samples.rows.completion_NT.shape[1] - 1)


@families
def test_gradient_checkpointing_changes_no_sample(family: Family) -> None:
    """Checkpointed layers in train mode hand no keys and values on: each token would see itself alone."""
    policy, checkpointed = tiny_policy(family), tiny_policy(family)
    checkpoint_activations(checkpointed)
    checkpointed.model.train()
    assert torch.equal(seeded(checkpointed).rows.ids_NL, seeded(policy).rows.ids_NL)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_the_sampler_computes_in_the_learners_precision(precision: Any) -> None:
    policy = tiny_policy(precision=precision)
    seen = []
    head = policy.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    rows = seeded(policy).rows
    sampled, seen[:] = set(seen), []
    token_logprobs(policy, rows)
    assert sampled == set(seen) == {policy.precision.autocast_dtype or torch.float32}


def test_one_prompt_and_one_token_are_enough() -> None:
    samples = seeded(tiny_policy(), Sampling(1), [[9]])
    assert samples.rows.ids_NL.shape == (1, 2) and samples.logp_NT.shape == (1, 1)
    assert samples.rows.completion_len_N.tolist() == [1]


def test_texts_hold_the_completions_own_ordinary_tokens_in_order() -> None:
    policy = replace(ends_often(tiny_policy()), pad_id=77)  # an ordinary id, so that padding would be readable
    samples = seeded(policy)
    for text, row, length in zip(
        samples.texts, samples.rows.completion_NT.tolist(), samples.rows.completion_len_N.tolist(), strict=True
    ):
        assert text == policy.tokenizer.decode([token for token in row[:length] if token > 2])  # 0-2 are special
    assert len(set(samples.texts)) > 1


def test_the_rows_hold_the_very_ids_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(ends_often(tiny_policy()), rows_leave=False)
    generate, drawn = policy.model.generate, []

    def watched(**kwargs: Any) -> Any:
        drawn.append(generate(**kwargs))
        return drawn[0]

    monkeypatch.setattr(policy.model, "generate", watched)
    samples = seeded(policy)
    assert len(drawn) == 1 and torch.equal(samples.rows.ids_NL, drawn[0])
    own = [ids[:length] for ids, length in zip(drawn[0][:, 7:].tolist(), samples.rows.completion_len_N, strict=True)]
    reread = policy.tokenizer(samples.texts, add_special_tokens=False)["input_ids"]
    # Their text, tokenized again, is something else, so the assertion above can fail.
    assert any(again not in (ids, ids[:-1]) for again, ids in zip(reread, own, strict=True))


def test_rows_keep_the_prompts_and_their_order() -> None:
    policy = tiny_policy()
    samples = seeded(policy)
    P = samples.rows.prompt_width
    prompts = [
        row[P - int(n) : P].tolist() for row, n in zip(samples.rows.ids_NL, samples.rows.prompt_len_N, strict=True)
    ]
    assert prompts == PROMPTS


def test_samples_can_be_saved_for_a_backward_pass() -> None:
    samples = seeded(tiny_policy())
    rows = samples.rows
    tensors = [rows.ids_NL, rows.prompt_len_N, rows.completion_len_N, samples.logp_NT, samples.truncated_N]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_sampling_leaves_the_prompts_unchanged() -> None:
    prompts = copy.deepcopy(PROMPTS)
    seeded(tiny_policy(), prompts=prompts)
    assert prompts == PROMPTS
