"""What a GRPO run starts from: an adapter, the built-in model, real data."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval.__main__
import grpo_core.job
import grpo_core.train
import grpo_core.warmstart
import sft_core.train
from grpo_core.config import GRPOConfig
from sft_core.cli import parse_config
from sft_core.job import SFTJob
from tests.helpers import PEFT_IS_BEHIND, SHARED
from tests.runs import QUIET, REAL_GSM8K, REAL_QWEN, SMALL, Run, grpo, same, sft, weights

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


def test_grpo_starts_from_an_sft_adapter_which_is_its_reference(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(base), "--task", str(data)]
    adapter = sft(tmp_path / "sft", *flags, "--lora", "--lora_r", "4", "--lr", "0.05", "--max_steps", "3")
    more = ["--task", str(data), "--eval_problems", "0", "--max_steps", "3", "--beta", "0.1", "--lr", "0.01"]
    run = grpo(tmp_path / "grpo", "--model", str(adapter), *more)
    kl = [line["kl"] for line in run.train]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] > 1e-6
    named = grpo(tmp_path / "named", "--model", str(base), "--adapter_path", str(adapter), *more)
    assert named.completions == run.completions

    def logits(*adapters: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base)
        for folder in adapters:
            model = peft.PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            return model.eval()(torch.arange(3, 40)[None]).logits

    final = run.path / "final"
    assert not torch.allclose(logits(adapter), logits(), atol=1e-3)  # SFT moved the adapter
    assert not torch.allclose(logits(final), logits(adapter), atol=1e-3)  # and GRPO moved it further
    assert not [path for path in final.iterdir() if path.is_dir()]  # the frozen reference is not saved beside it
    AutoTokenizer.from_pretrained(final)


def test_a_new_lora_starts_as_the_base_model_and_trains_nothing_else(
    base: Path, start: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    run = grpo(tmp_path / "run", *start, "--max_steps", "2", "--lora", "--lora_r", "4", "--beta", "0.1")
    assert run.train[0]["kl"] == pytest.approx(0, abs=1e-9) and run.train[1]["grad_norm"] > 0
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path / "final")
    stored = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in stored.items()}
    assert same(plain, original)
    assert any("lora_B" in name and float(p.detach().abs().max()) > 0 for name, p in model.named_parameters())


@pytest.fixture
def short_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """In an empty folder, with the built-in SFT cut to 2 steps; the runs of it that were made."""
    presets = tmp_path / "presets"
    presets.mkdir()
    values = yaml.safe_load((sft_core.train.PRESETS / "tiny.yaml").read_text())
    (presets / "tiny.yaml").write_text(yaml.safe_dump({**values, "max_steps": 2, "tensorboard": False}))
    monkeypatch.setattr(grpo_core.warmstart, "PRESETS", presets)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    made: list[Path] = []
    begin = sft_core.train.begin

    def noting(job: SFTJob) -> sft_core.train.SFTRun | None:
        made.append(Path(job.config.output_dir))
        return begin(job)

    monkeypatch.setattr(grpo_core.warmstart, "begin", noting)
    yield made


def the_embedded_job(*flags: str) -> str:
    """`python -m grpo_core.train`, smaller; what it printed. The run folder is its own choice, under runs/."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        small = ["--max_steps", "1", "--eval_problems", "4", "--eval_batch_size", "4", "--no_tensorboard"]
        grpo_core.train.main([*SMALL, *QUIET, *small, *flags])
    return out.getvalue()


@pytest.mark.slow
def test_the_warm_start_is_made_once_and_found_again(short_warm_start: list[Path]) -> None:
    assert "supervised fine-tuning" in the_embedded_job()
    [made] = short_warm_start
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert len(folders) == 2 and folders[0].startswith("grpo-") and folders[1].startswith("tiny-sft-")
    trained = weights(Path("runs") / folders[1] / "final")

    assert f"an earlier run: {Path('runs') / folders[1]}" in the_embedded_job()
    assert short_warm_start == [made]
    assert len(list(Path("runs").glob("grpo-*"))) == 2  # even within a second: no run overwrites another
    assert same(weights(Path("runs") / folders[1] / "final"), trained)

    the_embedded_job("--seed", "7")
    assert len(short_warm_start) == 2 and len(list(Path("runs").glob("tiny-sft-*"))) == 2


@pytest.mark.slow
def test_a_warm_start_that_was_stopped_half_way_is_resumed(short_warm_start: list[Path]) -> None:
    the_embedded_job()
    [folder] = Path("runs").glob("tiny-sft-*")
    log, weights = (folder / "log.jsonl").read_text(), (folder / "final" / "model.safetensors").read_bytes()
    half = folder.rename(folder.with_name(folder.name + ".unfinished"))
    (half / "final").rename(half / "final.unfinished")
    the_embedded_job()
    assert len(short_warm_start) == 2 and not half.exists()
    assert (folder / "final" / "model.safetensors").read_bytes() == weights
    assert (folder / "log.jsonl").read_text() != log  # there was no checkpoint, so it has learned again


def test_the_embedded_job_is_what_no_arguments_mean() -> None:
    config = parse_config(GRPOConfig, [], grpo_core.train.PRESETS, "tiny")
    job = grpo_core.job.prepare(config)
    assert job.source is None and job.task.size is None
    assert [reward.name for reward in job.rewards] == ["numeric_reward_func"]


# --- real data


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL_QWEN.is_dir() and REAL_GSM8K.is_file()), reason=f"no Qwen2.5 and GSM8K in {SHARED} (GRPO_SHARED)"
)
def test_sft_grpo_and_evaluation_run_on_gsm8k_in_qwens_own_vocabulary(tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(REAL_GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    task = ["--task", str(data), "--eval_problems", "2", "--prompt_format", "xml", "--max_prompt_tokens", "200"]
    task += ["--precision", "float32", *QUIET]
    # initializer_range: logits far enough from uniform that settings which change them would show
    shape = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "initializer_range=0.2"]
    shape += ["num_attention_heads=2", "num_key_value_heads=1"]
    scratch = ["--model", str(REAL_QWEN), "--from_scratch", "--config_overrides", *shape]
    budget = ["--batch_size", "2", "--micro_batch", "2", "--max_completion_tokens", "64", "--max_steps", "1"]
    sft_core.train.main([*task, *scratch, *budget, "--output_dir", str(tmp_path / "sft")])
    shipped = json.loads((REAL_QWEN / "generation_config.json").read_text())
    kept = json.loads((tmp_path / "sft" / "final" / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == shipped["repetition_penalty"] != 1  # there for whoever uses the model after us

    sizes = ["--prompts_per_step", "2", "--group_size", "2", "--max_completion_tokens", "10", "--max_steps", "1"]
    rewards = ["--rewards", "correctness_reward_func", "xmlcount_reward_func", "tests.helpers:length_reward"]
    model = ["--model", str(tmp_path / "sft" / "final")]
    grpo_core.train.main([*task, *model, *sizes, *rewards, "--output_dir", str(tmp_path / "grpo")])
    run = Run(tmp_path / "grpo", "")
    assert len(run.train) == 1 and len(run.completions) == 4 and len(run.eval) == 2
    assert run.train[0]["sampler_gap_max"] < 3e-5  # and not used by us: rounding alone

    final = run.path / "final"
    opened = AutoModelForCausalLM.from_pretrained(final)
    assert (opened.config.vocab_size, opened.config.hidden_size) == (151936, 32)
    assert len(AutoTokenizer.from_pretrained(final)) == len(AutoTokenizer.from_pretrained(REAL_QWEN))
    budget = ["--max_completion_tokens", "10", "--output_dir", str(tmp_path / "eval")]
    eval.__main__.main([*task, "--model", str(final), *budget])
    assert len(Run(tmp_path / "eval", "").jsonl("answers.jsonl")) == 2
