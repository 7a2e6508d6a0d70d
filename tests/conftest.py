"""What several test files start from; made once, and copied by whoever changes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.runs import Run

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send to their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No clock decides a test: a busy machine takes a second for what another does in a millisecond.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

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


@pytest.fixture(scope="session")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run, killed after one checkpoint and after two."""
    from functools import partial

    from sft_core.run.checkpoint import checkpoints
    from sft_core.run.progress import Progress
    from tests.faulty import command, dies, ended, on_call

    runs = {}
    for count in (1, 2):
        runs[count] = tmp_path_factory.mktemp("begun") / "run"
        assert ended(command(model, runs[count]), partial(on_call, Progress, "save", count, dies, True)).code == 9
        assert [int(path.name[-6:]) for path in checkpoints(runs[count])] == list(range(1, count + 1))
    return runs


@pytest.fixture
def run(tmp_path: Path, begun: dict[int, Path]) -> Path:
    """A copy of the run that was killed after its second checkpoint."""
    return Path(shutil.copytree(begun[2], tmp_path / "run"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: hardly trained, just enough to end some completions before the budget does."""
    from sft_core.model.tiny import build_tiny
    from tests.runs import sft

    folder = tmp_path_factory.mktemp("base")
    untrained = ["--model", str(build_tiny(folder / "untrained", seed=0)), "--task", "arithmetic"]
    return sft(folder / "sft", *untrained, "--max_steps", "12", "--lr", "2e-3", "--worked_share", "0.5")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 word problems, of which a run asks 4 and trains on 12."""
    from sft_core.text.arithmetic import ArithmeticStream

    stream = ArithmeticStream("train", seed=0, difficulty=2)
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(stream[i]) + "\n" for i in range(16)))
    return path


@pytest.fixture(scope="session")
def start(base: Path, data: Path) -> list[str]:
    """Where the runs of this file start, and on what."""
    return ["--model", str(base), "--task", str(data), "--eval_problems", "4"]


@pytest.fixture(scope="session")
def recorded(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with everything switched on."""
    from tests.runs import STEPS, grpo

    every = ["--max_steps", str(STEPS), "--beta", "0.1", "--eval_every", "2", "--save_every", "2", "--show_every", "2"]
    every += ["--keep_last", "0", "--eval_samples", "3"]
    return grpo(tmp_path_factory.mktemp("recorded") / "run", *start, *every)
