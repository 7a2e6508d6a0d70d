"""Uploading a model to the hub, so that a lost connection loses nothing: the model is on the disk first."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sft_core.config import RunConfig
from sft_core.model.source import Source
from sft_core.run.card import model_card
from sft_core.run.checkpoint import MANIFEST, NotSaved
from sft_core.run.trained import find_trained

CARD = "README.md"


class NotPushed(NotSaved):
    """The upload failed; the message says what is on the disk and how to try again."""


def check_push(name: str, source: Source | None, adapter: bool) -> None:
    """Find out at the start what would stop the upload hours later, as far as the hub can tell.

    Args:
        source: where the weights come from; None: the built-in model.
        adapter: whether a LoRA adapter without its base is to be uploaded.

    Raises:
        ValueError: a malformed name; no token, or one that the hub does not take; an adapter that nobody could open,
            because its base model is a folder of this machine.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {name}: expected OWNER/NAME as the hub has it ({_line(error)})") from None
    if name.count("/") != 1:
        raise ValueError(f"--push_to_hub {name}: expected OWNER/NAME, the owner being you or your organization")
    if adapter and source and Path(source.base).is_dir():
        raise ValueError(
            f"--push_to_hub {name}: expected a base model of the hub: the adapter's is {source.base}, a folder of "
            f"this machine; leave the flag out, and push the merged model: python -m eval.export RUN --merge "
            f"--push_to_hub {name}"
        )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push_to_hub {name}: the hub is switched off by HF_HUB_OFFLINE")
    if get_token() is None:
        raise ValueError(
            f"--push_to_hub {name}: expected a token of the hub that may write: set HF_TOKEN, or run `hf auth login`"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # of the connection, of HTTP, of the answer
        raise ValueError(f"--push_to_hub {name}: the hub does not take the token ({_line(error)})") from None


def check_run_push(config: RunConfig, source: Source | None, lora: bool) -> None:
    """`check_push` for a training run, where it is to upload anything."""
    if config.push_to_hub:
        check_push(config.push_to_hub, source, lora or (source is not None and source.adapter is not None))


def push_run(run: Path, config: RunConfig) -> None:
    """Upload a finished run's final/, where --push_to_hub asks for it, and print where it is.

    Raises:
        NotPushed: it failed.
    """
    if config.push_to_hub:
        trained = find_trained(str(run))
        adapter = (Path(trained.model) / "adapter_config.json").is_file()
        with pushing([str(run), *(["--private"] if config.private else [])], config.push_to_hub):
            card = model_card(trained, config.push_to_hub, adapter)
            print(f"pushed: {push(Path(trained.model), config.push_to_hub, card, config.private)}")


@contextmanager
def pushing(model: Sequence[str], name: str) -> Iterator[None]:
    """Whatever stops the block, Ctrl-C included, print how to push again.

    Args:
        model: the arguments of `python -m eval.export` that export the same model.

    Raises:
        NotPushed: instead of an exception of the block.
    """
    again = f"nothing is lost, push again: python -m eval.export {shlex.join([*model, '--push_to_hub', name])}"
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name} was not pushed; {again}", file=sys.stderr)
        raise
    except Exception as error:
        raise NotPushed(f"{name} was not pushed ({_line(error)}); {again}") from error


def push(folder: Path, name: str, card: str, private: bool) -> str:
    """One commit with the folder's model and this card; the repository is made where there is none. Returns its
    address."""
    api = HfApi()
    address = api.create_repo(name, private=private or None, exist_ok=True)
    if private and not api.repo_info(name).private:
        raise ValueError("--private: the repository is there already, for everybody to see")
    # Not uploaded: the part of a checkpoint that only --resume needs.
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, CARD)]
    files = [path for path in files if path.relative_to(folder).parts[0] != "training"]
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    api.create_commit(name, operations, commit_message="Model and card, by grpo-from-scratch")
    return str(address)


def _line(error: Exception) -> str:
    """What happened, without the addresses of manuals; huggingface_hub wraps some errors in one that says nothing."""
    said, cause = (" ".join(str(text or "").split()) for text in (error, error.__cause__))
    said = said.partition(" For more information check:")[0]
    return (said if cause.startswith(said[:40]) else f"{said} {cause}".strip())[:240]
