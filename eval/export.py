"""Export a run's model: to a folder that opens with plain transformers, a zip of it, an upload to the hub.

python -m eval.export RUN_OR_MODEL --output FOLDER [--zip FILE.zip] [--merge] [--push_to_hub OWNER/NAME [--private]]

Every export is opened again, and its logits are compared with those of the model that it was made from.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from sft_core.cli import parse_config, run_ends, user_errors
from sft_core.config import ModelConfig, flag
from sft_core.errors import Refused, require
from sft_core.model.policy import Policy, load_policy
from sft_core.model.source import Source, find_source
from sft_core.run.card import model_card
from sft_core.run.checkpoint import UNFINISHED, NotSaved, not_saved, to_disk, write_whole
from sft_core.run.hub import CARD, check_push, push, pushing
from sft_core.run.trained import Trained, find_both, model_first

# Of the largest logit. Merging moves float32's roundings: 2e-6 in the 24 layers of Qwen2.5-0.5B's shape.
TOLERANCE = 3e-5


@dataclass(frozen=True)
class ExportConfig:
    """One model out of a run folder, a model or adapter folder, or the hub."""

    model: str = flag("", "a run folder, its final/ or a checkpoint, a model or adapter folder, a hub name")
    adapter_path: str | None = flag(None, "a LoRA adapter to load onto --model")
    merge: bool = flag(False, "merge a LoRA adapter into its base model")
    output: str = flag("", "a new folder for the export")
    zip: str = flag("", "a new .zip file for the export")
    push_to_hub: str = flag(
        "", "OWNER/NAME: upload the export to this hub repository, with a model card (needs HF_TOKEN or a login)"
    )
    private: bool = flag(False, "with --push_to_hub: make a new repository private")

    def check(self) -> None:
        require(self.model not in ("", "tiny"), "model", self.model or "''", "a run folder, a model or a hub name")
        require(
            bool(self.output or self.zip or self.push_to_hub),
            "output",
            "''",
            "a new folder (or --zip FILE.zip, or --push_to_hub OWNER/NAME)",
        )
        for name in ("output", "zip"):
            path = Path(getattr(self, name))
            free = not path.exists() or (name == "output" and path.is_dir() and not any(path.iterdir()))
            require(
                not getattr(self, name) or free, name, path, "a path that does not exist yet: nothing is overwritten"
            )
            blocked = any(parent.exists() and not parent.is_dir() for parent in path.parents)
            require(not blocked, name, path, "a path inside folders; one of its parents is a file")
        require(not self.zip or Path(self.zip).suffix == ".zip", "zip", self.zip, "a name that ends in .zip")


@dataclass(frozen=True)
class ExportJob:
    """A checked configuration; no weight has been read."""

    config: ExportConfig
    loading: ModelConfig
    source: Source
    card: str

    def run(self) -> None:
        """Export, and say what was made.

        Raises:
            NotSaved: the disk is full; what was written is not the model that it should be; the upload failed.
            ValueError: as `load_policy`.
        """
        policy = load_policy(self.loading, self.source)
        config = self.config
        with self._folder() as folder:
            write_whole(folder, lambda path: self._write(policy, path))
            if config.output:
                print(f"folder: {folder}")
            if config.zip:
                print(f"zip:    {zipped(folder, Path(config.zip))}")
            if config.push_to_hub:
                again = [config.model, *(["--adapter_path", config.adapter_path] if config.adapter_path else [])]
                again += [f"--{name}" for name in ("merge", "private") if getattr(config, name)]
                with pushing(again, config.push_to_hub):
                    print(f"pushed: {push(folder, config.push_to_hub, self.card, config.private)}")

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """--output, or a folder for as long as it takes to zip and upload it."""
        if self.config.output:
            yield Path(self.config.output)
        else:
            with TemporaryDirectory() as place:
                yield Path(place) / "model"

    def _write(self, policy: Policy, folder: Path) -> None:
        """Fill the folder, open it again, and print how far its logits are from those of the start."""
        expected, model = logits(policy.model), policy.model
        if self.config.merge:
            model = model.merge_and_unload(safe_merge=True)
            print(
                f"merged:   logits within {difference(expected, logits(model), 'the merged model'):.1e} of the largest"
            )
        dataclasses.replace(policy, model=model).save(folder)
        (folder / CARD).write_text(self.card, encoding="utf-8")
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        apart = difference(expected, logits(reloaded), "the export, opened again,")
        print(f"reloaded: logits within {apart:.1e} of the largest")


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """A model's float32 logits (1, 32, V) for a fixed row of ids from its whole vocabulary."""
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def difference(expected: Tensor, found: Tensor, what: str) -> float:
    """The largest one, as a share of the largest logit.

    Raises:
        NotSaved: it is over TOLERANCE.
    """
    apart = float((expected - found).abs().max() / expected.abs().max())
    if not apart <= TOLERANCE:  # NaN is not, either
        raise NotSaved(
            f"{what} is not the model that it was made from: its logits are {apart:.1e} of the largest away; nothing "
            f"is exported"
        )
    return apart


def zipped(folder: Path, path: Path) -> str:
    """Zip a folder's files below a folder of the zip's name, read them back, and return a line with its size. The same
    files make the same bytes; weights are not compressed, which would save a tenth at most.

    Raises:
        NotSaved: the disk is full; what was written is damaged.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with not_saved(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(unfinished, "w") as archive:
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                for file in files:
                    entry = zipfile.ZipInfo(f"{path.stem}/{file.relative_to(folder).as_posix()}")  # dated 1980
                    entry.external_attr = 0o644 << 16
                    with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 2**20)
            with zipfile.ZipFile(unfinished) as archive:
                if damaged := archive.testzip():
                    raise NotSaved(f"{path}: {damaged} cannot be read back")
            to_disk(unfinished)
            unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return f"{path} ({len(files)} files, {path.stat().st_size / 1e6:,.1f} MB)"


def prepare(config: ExportConfig) -> ExportJob:
    """Read the configuration of the model, and refuse what cannot work.

    Raises:
        ValueError: as `find_both`, `find_source`, `check_push` and `model_card`; --merge without an adapter, or an
            adapter that nobody else could open without it.
    """
    trained, names = find_both(config.model, config.adapter_path)
    loading = dataclasses.replace(ModelConfig(device="cpu", precision="float32", half_copies=False), **names)
    source = find_source(loading)
    adapter = source.adapter is not None
    require(adapter or not config.merge, "merge", True, f"a LoRA adapter; {trained.model} is none")
    if adapter and not config.merge and Path(source.base).is_dir():
        raise ValueError(
            f"--merge: expected with this adapter, whose base is {source.base}, a folder that only this machine has"
        )
    if config.push_to_hub:
        check_push(config.push_to_hub, source, adapter and not config.merge)
    return ExportJob(config, loading, source, card_of(config, trained, adapter and not config.merge))


def card_of(config: ExportConfig, trained: Trained, adapter: bool) -> str:
    """The run's card; without a run the model's own; else one that says that nothing is known."""
    own = Path(trained.model) / CARD
    if trained.run is None and own.is_file() and not config.merge:
        return own.read_text(encoding="utf-8", errors="replace")
    return model_card(trained, config.push_to_hub or Path(config.output).name or Path(config.zip).stem, adapter)


def main(argv: Sequence[str] | None = None) -> None:
    with run_ends():
        with user_errors():
            job = prepare(parse_config(ExportConfig, model_first(sys.argv[1:] if argv is None else argv)))
        with user_errors(Refused):
            transformers.logging.disable_progress_bar()
            job.run()


if __name__ == "__main__":
    main()
