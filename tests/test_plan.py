"""The memory forecast: its arithmetic by hand, its activations counted in autograd, its peak against a real process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan.question import alternatives, answer, question_of, savings
from benchmarks.workload import workload
from grpo_core.config import GRPOConfig
from grpo_core.forecast.memory import batches_of, plan
from grpo_core.forecast.traffic import sent
from sft_core.config import ModelConfig
from sft_core.learn.footprint import GB, Batch, Lengths, kept_bytes
from sft_core.learn.layout import rows_of_group
from sft_core.learn.offload import PIECE
from sft_core.model.shapes import Shapes
from sft_core.model.source import Source, find_source
from sft_core.model.tiny import build_tiny
from tests.helpers import PEFT_IS_BEHIND, SHARED

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

REAL_QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"

# A model of round numbers: 2 layers of 700, embedding and head of 10,000 (one tensor), norms of 100.
ROUND = Shapes(
    trained=(10_000, 300, 400, 300, 400, 100),
    base=11_500,
    adapter=0,
    head=10_000,
    tied=True,
    vocab=1000,
    hidden=10,
    layers=2,
    layer=700,
    heads=2,
    queries=10,
    keys=5,
    inner=40,
    gated=True,
    rms=True,
    head_norms=False,
    packs=True,
)
ADAPTED = replace(ROUND, trained=(60, 40), adapter=100)
LENGTHS = Lengths(prompt=6, completion=4)


def small(**values: Any) -> GRPOConfig:
    """2 prompts of 4 completions, learned 4 at a time; no evaluation."""
    given: dict[str, Any] = {"prompts_per_step": 2, "group_size": 4, "micro_batch": 4, "eval_problems": 0, **values}
    return GRPOConfig(**given)


def moment(
    name: str, shapes: Shapes = ROUND, half: bool = False, kind: str = "none", **values: Any
) -> dict[str, float]:
    """The items of one moment, in bytes; a device of kind "none" has no process."""
    return plan(small(**values), shapes, half, kind, LENGTHS).moments[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


def source_of(folder: Path, *overrides: str) -> tuple[ModelConfig, Source]:
    config = ModelConfig(model=str(folder), from_scratch=True, config_overrides=list(overrides))
    return config, find_source(config)


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_peak_is_the_largest_moment_and_its_items_add_up_to_it(half: bool, beta: float) -> None:
    forecast = plan(small(beta=beta, eval_problems=8), ROUND, half, "cpu", LENGTHS)
    sums = {name: sum(items.values()) for name, items in forecast.moments.items()}
    assert forecast.peak == max(sums.values()) == sums[forecast.worst] == sum(forecast.items.values())
    assert all(size >= 0 for items in forecast.moments.values() for size in items.values())


def test_weights_moments_and_gradients_are_16_bytes_a_weight_in_full_fine_tuning() -> None:
    items = moment("the update")
    assert items == {"process": 0, "weights": 4 * 11_500, "AdamW": 8 * 11_500, "gradients": 4 * 11_500}


def test_with_lora_only_the_adapter_has_moments_and_gradients() -> None:
    items = moment("the update", ADAPTED)
    assert items == {"process": 0, "weights": 4 * 11_600, "AdamW": 800, "gradients": 400}
    assert moment("the embedding's gradient", ADAPTED)["head and embedding"] == 0


@pytest.mark.parametrize(
    ("values", "shapes", "half", "expected"),
    [
        ({}, ROUND, False, 4 * 11_500),
        ({}, ROUND, True, 4 * 11_500 - 2 * 1400),  # the layers' matrices; a tied head stays as it is
        ({}, replace(ROUND, tied=False), True, 4 * 11_500 - 2 * 11_400),
        ({"half_copies": False}, ROUND, True, 4 * 11_500),
        ({"ref_sync_every": 5}, ROUND, True, 4 * 11_500),
        ({}, ADAPTED, True, 4 * 100),  # a second adapter on the same base
    ],
)
def test_the_reference_costs_what_it_holds(values: dict[str, Any], shapes: Shapes, half: bool, expected: int) -> None:
    without = moment("the update", shapes, half, beta=0.0)
    with_it = moment("the update", shapes, half, beta=0.1, **values)
    assert with_it["reference"] == sum(with_it.values()) - sum(without.values()) == expected


def test_offloaded_moments_come_one_piece_at_a_time_beside_the_gradients(tmp_path: Path) -> None:
    assert "AdamW" not in moment("sampling", offload_optimizer=str(tmp_path))
    items = moment("the update", offload_optimizer=str(tmp_path))
    assert (items["gradients"], items["AdamW"]) == (4 * 11_500, 8 * 10_000)
    large = replace(ROUND, trained=(10 * PIECE, 1000))
    assert moment("the update", large, offload_optimizer=str(tmp_path))["AdamW"] == 8 * PIECE


def test_a_cpus_own_memory_is_no_place_to_offload_to() -> None:
    assert moment("the update", kind="cpu", offload_optimizer="cpu")["AdamW"] == 8 * 11_500
    assert moment("the update", kind="cuda", offload_optimizer="cpu")["AdamW"] == 8 * 10_000


@pytest.mark.parametrize(
    ("values", "shapes", "half", "expected"),
    [
        ({}, ADAPTED, False, 4 * 11_600),
        ({}, ADAPTED, True, 4 * 11_600 - 2 * 1400),  # frozen matrices; a tied head stays with its embedding
        ({}, replace(ADAPTED, tied=False), True, 4 * 11_600 - 2 * 11_400),
        ({"half_copies": False}, ADAPTED, True, 4 * 11_600),
        ({"use_4bit": True}, ADAPTED, True, 4 * 11_600 - 3.484 * 1400),
        ({}, ROUND, True, 4 * 11_500),  # masters
    ],
)
def test_below_an_adapter_weights_need_no_masters(
    values: dict[str, Any], shapes: Shapes, half: bool, expected: float
) -> None:
    assert moment("the update", shapes, half, **values)["weights"] == pytest.approx(expected)


def test_the_twin_is_two_bytes_a_matrix_weight_and_there_while_sampling_only() -> None:
    assert moment("sampling", ADAPTED, half=True)["half-precision twin"] == 2 * (100 + 10_000)  # the rest is halved
    assert moment("sampling", half=True)["half-precision twin"] == 2 * (2 * 700 + 10_000)
    assert moment("sampling", half=False)["half-precision twin"] == 0
    others = {name: items for name, items in plan(small(), ROUND, True, "cpu", LENGTHS).moments.items()}
    assert [name for name, items in others.items() if "half-precision twin" in items] == ["sampling"]
    assert "gradients" not in others["sampling"]


def test_keys_and_values_are_8_bytes_a_row_token_layer_and_width() -> None:
    assert moment("sampling")["keys and values"] == 8 * 8 * (6 + 4) * 2 * 5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # A group's prompt once, 6 + 4 * 4; as keys it is there for itself and for each completion, 6 + 4 * (6 + 4).
        ({}, [(22, 22, 46, 178), (22, 22, 46, 178)]),
        ({"micro_batch": 8}, [(44, 44, 92, 356)]),
        ({"micro_batch": 3}, [(18, 18, 36, 138), (24, 24, 42, 156), (14, 14, 26, 98)]),  # one goes across two groups
        ({"micro_batch": 3, "share_prompts": False}, [(30, 30, 30, 150), (30, 30, 30, 150), (20, 20, 20, 100)]),
    ],
)
def test_micro_batches_are_packed_as_the_learner_packs_them(
    values: Any, expected: list[tuple[int, int, int, float]]
) -> None:
    batches = batches_of(small(**values), ROUND, LENGTHS)
    assert [(batch.tokens, batch.queries, batch.keys, batch.pairs) for batch in batches] == expected
    assert sum(batch.predicted for batch in batches) == 8 * 4


@pytest.mark.parametrize("lengths", [Lengths(6, 4), Lengths(40, 4), Lengths(40, 1000)])
def test_attention_is_planned_for_the_rows_that_the_learner_cuts(lengths: Lengths) -> None:
    P, T, G = lengths.prompt, lengths.completion, 3
    rows = rows_of_group(range(P), [range(P + n * T, P + (n + 1) * T) for n in range(G)], 512)
    batch = Batch.of(1, G, lengths, shared=True)
    assert batch.queries == sum(len(row.places) - row.before for row in rows)
    assert batch.keys == sum(len(row.places) for row in rows)
    assert batch.masked == sum(row.pairs for row in rows if row.before)
    assert batch.pairs == sum(row.pairs / (1 if row.before else 2) for row in rows)


def test_checkpointing_keeps_the_stream_alone() -> None:
    batch = Batch.of(1, 4, LENGTHS, shared=True)
    assert kept_bytes(small(gradient_checkpointing=True), ROUND, False, batch) == 2 * 22 * 4 * 10
    # float32: four of the norms' tensors, two shared inputs, the result, four of the MLP's; in attention queries,
    # result and log-sum-exps, keys and values with the prompt in each row, and a mask.
    assert kept_bytes(small(), ROUND, False, batch) == 2 * 4 * (
        22 * (40 + 20 + 10 + 160) + 22 * (20 + 2) + 46 * 2 * ROUND.keys + 4 * 4 * (6 + 4)
    )


def test_logits_are_counted_by_the_chunk() -> None:
    whole = moment("the head's backward pass", logit_chunk=0)["logits"]
    half_of_it = moment("the head's backward pass", logit_chunk=8 * 1000)["logits"]
    assert whole == 12 * 16 * 1000
    assert half_of_it == 12 * 8 * 1000


def test_a_tied_embeddings_gradient_waits_for_the_heads_and_for_earlier_micro_batches() -> None:
    def extra(shapes: Shapes, micro_batch: int) -> float:
        return moment("the embedding's gradient", shapes, micro_batch=micro_batch)["head and embedding"]

    untied = replace(ROUND, tied=False)
    assert [extra(ROUND, 8), extra(ROUND, 4), extra(untied, 8), extra(untied, 4)] == [40_000, 80_000, 0, 40_000]


def test_freed_memory_that_a_cpu_keeps_is_an_allowance_of_its_own() -> None:
    def allowed(shapes: Shapes = ROUND, **values: Any) -> float:
        return moment("the update", shapes, kind="cpu", **values).get("kept when freed", 0.0)

    assert allowed(micro_batch=8) == 3 * 4 * 32 * 1000
    assert allowed(micro_batch=8, logit_chunk=5000) == 3 * 4 * 5 * 1000
    assert allowed(micro_batch=4) == 3 * 4 * 16 * 1000 + 3 * 4 * 10_000
    assert allowed(ADAPTED, micro_batch=4) == 3 * 4 * 16 * 1000
    assert allowed(keep_freed_memory=False) == 0
    assert "kept when freed" not in moment("the update", kind="cuda")


def test_each_flag_that_is_named_saves_what_it_says_and_none_is_named_that_does_not(folder: Path) -> None:
    wide = ["--config_overrides", "hidden_size=512", "vocab_size=100000", "intermediate_size=2048"]
    config = workload("qwen-0.5b", ["--model", str(folder), *wide, "--gradient_checkpointing", "False", "--device=cpu"])
    question = question_of(config, "l4", 0, 0)
    found = {flags: (saved, left) for flags, saved, left in savings(question)}
    assert {"--beta 0", "--offload_optimizer cpu", "--lora"} <= set(found)
    for flags, changed in alternatives(config, "cuda"):
        left = replace(question, config=changed).plan.peak
        if flags in found:
            assert found[flags] == (question.plan.peak - left, left)
            assert found[flags][0] >= 0.05 * GB
        else:
            assert question.plan.peak - left < 0.05 * GB
    shapes = question.shapes
    layers = shapes.layers * shapes.layer
    assert found["--beta 0"][0] == 4 * shapes.base - 2 * layers
    assert found["--offload_optimizer cpu"][0] == 8 * shapes.base
    assert "--lora" in answer(question)


# ------------------------------------------------------------------------------------------------------ several ranks


def test_ranks_share_rows_and_under_fsdp_what_lasts() -> None:
    def moments(parallel: str, ranks: int) -> dict[str, dict[str, float]]:
        config = small(parallel=parallel, beta=0.1)
        return plan(config, ROUND, True, "none", LENGTHS, None, ranks).moments

    alone, ddp, fsdp = moments("ddp", 1), moments("ddp", 2), moments("fsdp", 2)
    for lasting in ("weights", "AdamW", "reference"):
        assert ddp["the update"][lasting] == alone["the update"][lasting] == 2 * fsdp["the update"][lasting]
    assert ddp["sampling"]["keys and values"] == alone["sampling"]["keys and values"] / 2
    # 11,500 weights: 2 layers of 700 and 10,100 around them. Sampling, under autocast: the matrices have a half twin.
    assert fsdp["sampling"]["gathered"] == 4 * (11_500 - 2 * 700)
    assert fsdp["the start"] == {"process": 0.0, "weights": 4 * 11_500}
    assert fsdp["the reference's pass"]["gathered"] == pytest.approx(4 * 11_500)
    # A layer's gradients and those around the layers exist whole before they are added up.
    assert fsdp["the layers' backward pass"]["gathered"] == pytest.approx(4 * 11_500 + 4 * (10_100 + 700))
    assert fsdp["the update"]["gathered"] == 0
    assert moments("fsdp", 1) == alone


def test_what_ranks_send_in_a_step() -> None:
    two = batches_of(small(), ROUND, LENGTHS)  # micro-batches
    assert len(two) == 2
    assert sent(small(parallel="ddp"), ROUND, two, 1) == 0
    assert sent(small(parallel="ddp"), ROUND, two, 4) == 3 / 4 * 2 * 4 * 11_500
    assert sent(small(parallel="ddp", mu=3), ROUND, two, 4) == 3 * 3 / 4 * 2 * 4 * 11_500
    # Each micro-batch: weights forward and backward, gradients once. And once for the sampler.
    assert sent(small(parallel="fsdp"), ROUND, two, 4) == 3 / 4 * 4 * 11_500 * (2 * 3 + 1)
    assert sent(small(parallel="fsdp", beta=0.1), ROUND, two, 4) == 3 / 4 * 4 * 11_500 * (2 * 3 + 1 + 2)
    assert sent(small(parallel="fsdp"), ADAPTED, two, 4) == 3 / 4 * 4 * (2 * (2 * 11_600 + 100) + 11_600)
