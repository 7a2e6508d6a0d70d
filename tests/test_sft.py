"""Supervised fine-tuning: what is learned, what is not, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_core.train
from sft_core.job import SFTConfig
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.model.tiny import build_tiny
from sft_core.text.arithmetic import ArithmeticStream
from sft_core.text.tasks import Example, as_example
from sft_core.train import encode_demonstrations, heldout_loss, main, sft_step
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    GradientCatcher,
    largest_difference,
    random_rows,
    tiny_policy,
    tokenizer,
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
    assert heldout_loss(policy, EXAMPLES, config) == pytest.approx(expected, rel=1e-5)
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


# --- a run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model folder."""
    return build_tiny(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """The policies that runs in this test trained, as they are in memory."""
    kept: list[Policy] = []
    load = sft_core.train.load_policy

    def keeping(*args: Any, **kwargs: Any) -> Policy:
        kept.append(load(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(sft_core.train, "load_policy", keeping)
    return kept


def run(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """`python -m sft_core.train`, small; the lines of its log."""
    small = ["--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
    small += ["--max_completion_tokens", "48", "--lr", "2e-3", "--batch_size", "8", "--eval_problems", "8"]
    small += ["--precision", "float32", "--device", "cpu", "--no_progress", "--no_tensorboard"]
    main([*small, "--output_dir", str(folder), *flags])
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def jsonl(path: Path, count: int) -> Path:
    rows = [{"question": e.question, "answer": e.solution} for e in problems(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def test_a_short_run_lowers_the_held_out_loss(tmp_path: Path, base: Path) -> None:
    flags = ["--model", str(base), "--task", "arithmetic", "--max_steps", "24", "--eval_every", "8"]
    log = run(tmp_path / "run", *flags)
    losses = [line["heldout_loss"] for line in log if line["kind"] == "eval"]
    assert [line["step"] for line in log if line["kind"] == "eval"] == [8, 16, 24]
    assert losses[0] > losses[1] > losses[2] and losses[2] < losses[0] - 0.5
    train = [line for line in log if line["kind"] == "train"]
    assert train[0]["loss"] == pytest.approx(math.log(len(tokenizer())), abs=0.3)  # untrained: nearly uniform
    assert all(line["tokens"] > 0 and line["time_per_step_s"] > 0 and line["grad_norm"] > 0 for line in train)


def test_the_final_folder_opens_with_plain_transformers_and_is_the_trained_model(
    tmp_path: Path, base: Path, policies: list[Policy], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", "--model", str(base), "--task", "arithmetic", "--max_steps", "2")
    final = tmp_path / "run" / "final"
    assert f"final model: {final}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(policies[0].model))
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))
    tok = AutoTokenizer.from_pretrained(final)
    text = "Tom has 3 apples. 3+4=7\n#### 7<|im_end|>"
    assert tok(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert tok.eos_token_id == tokenizer().eos_token_id and tok.chat_template == tokenizer().chat_template
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "final",
        "log.jsonl",
        "provenance.json",
    ]


def test_a_lora_run_leaves_an_adapter_that_opens_with_plain_peft(
    tmp_path: Path, base: Path, policies: list[Policy]
) -> None:
    peft = pytest.importorskip("peft")
    flags = ["--model", str(base), "--task", "arithmetic", "--max_steps", "2", "--lora", "--lora_r", "4"]
    run(tmp_path / "run", *flags)
    assert all("lora_" in name for name, _ in policies[0].trainable())
    final = tmp_path / "run" / "final"
    untouched = AutoModelForCausalLM.from_pretrained(base)
    start = logits(untouched)
    model = peft.PeftModel.from_pretrained(untouched, final)
    assert torch.equal(logits(model), logits(policies[0].model))
    assert not torch.allclose(logits(model), start)
    assert AutoTokenizer.from_pretrained(final).chat_template == tokenizer().chat_template
    assert not (final / "model.safetensors").exists()  # megabytes, not the base model again


def test_an_adapter_is_trained_further_where_it_left_off(
    tmp_path: Path, base: Path, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "arithmetic", "--max_steps", "4"]
    first = run(tmp_path / "first", "--model", str(base), *flags, "--lora", "--lora_r", "4", "--lr", "0.02")
    further = run(tmp_path / "further", "--model", "first/final", *flags, "--lr", "1e-9")
    assert all("lora_" in name for name, _ in policies[1].trainable()) and policies[1].trainable()
    # The held-out loss after four steps that hardly move is the one that the first run ended with.
    assert further[-1]["heldout_loss"] == pytest.approx(first[-1]["heldout_loss"], rel=1e-5)
    assert further[0]["grad_norm"] > 0


def test_the_built_in_lora_run_keeps_its_base_model_beside_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run(tmp_path / "run", "--model", "tiny", "--task", "arithmetic", "--max_steps", "1", "--lora")
    final = tmp_path / "run" / "final"
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == tmp_path / "run" / "base"
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), final)


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(
    tmp_path: Path, base: Path, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", str(base), "--task", "arithmetic", "--max_steps", "2"]
    forwards: list[int] = []
    load = sft_core.train.load_policy

    def counted(*args: Any, **kwargs: Any) -> Policy:
        policy = load(*args, **kwargs)
        forwards.append(0)

        def count(*_: Any) -> None:
            forwards[-1] += torch.is_grad_enabled()  # not the evaluation's

        policy.model.model.layers[0].mlp.register_forward_pre_hook(count)
        return policy

    monkeypatch.setattr(sft_core.train, "load_policy", counted)
    plain = run(tmp_path / "plain", *flags)
    saving = run(tmp_path / "saving", *flags, "--gradient_checkpointing")
    assert forwards == [2, 4]
    losses = [[line["loss"] for line in log if line["kind"] == "train"] for log in (plain, saving)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(logits(policies[0].model), logits(policies[1].model), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--epochs", "1"], 3),  # 20 rows in batches of 8: the last step of an epoch takes the next one's first rows
        (["--epochs", "2.5"], 7),
        (["--epochs", "0.1"], 1),
        (["--epochs", "1", "--max_samples", "8"], 1),
        (["--epochs", "9", "--max_steps", "2"], 2),
    ],
)
def test_the_number_of_steps_is_max_steps_or_what_the_epochs_give(
    tmp_path: Path, base: Path, flags: list[str], steps: int
) -> None:
    data = jsonl(tmp_path / "data.jsonl", 20)
    log = run(tmp_path / "run", "--model", str(base), "--task", str(data), "--eval_problems", "0", *flags)
    assert [(line["kind"], line["step"]) for line in log] == [("train", step) for step in range(1, steps + 1)]


def test_an_epoch_trains_on_every_row_once(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = sft_core.train.encode_demonstrations

    def noting(policy: Policy, examples: Any, config: SFTConfig) -> Rows:
        seen.extend(example.question for example in examples)
        return encode(policy, examples, config)

    monkeypatch.setattr(sft_core.train, "encode_demonstrations", noting)
    data = jsonl(tmp_path / "data.jsonl", 16)
    run(tmp_path / "run", "--model", str(base), "--task", str(data), "--eval_problems", "0", "--epochs", "2")
    questions = sorted(e.question for e in problems(16))
    assert sorted(seen[:16]) == sorted(seen[16:]) == questions and seen[:16] != seen[16:]


def test_checkpoints_appear_every_so_many_steps_and_open_plainly(tmp_path: Path, base: Path) -> None:
    flags = [
        "--model",
        str(base),
        "--task",
        "arithmetic",
        "--max_steps",
        "6",
        "--save_every",
        "2",
        "--log_every",
        "4",
        "--keep_last",
        "0",
    ]
    log = run(tmp_path / "run", *flags)
    assert [line["step"] for line in log if line["kind"] == "train"] == [4, 6]  # every 4th and the last
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-00000{i}" for i in (2, 4, 6)]
    first, last = (AutoModelForCausalLM.from_pretrained(checkpoints / f"step-00000{i}") for i in (2, 4))
    assert not torch.equal(logits(first), logits(last))
    AutoTokenizer.from_pretrained(checkpoints / "step-000002")


def test_the_learning_rate_warms_up_and_decays_over_the_runs_own_steps(tmp_path: Path, base: Path) -> None:
    flags = ["--model", str(base), "--task", "arithmetic", "--max_steps", "4", "--warmup_ratio", "0.5"]
    log = run(tmp_path / "run", *flags, "--lr_schedule", "linear")
    rates = [line["learning_rate"] for line in log if line["kind"] == "train"]
    assert rates == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path, policies: list[Policy]) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(tmp_path / name, "--model", "tiny", "--task", "arithmetic", "--max_steps", "2", "--seed", seed)
    first, same, other = (logits(policy.model) for policy in policies)
    assert torch.equal(first, same) and not torch.allclose(first, other)
