"""Ctrl-C and SIGTERM at every moment of a run: it is saved, says so, and goes on to the same end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import grpo_core.step
import grpo_core.train
import grpo_core.warmstart
import sft_core.run.checkpoint
import sft_core.train
from grpo_core.reference import Reference
from sft_core.learn.optim import Optimizer
from sft_core.run.checkpoint import checkpoints, verify
from sft_core.run.progress import Progress
from sft_core.run.runlog import RunFolder
from tests.faulty import FORKS, SFT, Action, command, ended, fails, on_call, sends
from tests.helpers import length_reward
from tests.killing import Program, differences

pytestmark = FORKS

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ROOT = Path(__file__).parent.parent
MU_2 = ["--mu", "2", "--beta", "0.1", "--ref_sync_every", "3", "--eval_every", "2", "--save_every", "0"]

# Where the signal comes: the owner and the name of a function, which of its calls, whether at its end, and the step
# that is saved. Saving happens here when a run is interrupted, and at no other time.
GRPO_MOMENTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "while completions are sampled": (grpo_core.step, "sample", 3, False, 2),
    "after the learner's backward": (Optimizer, "backward", 3, True, 1),
    "after the first of two updates": (Optimizer, "clip_and_step", 3, True, 2),
    "after the last update": (Optimizer, "clip_and_step", 4, True, 2),
    "while a moving reference follows": (Reference, "follow", 4, False, 2),
    "while the log is written": (RunFolder, "log", 3, False, 2),
    "when a step is completed": (Progress, "completed", 2, True, 2),
    "in an evaluation on the way": (grpo_core.train, "evaluate", 2, False, 2),
    "in the evaluation at the end": (grpo_core.train, "evaluate", 3, False, 3),
    "while the final model is written": (RunFolder, "save_final", 1, False, 3),
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ended(command(model, run, *MU_2)).code == 0
    return run


def assert_saved_and_goes_on(
    argv: Sequence[str], number: int, before: Action, step: int, whole: Path, program: Program = grpo_core.train.main
) -> None:
    """The signal that `before` arranges for ends the run in order at this step, and --resume takes it to its end."""
    run = Path(argv[argv.index("--output_dir") + 1])
    end = ended(argv, before, program)
    assert end.code == CODES[signal.Signals(number)], end.text
    assert end.text.endswith("\ninterrupted\n") and "Traceback" not in end.text, end.text
    saved = run / "checkpoints" / f"step-{step:06d}"
    if step:
        assert f"saved: {saved}; go on with --resume {run}\n" in end.text, end.text
        assert checkpoints(run)[-1] == saved
        verify(saved)
    else:
        assert "no checkpoint was written" in end.text
    again = ended([*argv, "--resume"], program=program)
    assert again.code == 0, again.text
    assert differences(whole, run) == []


@pytest.mark.parametrize("moment", GRPO_MOMENTS)
def test_a_signal_at_any_moment_is_followed_by_a_checkpoint_of_the_last_completed_step(
    moment: str, model: Path, whole: Path, tmp_path: Path
) -> None:
    owner, name, call, after, step = GRPO_MOMENTS[moment]
    number = signal.SIGTERM if len(moment) % 2 else signal.SIGINT
    before = partial(on_call, owner, name, call, sends(number), after)
    assert_saved_and_goes_on(command(model, tmp_path / "run", *MU_2), number, before, step, whole)


@pytest.mark.parametrize("number", CODES)
def test_before_the_first_step_there_is_nothing_to_save(number: int, model: Path, whole: Path, tmp_path: Path) -> None:
    before = partial(on_call, grpo_core.train, "evaluate", 1, sends(number))
    assert_saved_and_goes_on(command(model, tmp_path / "run", *MU_2), number, before, 0, whole)


@pytest.mark.parametrize("at", ["save_state", "_write_manifest", "prune"])
def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(
    at: str, model: Path, whole: Path, tmp_path: Path
) -> None:
    at_work = {"_write_manifest": sft_core.run.checkpoint, "save_state": sft_core.run.progress, "prune": RunFolder}
    module = at_work[at]
    before = partial(on_call, module, at, 2, sends(signal.SIGINT))
    argv = command(model, tmp_path / "run", *MU_2, "--save_every", "1", "--keep_last", "1")
    assert_saved_and_goes_on(argv, signal.SIGINT, before, 2, whole)


def rude(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The length reward, with a signal in it that it does not let through."""
    try:
        if os.environ.pop("RUDE", ""):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    except BaseException:
        pass
    return length_reward(prompts, completions)


def test_a_reward_function_that_catches_everything_does_not_lose_the_signal(model: Path, tmp_path: Path) -> None:
    argv = command(model, tmp_path / "run", *MU_2, "--rewards", "tests.test_interrupt:rude")
    whole = tmp_path / "whole"
    assert ended(command(model, whole, *MU_2, "--rewards", "tests.test_interrupt:rude")).code == 0
    before = partial(os.environ.__setitem__, "RUDE", "1")
    assert_saved_and_goes_on(argv, signal.SIGINT, before, 1, whole)


def asking(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The length reward, within which the person at the keyboard presses Ctrl-C."""
    if os.environ.pop("RUDE", ""):
        os.kill(os.getpid(), signal.SIGINT)
    return length_reward(prompts, completions)


def test_a_signal_in_a_reward_function_with_a_time_limit_is_no_reward_error(model: Path, tmp_path: Path) -> None:
    flags = [*MU_2, "--rewards", "tests.test_interrupt:asking", "--reward_timeout", "5"]
    whole = tmp_path / "whole"
    assert ended(command(model, whole, *flags)).code == 0

    def before() -> None:
        on_call(Progress, "completed", 2, partial(os.environ.__setitem__, "RUDE", "1"), True)

    assert_saved_and_goes_on(command(model, tmp_path / "run", *flags), signal.SIGINT, before, 2, whole)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_the_process_at_once_while_it_saves(
    first: int, second: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def before() -> None:
        on_call(grpo_core.step, "score_groups", 3, sends(first))
        on_call(sft_core.run.progress, "save_state", 1, sends(second))

    end = ended(command(model, run, *MU_2), before)
    assert end.code == -second, end.text
    assert checkpoints(run) == []
    assert ended([*command(model, run, *MU_2), "--resume"]).code == 0
    assert differences(whole, run) == []


def test_a_second_signal_ends_the_process_at_once_while_a_step_is_completed(model: Path, tmp_path: Path) -> None:
    end = ended(
        command(model, tmp_path / "run", *MU_2), partial(on_call, Optimizer, "clip_and_step", 3, sends(2, 2), True)
    )
    assert end.code == -signal.SIGINT
    assert "the step is saved first; a second signal ends the process at once" in end.text


def test_a_first_signal_while_a_failed_run_is_saved_lets_it_be_saved(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def fail() -> None:
        raise RuntimeError("a fault of the program")

    def before() -> None:
        on_call(grpo_core.step, "score_groups", 3, fail)
        on_call(sft_core.run.progress, "save_state", 1, sends(signal.SIGINT))

    end = ended(command(model, run, *MU_2), before)
    assert end.code == 1 and "RuntimeError: a fault of the program" in end.text
    assert [path.name for path in checkpoints(run)] == ["step-000002"]
    verify(checkpoints(run)[-1])


def test_a_full_disk_is_reported_when_a_run_is_interrupted(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def before() -> None:
        on_call(grpo_core.step, "score_groups", 3, sends(signal.SIGINT))
        on_call(sft_core.run.progress, "save_state", 1, fails(errno.ENOSPC))

    end = ended(command(model, run, *MU_2), before)
    assert end.code == 130, end.text
    path = run / "checkpoints" / "step-000002"
    assert f"step 2 is not saved ({path} could not be written: [Errno 28] No space left on device)" in end.text
    assert "no checkpoint was written" in end.text


# --- SFT, and GRPO's supervised start

SFT_MOMENTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "while a batch is encoded": (sft_core.train, "encode_demonstrations", 2, False, 1),
    "before the backward": (Optimizer, "backward", 3, False, 2),
    "after an update": (Optimizer, "clip_and_step", 2, True, 2),
    "in an evaluation on the way": (sft_core.train, "heldout_loss", 1, False, 2),
}


@pytest.fixture(scope="module")
def whole_sft(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ended(command(model, run, "--save_every", "0", own=SFT), program=sft_core.train.main).code == 0
    return run


@pytest.mark.parametrize(("moment", "number"), list(zip(SFT_MOMENTS, [*CODES, *CODES], strict=True)))
def test_sft_is_saved_and_resumes_too(moment: str, number: int, model: Path, whole_sft: Path, tmp_path: Path) -> None:
    owner, name, call, after, step = SFT_MOMENTS[moment]
    before = partial(on_call, owner, name, call, sends(number), after)
    argv = command(model, tmp_path / "run", "--save_every", "0", own=SFT)
    assert_saved_and_goes_on(argv, number, before, step, whole_sft, sft_core.train.main)


def short_start(before: Action | None = None) -> Callable[[], None]:
    """A supervised start of three steps on the built-in model."""

    def patch() -> None:
        prepare = grpo_core.warmstart.prepare

        def shorter(config: Any) -> Any:
            object.__setattr__(config, "max_steps", 3)
            object.__setattr__(config, "batch_size", 2)
            object.__setattr__(config, "eval_problems", 2)
            return prepare(config)

        grpo_core.warmstart.prepare = shorter  # type: ignore[attr-defined]
        if before:
            before()

    return patch


@pytest.mark.slow
def test_a_run_interrupted_in_its_supervised_start_says_how_to_resume_and_does(tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--max_steps", "1", "--prompts_per_step", "1", "--group_size", "2"]
    flags += ["--max_completion_tokens", "4", "--eval_problems", "2", "--no_progress", "--save_every", "1"]
    whole, run = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    end = ended([*flags, "--output_dir", str(whole)], short_start())
    assert end.code == 0, end.text
    signals = partial(on_call, Optimizer, "clip_and_step", 2, sends(signal.SIGTERM), True)
    end = ended([*flags, "--output_dir", str(run)], short_start(signals))
    assert end.code == 143, end.text
    [start] = run.parent.glob("tiny-sft-*.unfinished")
    assert f"saved: {start / 'checkpoints' / 'step-000002'}; go on with --resume {run}\n" in end.text, end.text
    end = ended(["--resume", str(run), "--no_progress", "--output_dir", str(run)], short_start())
    assert end.code == 0, end.text
    assert differences(whole, run) == []
    assert [path.name for path in run.parent.glob("tiny-sft-*")] == [start.name.removesuffix(".unfinished")]


@pytest.mark.slow
def test_a_real_ctrl_c_at_a_real_process(model: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = command(model, run, *MU_2, "--max_steps", "100000")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [sys.executable, "-m", "grpo_core.train", *argv]
    process = subprocess.Popen(started, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 100
        while not (run / "completions.jsonl").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    [saved] = checkpoints(run)
    verify(saved)
    assert err.splitlines()[-2:] == [f"saved: {saved}; go on with --resume {run}", "interrupted"]
