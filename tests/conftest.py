"""What several test files start from; made once, and copied by whoever changes it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send to their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine's own would be taken for those of the programs (ENVIRONMENT in sft_core/cli.py).
for name in ("MODEL_NAME", "OUTPUT_DIR", "RUN_NAME"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cheapest model with its tokenizer, in a folder."""
    from tests.faulty import save_start  # here: torch and transformers, which the tests of rewards do without

    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GRPO run that nobody disturbs."""
    from tests.faulty import command, ended

    run = tmp_path_factory.mktemp("whole") / "run"
    assert ended(command(model, run)).code == 0
    return run
