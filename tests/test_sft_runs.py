"""Whole SFT runs: what they learn, what they leave, how many steps they take."""

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
from sft_core.learn.rows import Rows
from sft_core.model.policy import Policy
from sft_core.model.tiny import build_tiny
from sft_core.train import main
from tests.helpers import (
    PEFT_IS_BEHIND,
    tokenizer,
)
from tests.test_sft import problems

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


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
        "checkpoints",
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
