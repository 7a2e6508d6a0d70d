"""Families of models that differ in kind are trained as they are; all of them: `python -m benchmarks.families`."""

from __future__ import annotations

import pytest

import benchmarks.families.judge
from benchmarks.families.__main__ import main, row, summary
from benchmarks.families.build import small_config, small_model
from benchmarks.families.judge import BOUND, Verdict, judged

RECURRENT = ["segments", "packing", "prefill", "leaving"]
KINDS = {  # what is without which shortcuts
    "llama": [],
    "gpt2": [],  # learned positions
    "granite": [],  # a scale behind the head that is known
    "cohere": ["head"],  # one that is not
    "gptj": ["segments", "packing"],
    "bloom": ["segments", "packing"],  # ALiBi
    "mixtral": ["prefill", "leaving"],  # mixture of experts; sliding windows, as here, are no obstacle to segments
    "deepseek_v3": [],  # latent attention, mixture of experts
    "gemma2": RECURRENT,  # a cap within attention, which has a function of its own; sliding windows
    "qwen3_5_text": RECURRENT,  # linear attention
    "lfm2": RECURRENT,  # convolutions
    "mamba": RECURRENT,  # state space
    "jamba": RECURRENT,  # state space, attention and experts
    "recurrent_gemma": ["segments", "packing", "head", "prefill", "leaving", "padding"],  # its state reads padding
    "rwkv": [*RECURRENT, "padding", "cache"],
}
OLDER = {"gemma2": ["prefill", "leaving"]}  # transformers 5.10 gave it another attention function


def skip_where_libraries_are_older(verdict: Verdict) -> None:
    """Of constraints-oldest.txt: torch multiplies a mixture of experts on CUDA only, transformers writes and reads
    Nemotron-H's configuration in two ways."""
    for fault in ("grouped_mm", "Must be one of: {"):
        if fault in verdict.unbuilt:
            pytest.skip(f"these versions of the libraries cannot build this family: {fault}")


@pytest.mark.parametrize("family", KINDS)
def test_a_family_of_each_kind_is_sampled_from_and_learned_from_as_it_is(family: str) -> None:
    verdict = judged(family, run=False)
    skip_where_libraries_are_older(verdict)
    assert verdict.kind == "right", verdict
    assert verdict.off in (KINDS[family], OLDER.get(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "llama4_text"])
def test_two_steps_of_the_program_with_all_weights_and_with_an_adapter(family: str) -> None:
    verdict = judged(family)
    skip_where_libraries_are_older(verdict)
    assert verdict.kind == "right" and verdict.kl > 0 and max(verdict.full, verdict.lora) <= BOUND, verdict


def test_a_shortcut_that_is_wrong_and_stays_on_makes_a_family_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.families.judge, "trusted", lambda policy: policy)
    verdict = judged("cohere", run=False)
    assert verdict.kind == "WRONG" and verdict.learner > 0.1 and verdict.gradient > 0.1
    assert verdict.sampler <= BOUND  # `generate` takes the whole model


def test_what_cannot_be_built_or_breaks_or_is_refused_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged("musicgen", run=False).kind == "not built"
    monkeypatch.setattr(benchmarks.families.judge, "trusted", lambda policy: 1 / 0)
    assert judged("llama", run=False).kind == "BROKEN"
    assert row(Verdict("x", refused="a | b")) == ["x", "refused", "a / b"]
    assert summary([Verdict("x", refused="no"), Verdict("y")]) == "2 families: 1 refused, 1 WRONG."


@pytest.mark.filterwarnings("ignore")
def test_small_models_have_opinions_and_keep_their_kind() -> None:
    config = small_config("qwen3_5_text", 375, {"eos_token_id": 2, "pad_token_id": 0})
    assert set(config.layer_types) == {"linear_attention", "full_attention"} and config.vocab_size == 375
    assert float(small_model(config).lm_head.weight.std()) > 0.1


def test_a_family_that_nobody_knows_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["qwen2", "qwen99"])
    assert caught.value.code == 2 and "qwen99: not among" in capsys.readouterr().err
