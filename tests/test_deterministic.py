"""`--deterministic`: what is switched on, and that on a CPU it changes no bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo_core.job
import grpo_core.train
import sft_core.train
from benchmarks.workload import workload
from grpo_core.warmstart import _settings, tiny_sft_folder
from sft_core.run import randomness
from tests.faulty import FORKS, GRPO, SFT, command, ended
from tests.killing import Program, differences

pytestmark = FORKS
PROGRAMS: dict[str, tuple[Program, Sequence[str]]] = {
    "grpo": (grpo_core.train.main, [*GRPO, "--beta", "0.1"]),
    "sft": (sft_core.train.main, SFT),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the flag changes is the process's."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def test_operations_kernels_and_workspaces_become_deterministic_and_then_not() -> None:
    randomness.deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    randomness.deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    # As a warning only it would leave attention's backward pass as it is.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    randomness.deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    randomness.deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_flag_is_on_while_a_run_learns_and_changes_no_bit_on_a_cpu(kind: str, model: Path, tmp_path: Path) -> None:
    program, own = PROGRAMS[kind]
    runs = [tmp_path / name / "run" for name in ("plain", "flagged")]

    def watched() -> None:
        forward = torch.nn.Module.__call__

        def on(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
            assert torch.are_deterministic_algorithms_enabled()
            return forward(module, *args, **kwargs)

        torch.nn.Module.__call__ = on  # type: ignore[method-assign]

    assert ended(command(model, runs[0], own=own), program=program).code == 0
    end = ended(command(model, runs[1], "--deterministic", own=own), watched, program)
    assert end.code == 0, end.text
    assert differences(*runs) == []


def test_a_run_may_go_on_with_it(whole: Path, run: Path) -> None:
    end = ended(["--no_progress", "--resume", str(run), "--deterministic"])
    assert end.code == 0, end.text
    assert differences(whole, run) == []


def test_nothing_is_read_that_was_not_written(model: Path, tmp_path: Path) -> None:
    """All memory that is allocated is filled with NaN first, and the bits are the same."""
    runs = [tmp_path / name / "run" for name in ("plain", "filled")]

    def filled() -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        assert torch.empty(3).isnan().all()
        grpo_core.job.deterministic = lambda on: None  # type: ignore[attr-defined]

    flags = PROGRAMS["grpo"][1]
    assert ended(command(model, runs[0], own=flags)).code == 0
    end = ended(command(model, runs[1], own=flags), filled)
    assert end.code == 0, end.text
    assert differences(*runs) == []


def test_a_checkpoint_holds_the_random_states_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {gpu: torch.full((16,), gpu, dtype=torch.uint8) for gpu in range(3)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: states[gpu])
    kept, put = randomness.random_state(), dict[int, torch.Tensor]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # it is resumed where there is one less
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, gpu: put.update({gpu: state}))
    randomness.set_random_state(kept)
    assert list(put) == [0, 1] and all(put[gpu] is states[gpu] for gpu in put)


def test_top_p_is_refused_where_its_running_sum_would_fail_later() -> None:
    cut = ["--deterministic", "--top_p", "0.9", "--max_steps", "1"]
    with pytest.raises(ValueError, match="--top_p 0.9: expected 1 under --deterministic, unless --device is cpu"):
        workload("tiny", cut)
    assert workload("tiny", [*cut, "--device", "cpu"]).top_p == 0.9
    assert workload("tiny", cut[1:]).top_p == 0.9


def test_the_built_in_start_is_deterministic_too_and_is_found_again_without_the_flag() -> None:
    plain = workload("tiny", ["--max_steps", "1"])
    flagged = replace(plain, deterministic=True)
    assert _settings(flagged).deterministic and not _settings(plain).deterministic
    assert tiny_sft_folder(flagged) == tiny_sft_folder(plain)
