"""The page and the real thing compute the same numbers: one is read, the other is run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.samples import Samples
from grpo_core import one_page
from grpo_core.step import grpo_step
from rewards import Reward
from sft_core.model.policy import Policy
from tests.drawn import samples_where, some_cut_off
from tests.helpers import (
    EXAMPLES,
    FAMILIES,
    Family,
    caught,
    ends_often,
    grpo_config,
    learner,
    relative_difference,
    tiny_policy,
    weights,
    with_samples,
)

# Relative to the largest number compared. float32 rounds at 6e-8, and the two add up some 60 tokens in another order:
# at most 60 roundings, mostly 2 to 20. Its weights are less spread than float64's, whose large logits multiply every
# rounding; there mistakes are visible, and the bound is a thousand roundings of 1e-16.
BOUNDS = {torch.float32: 4e-6, torch.float64: 1e-12}
SPREAD = {torch.float32: 0.1, torch.float64: 0.4}
BETA, MU, MICRO_BATCH = 0.1, 2, 3
CONFIG = grpo_config(group_size=3, beta=BETA, mu=MU, micro_batch=MICRO_BATCH, max_completion_tokens=8, lr=1e-2)

both_precisions = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "float64"])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's settings as those of CONFIG."""
    for name, value in {"beta": BETA, "mu": MU, "micro_batch": MICRO_BATCH, "G": 3, "lr": CONFIG.lr}.items():
        monkeypatch.setattr(one_page, name, value)


def drawn(policy: Policy) -> Samples:
    """Two groups of three completions of several lengths, some cut off, for prompts of unlike lengths."""
    return samples_where(some_cut_off, ends_often(policy), CONFIG, seed=3)


def as_page(samples: Samples) -> one_page.Rows:
    rows = samples.rows
    P = rows.prompt_width
    attention_NP = (torch.arange(P) >= P - rows.prompt_len_N[:, None]).long()
    mask_NT = rows.mask_NT.long()
    return rows.ids_NL, torch.cat([attention_NP, mask_NT], dim=1), mask_NT


def rewarded(samples: Samples) -> Tensor:
    return torch.tensor([len(text) % 7 / 4 for text in samples.texts], dtype=torch.float64).view(-1, 3)


def reward(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [len(text) % 7 / 4 for text in completions]


class Catcher:
    """An optimizer for the page that keeps each update's gradients and moves the weights by `lr` down them."""

    def __init__(self, model: Any, lr: float) -> None:
        self.model, self.lr, self.gradients = model, lr, []

    @torch.no_grad()
    def step(self) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
        for p in self.model.parameters():
            p -= self.lr * p.grad

    def zero_grad(self) -> None:
        self.model.zero_grad()


@both_precisions
@every_family
def test_loss_and_gradients_of_two_updates_are_those_of_the_real_step(
    family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_page, "max_grad_norm", float("inf"))
    policy = tiny_policy(family, dtype, initializer_range=SPREAD[dtype])
    samples, page_model = drawn(policy), copy.deepcopy(policy.model)

    parts = with_samples(caught(policy, CONFIG, reward, lr=0.01), samples)
    grpo_step(parts, EXAMPLES)
    catcher = Catcher(page_model, lr=0.01)
    losses = one_page.update(page_model, copy.deepcopy(page_model), catcher, as_page(samples), rewarded(samples))

    assert losses == pytest.approx(parts.optimizer.losses, rel=0, abs=BOUNDS[dtype])  # type: ignore[attr-defined]
    assert len(catcher.gradients) == MU
    for theirs, ours in zip(parts.optimizer.gradients, catcher.gradients, strict=True):  # type: ignore[attr-defined]
        assert relative_difference(theirs, ours) < BOUNDS[dtype]
    assert relative_difference(*catcher.gradients) > 1e-3  # the second update is another one


@both_precisions
@every_family
def test_the_weights_after_several_steps_of_adamw_are_those_of_the_real_step(
    family: Family, dtype: torch.dtype
) -> None:
    policy = tiny_policy(family, dtype, initializer_range=SPREAD[dtype])
    page_model, start = copy.deepcopy(policy.model), weights(policy)
    # A large epsilon: AdamW makes a full step of the rounding in a gradient that is 0 in theory (GPT-2's key biases).
    config = replace(CONFIG, lr_schedule="constant", adam_epsilon=1e-3)
    parts = learner(policy, config, reward)
    reference = copy.deepcopy(page_model)
    optimizer = torch.optim.AdamW(page_model.parameters(), lr=CONFIG.lr, eps=1e-3, weight_decay=0.0)

    for _ in range(2):
        samples = drawn(policy)
        grpo_step(with_samples(parts, samples), EXAMPLES)
        one_page.update(page_model, reference, optimizer, as_page(samples), rewarded(samples))

    ours = {name: p.detach() for name, p in page_model.named_parameters()}
    moved = {name: after - start[name] for name, after in weights(policy).items()}
    assert max(float(each.abs().max()) for each in moved.values()) > 0.01
    assert relative_difference(weights(policy), ours) < BOUNDS[dtype]


def test_the_page_draws_from_the_policy_and_marks_the_first_stop_token_as_the_last_to_learn() -> None:
    policy = tiny_policy()
    prompts = [[5, 6, 7, 8], [9], [4, 5]] * 20
    torch.manual_seed(0)
    ids_NL, attention_NL, mask_NT = one_page.sample(policy.model, policy.tokenizer, prompts)
    eos, T = policy.tokenizer.eos_token_id, mask_NT.shape[1]
    ended = 0
    for ids, attention, mask, prompt in zip(
        ids_NL.tolist(), attention_NL.tolist(), mask_NT.tolist(), prompts, strict=True
    ):
        assert ids[-T - len(prompt) : -T] == prompt
        assert attention[:-T] == [0] * (ids_NL.shape[1] - T - len(prompt)) + [1] * len(prompt)
        completion = ids[-T:]
        length = completion.index(eos) + 1 if eos in completion else T
        ended += eos in completion
        assert mask == attention[-T:] == [1] * length + [0] * (T - length)
    assert 0 < ended < len(prompts)


def test_the_page_ignores_the_models_own_sampling_settings() -> None:
    policy, prompts = tiny_policy(), [[5, 6, 7]] * 8
    torch.manual_seed(0)
    expected = one_page.sample(policy.model, policy.tokenizer, prompts)[0]
    policy.model.generation_config.update(top_k=1, repetition_penalty=5.0)
    torch.manual_seed(0)
    assert torch.equal(one_page.sample(policy.model, policy.tokenizer, prompts)[0], expected)


def test_a_step_of_the_page_rewards_each_row_by_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = tiny_policy(), {}

    def noting(model: Any, reference: Any, optimizer: Any, rows: one_page.Rows, reward_BG: Tensor) -> list[float]:
        seen["reward_BG"] = reward_BG
        return []

    monkeypatch.setattr(one_page, "update", noting)
    monkeypatch.setattr(one_page, "texts_of", lambda *_: ["#### 7", "#### 10", "7", "#### 7", "#### 10", "x"])
    mean, _ = one_page.step(policy.model, None, policy.tokenizer, None, EXAMPLES)
    assert seen["reward_BG"].tolist() == [[1, 0, 0], [0, 1, 0]] and mean == pytest.approx(1 / 3)


def test_the_page_is_short_and_imports_nothing_but_torch_transformers_reward_and_task() -> None:
    source = Path(one_page.__file__).read_text(encoding="utf-8")
    head, _, _ = source.partition('if __name__ == "__main__":')
    assert len(source.splitlines()) <= 200
    own = [
        line.split()[1] for line in head.splitlines() if line.startswith(("from rewards", "from sft_core", "from eval"))
    ]
    assert own == [
        "rewards",
        *(f"sft_core.text.{name}" for name in ("arithmetic", "config", "example", "prompts", "tasks")),
    ]
    assert "grpo_core" not in "".join(
        line for line in head.splitlines(keepends=True) if line.startswith(("from", "import"))
    )


def test_the_reward_that_the_tests_give_is_the_one_of_the_real_step() -> None:
    samples = drawn(tiny_policy())
    values = Reward("reward", reward).function(prompts=[""] * 6, completions=samples.texts)
    assert rewarded(samples).flatten().tolist() == values and len(set(values)) > 2
