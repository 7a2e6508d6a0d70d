"""An export is the model that it was made from, stands by itself, and overwrites nothing."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval.export
import sft_core.train
from eval.export import TOLERANCE, difference, logits, zipped
from sft_core.model.policy import Policy
from sft_core.run.checkpoint import NotSaved
from tests.faulty import SFT, command
from tests.helpers import PEFT_IS_BEHIND
from tests.test_command_line import forbid_models

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run whose adapter moves the logits."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    sft_core.train.main([*command(model, run, own=SFT), "--lora", "--lora_r", "4", "--lr", "0.5"])
    return run


def exported(*argv: Any) -> None:
    eval.export.main([str(arg) for arg in argv])


def apart(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit: the float32 rounding of W + BA is relative to the size of
    the numbers, and which way it goes depends on the processor's order of adding up."""
    return float((expected - found).abs().max() / expected.abs().max())


def the_error(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 2) -> str:
    with pytest.raises(SystemExit) as end:
        exported(*argv)
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def test_a_merged_adapter_is_one_model_with_the_same_logits(adapted: Path, model: Path, tmp_path: Path) -> None:
    exported(adapted, "--merge", "--output", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = logits(PeftModel.from_pretrained(base, adapted / "final"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert apart(expected, found) <= TOLERANCE
    assert apart(logits(AutoModelForCausalLM.from_pretrained(model)), found) > 0.01
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} < names
    assert not any("adapter" in name for name in names)
    assert "LoRA" in (tmp_path / "merged" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_run_its_final_model_and_a_checkpoint_are_exported_by_their_names(whole: Path, tmp_path: Path) -> None:
    checkpoint = sorted((whole / "checkpoints").iterdir())[-1]
    for number, name in enumerate((whole, whole / "final", checkpoint)):
        exported(name, "--output", tmp_path / str(number))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(whole / "final")))
        assert "trained by Group Relative Policy Optimization" in (tmp_path / str(number) / "README.md").read_text()
        assert not (tmp_path / str(number) / "training").exists()


def test_the_card_of_an_adapter_on_another_model_describes_the_adapters_run(
    adapted: Path, model: Path, tmp_path: Path
) -> None:
    exported(model, "--adapter_path", adapted, "--merge", "--output", tmp_path / "merged")
    assert "trained by supervised fine-tuning" in (tmp_path / "merged" / "README.md").read_text()
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(model)
    assert apart(logits(PeftModel.from_pretrained(base, adapted / "final")), found) <= TOLERANCE


def test_a_zip_holds_the_export_and_is_the_same_byte_for_byte_each_time(whole: Path, tmp_path: Path) -> None:
    exported(whole, "--zip", tmp_path / "model.zip", "--output", tmp_path / "folder")
    digest = hashlib.sha256((tmp_path / "model.zip").read_bytes()).hexdigest()
    (tmp_path / "model.zip").unlink()
    (tmp_path / "folder" / "config.json").touch()  # a time is no content
    zipped(tmp_path / "folder", tmp_path / "model.zip")
    assert hashlib.sha256((tmp_path / "model.zip").read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked" / "model"
    assert sorted(p.name for p in unpacked.iterdir()) == sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(unpacked)),
        logits(AutoModelForCausalLM.from_pretrained(whole / "final")),
    )


def test_a_zip_alone_leaves_no_folder(whole: Path, tmp_path: Path) -> None:
    exported(whole, "--zip", tmp_path / "deep" / "model.zip")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "model.zip"]


def test_an_export_of_an_export_keeps_its_card(whole: Path, tmp_path: Path) -> None:
    exported(whole, "--output", tmp_path / "first")
    exported(tmp_path / "first", "--output", tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == (tmp_path / "first" / "README.md").read_text()


def test_what_was_written_otherwise_is_noticed_and_not_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Policy.save

    def slightly_wrong(policy: Policy, folder: Path) -> None:
        with torch.no_grad():
            next(policy.model.parameters())[5] += 1e-3
        save(policy, folder)

    monkeypatch.setattr(Policy, "save", slightly_wrong)
    error = the_error(capsys, whole, "--output", tmp_path / "out", "--zip", tmp_path / "out.zip", code=1)
    assert error.startswith("the export, opened again, is not the model that it was made from")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_loses_the_adapter_is_noticed_and_not_kept(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, **_: model.unload(), raising=False)
    error = the_error(capsys, adapted, "--merge", "--output", tmp_path / "out", code=1)
    assert error.startswith("the merged model is not the model that it was made from")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_is_no_number_is_one() -> None:
    ones = torch.ones(3)
    assert difference(ones, ones, "x") == 0
    for other in (ones * 1.001, ones * float("nan")):
        with pytest.raises(NotSaved):
            difference(ones, other, "x")


def test_a_damaged_zip_is_not_kept(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: archive.namelist()[0])
    with pytest.raises(NotSaved, match="cannot be read back"):
        zipped(whole / "final", tmp_path / "model.zip")
    assert list(tmp_path.iterdir()) == []


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing to make": ([], "--output '': expected a new folder"),
    "a folder that is taken": (["--output", "taken"], "--output taken: expected a path that does not exist yet"),
    "a zip that is taken": (["--zip", "taken.zip"], "--zip taken.zip: expected a path that does not exist yet"),
    "a folder below a file": (["--output", "taken.zip/x"], "--output taken.zip/x: expected a path inside folders"),
    "another ending": (["--zip", "model.tar"], "--zip model.tar: expected a name that ends in .zip"),
    "nothing to merge": (["--merge", "--output", "new"], "--merge True: expected a LoRA adapter"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_overwrites_nothing(
    what: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    Path("taken.zip").write_text("mine")
    flags, said = MISTAKES[what]
    assert the_error(capsys, whole, *flags).startswith(said)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "taken", "taken.zip"]
    assert Path("taken.zip").read_text() == "mine"


def test_a_log_that_cannot_be_read_is_named_before_any_weight_is_read(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_text("nope\n{}\n")
    forbid_models(monkeypatch)
    error = the_error(capsys, tmp_path / "run", "--output", tmp_path / "out")
    assert error == f"{tmp_path / 'run' / 'log.jsonl'}, line 1: is not JSON"


def test_an_adapter_on_a_local_base_is_not_exported_without_it(
    adapted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = the_error(capsys, adapted, "--output", tmp_path / "out")
    assert error.startswith("--merge: expected with this adapter") and str(model) in error


def test_a_run_without_a_final_model_names_its_newest_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    error = the_error(capsys, tmp_path / "run", "--output", tmp_path / "out")
    newest = tmp_path / "run" / "checkpoints" / "step-000003"
    assert error == f"{tmp_path / 'run'}: this run has no final/ yet; its newest checkpoint is {newest}"
