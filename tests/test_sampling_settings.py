"""Sampling inherits no settings of the model, and puts back all that it changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import Family, ends_often, tiny_policy
from tests.test_sampling import EIGHT, families, seeded


def poison(model: Any) -> GenerationConfig:
    """Shipped generation settings that would each change the samples."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 300)),
        begin_suppress_tokens=list(range(3, 100)),
        forced_bos_token_id=11,
        forced_eos_token_id=12,
        bad_words_ids=[[301], [302]],
        min_new_tokens=7,
        eos_token_id=[13, 14],
        pad_token_id=15,
        max_new_tokens=3,
    )
    return model.generation_config


@families
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_models_own_generation_settings_are_not_inherited(family: Family, temperature: float) -> None:
    policy = ends_often(tiny_policy(family))
    sampling = replace(EIGHT, temperature=temperature)
    clean = seeded(policy, sampling)
    poison(policy.model)
    poisoned = seeded(policy, sampling)
    assert torch.equal(poisoned.rows.ids_NL, clean.rows.ids_NL)
    assert torch.equal(poisoned.rows.completion_len_N, clean.rows.completion_len_N)
    assert torch.equal(poisoned.logp_NT, clean.logp_NT)


def test_the_models_own_generation_settings_are_put_back() -> None:
    policy = tiny_policy()
    shipped = poison(policy.model)
    before = copy.deepcopy(shipped.to_dict())
    seeded(policy)
    assert policy.model.generation_config is shipped
    assert shipped.to_dict() == before


@pytest.mark.parametrize("training", [True, False])
def test_sampling_happens_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    policy = tiny_policy()
    policy.model.train(training)
    modes = []
    policy.model.register_forward_pre_hook(lambda module, _: modes.append([m.training for m in module.modules()]))
    seeded(policy)
    assert modes and not any(map(any, modes))
    assert all(m.training == training for m in policy.model.modules())


def test_a_failed_sampling_puts_mode_and_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    policy.model.train()
    shipped = policy.model.generation_config

    def fail(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(policy.model, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        seeded(policy)
    assert policy.model.training and policy.model.generation_config is shipped
