"""Supervised fine-tuning: what is learned, what is not, and what a run leaves behind."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from sft_core.job import SFTConfig
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.text.arithmetic import ArithmeticStream
from sft_core.text.example import Example, as_example
from sft_core.train import encode_demonstrations, heldout_loss, sft_step
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    GradientCatcher,
    largest_difference,
    random_rows,
    tiny_policy,
)

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


def sft_config(**fields: Any) -> SFTConfig:
    bare = {"prompt_format": "hash", "system_prompt": "", "precision": "float32", "device": "cpu"}
    return SFTConfig(**({"model": "tiny"} | bare | fields))


def problems(count: int) -> list[Example]:
    stream = ArithmeticStream("train", seed=0, difficulty=3)
    return [as_example(stream[i], "") for i in range(count)]


# --- the loss


def nll_by_hand(policy: Policy, rows: Rows) -> torch.Tensor:
    """Mean negative log-probability of the completions' tokens, one unpadded row at a time, without the project's code
    for rows and log-probabilities."""
    total, tokens = torch.zeros(()), 0
    for row in range(len(rows)):
        P, T = int(rows.prompt_len_N[row]), int(rows.completion_len_N[row])
        ids_L = rows.ids_NL[row, rows.prompt_width - P : rows.prompt_width + T]
        logp_LV = policy.model(ids_L[None]).logits[0].log_softmax(dim=-1)
        for t in range(P, P + T):  # the token at t is predicted at t - 1; tokens before P are the prompt's
            total = total - logp_LV[t - 1, ids_L[t]]
        tokens += T
    return total / tokens


def learned(policy: Policy, rows: Rows, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step."""
    policy.model.train()
    catcher = GradientCatcher(policy, micro_batch)
    record = sft_step(policy, catcher, rows)  # type: ignore[arg-type]
    assert record["loss"] == pytest.approx(catcher.losses[0], abs=1e-6)
    return record["loss"], catcher.gradients[0]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_loss_is_the_mean_nll_of_the_completions_tokens_and_of_no_others(family: Any) -> None:
    policy = tiny_policy(family)
    rows = random_rows(policy)
    expected = nll_by_hand(policy, rows)
    expected.backward()
    by_hand = {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}
    policy.model.zero_grad()
    loss, gradient = learned(policy, rows, micro_batch=8)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(gradient, by_hand) < 1e-5


def test_the_stop_token_is_trained_even_where_it_pads() -> None:
    policy = tiny_policy("gpt2")  # pads with its end-of-sequence token
    assert policy.pad_id == policy.eos_ids[0]
    rows = pack_rows([[7, 8, 9], [7, 8]], [[policy.eos_ids[0]], [10, 11, policy.eos_ids[0]]], policy.pad_id)
    before = nll_by_hand(policy, pack_rows([[7, 8, 9]], [[policy.eos_ids[0]]], policy.pad_id)).item()
    assert learned(policy, rows, 8)[0] == pytest.approx(nll_by_hand(policy, rows).item(), rel=1e-5)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        _, gradient = learned(policy, rows, 8)
        for name, p in policy.trainable():
            p.grad = gradient[name]
        optimizer.step()
    after = nll_by_hand(policy, pack_rows([[7, 8, 9]], [[policy.eos_ids[0]]], policy.pad_id)).item()
    assert after < before - 0.1


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_micro_batches_leave_loss_and_gradient_unchanged(micro_batch: int) -> None:
    policy = tiny_policy()
    rows = random_rows(policy, prompt_lengths=(4, 7, 2, 9, 3), completion_lengths=(5, 1, 8, 2, 12))
    whole_loss, whole = learned(policy, rows, micro_batch=5)
    loss, gradient = learned(policy, rows, micro_batch)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert largest_difference(gradient, whole) < 1e-5


def test_held_out_loss_is_the_same_mean_and_leaves_the_model_as_it_was() -> None:
    policy = tiny_policy()
    policy.model.train()
    config = sft_config(micro_batch=1)
    expected = nll_by_hand(policy, encode_demonstrations(policy, EXAMPLES, config)).item()
    assert heldout_loss(policy, EXAMPLES, config, 2) == pytest.approx(expected, rel=1e-5)
    assert policy.model.training and all(p.grad is None for p in policy.model.parameters())


# --- the demonstrations


def texts(policy: Policy, rows: Rows) -> list[str]:
    lengths = rows.completion_len_N.tolist()
    return [policy.tokenizer.decode(ids[:n]) for ids, n in zip(rows.completion_NT.tolist(), lengths, strict=True)]


def test_a_row_is_the_prompt_and_the_demonstration_with_its_stop_token() -> None:
    policy = tiny_policy()
    rows = encode_demonstrations(policy, EXAMPLES, sft_config())
    assert texts(policy, rows) == ["3+4=7\n#### 7<|im_end|>", "#### 10<|im_end|>"]
    prompts = [
        policy.tokenizer.decode(row[rows.prompt_width - n : rows.prompt_width])
        for row, n in zip(rows.ids_NL.tolist(), rows.prompt_len_N.tolist(), strict=True)
    ]
    assert prompts == [f"<|im_start|>user\n{e.question}<|im_end|>\n<|im_start|>assistant\n" for e in EXAMPLES]


def test_a_careless_teacher_slips_in_the_share_of_the_lines_and_goes_on_from_the_slip() -> None:
    policy = tiny_policy()
    examples = problems(300)
    shown = texts(policy, encode_demonstrations(policy, examples, sft_config(slips=0.6)))
    lines = slipped = 0
    for text in shown:
        *working, final = text.removesuffix("<|im_end|>").split("\n")
        result = None
        for line in working:
            before, sign, step, after = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()  # type: ignore[union-attr]
            assert result in (None, before)  # the line before it, right or wrong
            right = int(before) + int(sign + step)
            assert int(after) - right in (0, 1)
            lines, slipped, result = lines + 1, slipped + int(after) - right, after
        assert final == f"#### {result}"
    assert abs(slipped / lines - 0.6) <= 4 * math.sqrt(0.24 / lines)
    assert texts(policy, encode_demonstrations(policy, examples, sft_config(slips=0.0))) != shown
    again = texts(policy, encode_demonstrations(policy, examples[::-1], sft_config(slips=0.6)))
    assert again[::-1] == shown  # by the problem, not by a random draw


def test_a_demonstration_over_the_budget_is_cut_and_teaches_no_end() -> None:
    policy = tiny_policy()
    rows = encode_demonstrations(policy, EXAMPLES, sft_config(max_completion_tokens=4))
    assert rows.completion_len_N.tolist() == [4, 4]
    assert not any("<|im_end|>" in text for text in texts(policy, rows))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_worked_share_of_the_demonstrations_is_worked_and_the_same_ones_every_time(share: float) -> None:
    policy = tiny_policy()
    examples = problems(600)
    shown = texts(policy, encode_demonstrations(policy, examples, sft_config(worked_share=share)))
    worked = [text.partition("####")[0].strip() != "" for text in shown]
    # Four standard deviations of a binomial share around it; exact at the ends.
    assert abs(sum(worked) / 600 - share) <= 4 * math.sqrt(share * (1 - share) / 600)
    backwards = texts(policy, encode_demonstrations(policy, examples[::-1], sft_config(worked_share=share)))
    assert backwards[::-1] == shown  # by the question, not by the place in the batch or a random draw
    assert all(text.endswith(f"#### {e.answer}<|im_end|>") for text, e in zip(shown, examples, strict=True))
