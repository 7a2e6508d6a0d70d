"""What comes with a model is data: a pickle in any place, code beside it, a template that wants out of its sandbox.
None of it is run; what is needed and cannot be used is one line and exit code 2."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.__main__
import grpo_core.train
import sft_core.run.checkpoint
import sft_core.train
from sft_core.model.tiny import build_tiny
from tests.helpers import PEFT_IS_BEHIND

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)

Main = Callable[[list[str]], None]


class Bait:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@dataclass
class Place:
    """A folder with a model, an adapter and a run, all sound, to put bait in."""

    path: Path
    capsys: pytest.CaptureFixture[str]
    questions: list[Any]  # asked on the terminal

    @property
    def canary(self) -> Path:
        return self.path / "canary"

    def pickles(self) -> list[bytes]:
        """The bait as pickle writes it, and as torch.save does."""
        torch.save({"weight": torch.zeros(1), "bait": Bait(self.canary)}, self.path / "bait.bin")
        return [pickle.dumps(Bait(self.canary)), (self.path / "bait.bin").read_bytes()]

    def code(self) -> str:
        return f"import os\nos.mkdir({str(self.canary)!r})\n"

    def ended(self, main: Main, *argv: str) -> str:
        """The one error line that a command ends with; '' where it comes through. Nothing ran in either case."""
        self.capsys.readouterr()
        line = ""
        try:
            main(list(argv))
        except SystemExit as end:
            assert end.code == 2
            err = self.capsys.readouterr().err
            assert "Traceback" not in err
            line = err.strip().splitlines()[-1]
            assert line.startswith("error: ") and err.count("error: ") == 1 and len(line) < 700
        assert not self.canary.exists() and not self.questions
        return line

    def asked(self, *model: str) -> str:
        return self.ended(eval.__main__.main, *ASK, *model, "--output_dir", str(self.path / "answers"), "--overwrite")


PROMPTS = ["--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90", "--task", "arithmetic"]
QUIET = ["--device", "cpu", "--no_progress", "--precision", "float32", "--max_completion_tokens", "4"]
ASK = [*PROMPTS, *QUIET, "--eval_problems", "1"]
TRAIN = [*PROMPTS, *QUIET, "--no_tensorboard", "--batch_size", "2", "--eval_problems", "0", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    model = str(build_tiny(folder / "model", seed=0))
    steps = ["--max_steps", "1", "--save_every", "1"]
    sft_core.train.main([*TRAIN, *steps, "--model", model, "--output_dir", str(folder / "run")])
    lora = ["--lora", "--lora_r", "4"]
    sft_core.train.main([*TRAIN, *steps, *lora, "--model", model, "--output_dir", str(folder / "adapted")])
    (folder / "adapted" / "final").rename(folder / "adapter")
    for run in ("run", "adapted"):
        shutil.rmtree(folder / run / "final", ignore_errors=True)  # so that the run is not finished
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    questions: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *args: questions.append(args) or "n")
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    description = tmp_path / "adapter" / "adapter_config.json"
    text = description.read_text()
    assert str(sound / "model") in text
    description.write_text(text.replace(str(sound / "model"), str(tmp_path / "model")))
    return Place(tmp_path, capsys, questions)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_bait_works(place: Place) -> None:
    openers = [pickle.loads, lambda _: torch.load(place.path / "bait.bin", weights_only=False)]
    for bait, opener in zip(place.pickles(), openers, strict=True):
        opener(bait)
        assert place.canary.is_dir()
        place.canary.rmdir()


def test_what_the_bait_is_put_into_is_sound(place: Place) -> None:
    assert place.asked("--model", str(place.path / "model")) == ""
    assert place.asked("--model", str(place.path / "adapter")) == ""
    for run in ("run", "adapted"):
        assert "goes on as it began" in place.ended(sft_core.train.main, "--resume", str(place.path / run), "--lr", "1")
        assert place.ended(sft_core.train.main, "--resume", str(place.path / run)) == ""


# --- pickles


def test_a_pickle_in_the_place_of_any_file_of_a_model_is_refused(place: Place) -> None:
    model = place.path / "model"
    names = files_in(model)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(names)
    for name in names:
        kept = (model / name).read_bytes()
        for bait in place.pickles():
            (model / name).write_bytes(bait)
            line = place.asked("--model", str(model))
            assert str(model) in line, name
        (model / name).write_bytes(kept)
    assert place.asked("--model", str(model)) == ""


def test_a_pickle_in_the_place_of_any_file_of_an_adapter_is_refused_or_not_looked_at(place: Place) -> None:
    adapter = place.path / "adapter"
    names = files_in(adapter)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < set(names)
    for name in names:
        kept = (adapter / name).read_bytes()
        for bait in place.pickles():
            (adapter / name).write_bytes(bait)
            for flags in (
                ["--model", str(adapter)],
                ["--model", str(place.path / "model"), "--adapter_path", str(adapter)],
            ):
                line = place.asked(*flags)
                assert name in ("README.md", "manifest.json") or str(adapter) in line, name
        (adapter / name).write_bytes(kept)


@pytest.mark.parametrize("run", ["run", "adapted"])
@pytest.mark.parametrize("forged", [False, True], ids=["as it was written", "with a manifest that fits"])
def test_a_pickle_in_the_place_of_any_file_of_a_checkpoint_is_refused(place: Place, run: str, forged: bool) -> None:
    [checkpoint] = (place.path / run / "checkpoints").iterdir()
    names = files_in(checkpoint)
    assert {"manifest.json", "training/state.json", "training/tensors.safetensors"} < set(names)
    needed = {"training/state.json", "training/tensors.safetensors", "manifest.json"}
    needed |= {"config.json", "model.safetensors"} if run == "run" else {"adapter_model.safetensors"}
    manifest = (checkpoint / "manifest.json").read_bytes()
    for name in names:
        kept = (checkpoint / name).read_bytes()
        for bait in place.pickles()[: 2 if name.endswith("safetensors") else 1]:
            (checkpoint / name).write_bytes(bait)
            if forged and name != "manifest.json":
                (checkpoint / "manifest.json").unlink()
                sft_core.run.checkpoint._write_manifest(checkpoint)
            shutil.copytree(place.path / run, place.path / "copy")
            line = place.ended(
                sft_core.train.main, "--resume", str(place.path / "copy" / "checkpoints" / checkpoint.name)
            )
            shutil.rmtree(place.path / "copy")
            if name in needed or not forged:
                assert checkpoint.name in line, name
        (checkpoint / name).write_bytes(kept)
        (checkpoint / "manifest.json").write_bytes(manifest)


def test_a_pickle_in_the_place_of_any_other_file_of_a_run_is_refused_or_not_looked_at(place: Place) -> None:
    for name in ("config.yaml", "log.jsonl", "provenance.json", "completions.jsonl"):
        run = place.path / f"run-{name}"
        shutil.copytree(place.path / "run", run)
        size = (run / name).stat().st_size if (run / name).exists() else 0
        (run / name).write_bytes((place.pickles()[0] * (1 + size))[: max(size, 200)])
        line = place.ended(sft_core.train.main, "--resume", str(run))
        assert (name in line) == (name in ("config.yaml", "log.jsonl")), line


STRANGERS = [
    *("pytorch_model.bin", "adapter_model.bin", "model.pt", "model.pth", "model.ckpt", "flax_model.msgpack"),
    *("optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "scaler.pt", "tf_model.h5", "data.pkl"),
]


def test_pickles_that_other_programs_would_load_are_never_looked_at(place: Place) -> None:
    checkpoint = next((place.path / "run" / "checkpoints").iterdir())
    for folder in (place.path / "model", place.path / "adapter", checkpoint):
        for number, name in enumerate(STRANGERS):
            (folder / name).write_bytes(place.pickles()[number % 2])
    assert place.asked("--model", str(place.path / "model")) == ""
    assert place.asked("--model", str(place.path / "adapter")) == ""
    assert place.asked("--model", str(checkpoint)) == ""
    assert place.ended(sft_core.train.main, "--resume", str(place.path / "run")) == ""


@pytest.mark.parametrize("flavour", [0, 1])
def test_pickles_do_not_stand_in_for_safetensors_that_are_missing(place: Place, flavour: int) -> None:
    for name, weights in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        folder = place.path / name
        (folder / weights).unlink()
        for stranger in STRANGERS:
            (folder / stranger).write_bytes(place.pickles()[flavour])
        for argv in (["--model", str(folder)], ["--model", str(place.path / "model"), "--adapter_path", str(folder)]):
            assert f"holds no {weights}" in place.asked(*argv) or name == "model"
        assert f"holds no {weights}" in place.ended(
            grpo_core.train.main, *PROMPTS, *QUIET, "--max_steps", "1", "--model", str(folder)
        )
        (folder / weights).write_bytes((place.path / "run/checkpoints/step-000001/model.safetensors").read_bytes())
