"""Whole runs of several ranks: what they leave behind is what one process leaves, whatever happens to a rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import eval.__main__
import grpo_core.step
import grpo_core.train
import sft_core.learn.optim
import sft_core.run.checkpoint
import sft_core.run.joined
import sft_core.train
from sft_core.learn import ranks
from sft_core.learn.optim import Optimizer
from sft_core.run.checkpoint import checkpoints
from sft_core.run.progress import Progress
from tests.faulty import FORKS, SFT, command, dies, on_call, sends
from tests.helpers import length_reward
from tests.killing import differences, is_a_time
from tests.runs import weights
from tests.together import ended, start, together

pytestmark = FORKS

Program = Callable[[Sequence[str]], None]


def run(
    world: int,
    argv: Sequence[str],
    folder: Path,
    program: Program = grpo_core.train.main,
    before: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """The program in so many ranks, in each of which `before` is called first; their exit codes. What they print is in
    `folder`."""

    def prepared() -> None:
        before(int(os.environ["RANK"]))
        program(argv)

    return together(world, prepared, folder)


def on(rank: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Of the ranks, this one does it."""
    return lambda its: act() if its == rank else None


def printed(folder: Path, rank: int) -> str:
    """What a rank prints, without what gloo says of itself in older releases of torch."""
    lines = [line for name in ("out", "err") for line in (folder / f"{rank}.{name}").read_text().splitlines(True)]
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def errors(folder: Path, world: int) -> list[str]:
    """The lines that tell of an error, of all ranks."""
    lines = [line for rank in range(world) for line in printed(folder, rank).splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def assert_like(found: Path, expected: Path) -> None:
    """The same run but for times and rounding."""
    assert files(found) == files(expected)
    assert "log.jsonl" in files(expected)
    for name in ("log.jsonl", *(str(p.relative_to(expected)) for p in expected.glob("**/*.jsonl"))):
        for line, its in zip(read(found / name), read(expected / name), strict=True):
            assert line.keys() == its.keys()
            different = [key for key in its if not close(line[key], its[key])]
            assert not different, {key: (line[key], its[key]) for key in different}
    mine, theirs = weights(found / "final"), weights(expected / "final")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) < 2e-5


def files(run: Path) -> set[str]:
    """Their names, those of TensorBoard aside, which hold the time."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name}


def close(value: Any, other: Any) -> bool:
    """Equal, numbers but for the rounding of a few steps in float32."""
    if isinstance(other, dict):
        return value.keys() == other.keys() and all(close(value[key], other[key]) for key in other)
    if isinstance(other, float):
        return bool(value == pytest.approx(other, rel=2e-4, abs=2e-5))
    return bool(value == other)


def read(path: Path) -> list[dict[str, Any]]:
    """A log without its times."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in line.items() if not is_a_time(key)} for line in lines]


@pytest.mark.parametrize("world", [2, 4])
def test_a_run_of_ranks_leaves_what_one_process_leaves(world: int, model: Path, whole: Path, tmp_path: Path) -> None:
    assert run(world, command(model, tmp_path / "run"), tmp_path / "printed") == [0] * world
    assert_like(tmp_path / "run", whole)
    for rank in range(1, world):
        assert printed(tmp_path / "printed", rank) == ""
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[1])
    assert len(line["rank_time_s"]) == world and 0 < line["waiting_share"] < 1


@pytest.mark.parametrize("world", [2, 4])
def test_supervised_fine_tuning_and_evaluation_too(world: int, model: Path, tmp_path: Path) -> None:
    for count in (1, world):
        folder = tmp_path / str(count)
        argv = command(model, folder / "sft", own=[*SFT, "--batch_size", "5"])
        assert run(count, argv, tmp_path / f"printed-{count}", sft_core.train.main) == [0] * count
        ask = ["--model", str(model), "--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", ""]
        ask += [
            "--max_prompt_tokens",
            "90",
            "--eval_problems",
            "7",
            "--samples",
            "2",
            "--batch_size",
            "3",
            "--max_completion_tokens",
            "6",
        ]
        ask += ["--device", "cpu", "--precision", "float32", "--no_progress", "--output_dir", str(folder / "eval")]
        assert run(count, ask, tmp_path / f"asked-{count}", eval.__main__.main) == [0] * count
    assert_like(tmp_path / str(world) / "sft", tmp_path / "1" / "sft")
    alone, shared = ((tmp_path / str(count) / "eval" / "answers.jsonl").read_text() for count in (1, world))
    assert alone == shared
    tables = [printed(tmp_path / f"asked-{count}", 0).splitlines()[1:-1] for count in (1, world)]
    assert tables[0] == tables[1]


def test_checkpoints_of_any_number_of_ranks_are_read_by_any_other(
    begun: dict[int, Path], model: Path, whole: Path, tmp_path: Path
) -> None:
    """One process has saved step 1; two ranks go on and save step 2; four finish."""
    last = Path(shutil.copytree(begun[1], tmp_path / "run"))
    argv = [*command(model, last), "--resume"]
    codes = run(2, argv, tmp_path / "two", before=on(0, partial(on_call, Progress, "save", 1, dies, True)))
    assert codes == [9, 1]
    assert [path.name for path in checkpoints(last)] == ["step-000001", "step-000002"]
    assert run(4, argv, tmp_path / "four") == [0] * 4
    assert_like(last, whole)


@pytest.fixture(scope="module")
def whole_of_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two ranks."""
    folder = tmp_path_factory.mktemp("two")
    assert run(2, command(model, folder / "run"), folder / "printed") == [0, 0]
    return folder / "run"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["sampling", "gradients", "saving"])
def test_a_rank_that_is_killed_costs_nothing(
    moment: str, rank: int, model: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    """The other says so, and the next start ends with the same bits."""
    at = {
        "sampling": (grpo_core.step, "sample", 3),
        "gradients": (ranks, "add_up_gradients", 3),
        "saving": (sft_core.run.checkpoint, "to_disk", 6),
    }
    argv = [*command(model, tmp_path / "run"), "--resume"]
    codes = run(2, argv, tmp_path / "killed", before=on(rank, partial(on_call, *at[moment], dies)))
    if (moment, rank) != ("saving", 1):  # rank 1 saves nothing
        assert codes == ([9, 1] if rank == 0 else [1, 9])
        (line,) = errors(tmp_path / "killed", 2)
        assert line.startswith(f"error: rank {rank} (last seen at: ") and "has ended or hangs" in line
        assert run(2, argv, tmp_path / "again") == [0, 0]
    assert differences(whole_of_two, tmp_path / "run") == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["sampling", "after the update"])
def test_a_signal_to_any_rank_is_followed_by_a_checkpoint_of_the_last_completed_step(
    moment: str, rank: int, model: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    at, step = {
        "sampling": ((grpo_core.step, "sample", 3), 2),
        "after the update": ((Optimizer, "clip_and_step", 2), 2),
    }[moment]
    argv = command(model, tmp_path / "run", "--save_every", "0")
    act = partial(on_call, *at, sends(signal.SIGTERM), after=moment != "sampling")
    codes = run(2, argv, tmp_path / "ended", before=on(rank, act))
    assert codes[rank] == 143 and codes[1 - rank] == 1
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:06d}"]
    assert f"go on with --resume {tmp_path / 'run'}" in printed(tmp_path / "ended", 0)
    assert errors(tmp_path / "ended", 2) == [] and printed(tmp_path / "ended", 1) == ""
    assert run(2, [*argv, "--resume"], tmp_path / "again") == [0, 0]
    assert differences(whole_of_two, tmp_path / "run") == []


def test_a_rank_that_hangs_ends_the_run_and_is_named_with_where_it_was_last_seen(model: Path, tmp_path: Path) -> None:
    def hangs() -> None:
        on_call(grpo_core.step, "score_groups", 2, partial(time.sleep, 600))

    def program() -> None:
        if os.environ["RANK"] == "1":
            hangs()
        grpo_core.train.main(command(model, tmp_path / "run", "--rank_timeout", "10"))

    (first, second), store = start(2, program, tmp_path / "printed")
    assert ended([first]) == [1]
    os.kill(second, signal.SIGKILL)
    assert ended([second]) == [-signal.SIGKILL]
    (line,) = errors(tmp_path / "printed", 1)
    assert line.startswith("error: rank 1 (last seen at: completions) has ended or hangs: after ")
    assert line.endswith("it has not come to: rewards")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000001"]


def refuses(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """As a judge that only one of the machines cannot reach."""
    if os.environ.get("RANK", "1") == "1":
        raise ConnectionError("no route to the judge")
    return length_reward(prompts, completions)


def test_the_error_of_one_rank_is_told_once_as_one_process_tells_it(model: Path, tmp_path: Path) -> None:
    flags = ["--rewards", "tests.test_ranks_runs:refuses"]
    codes = run(2, command(model, tmp_path / "run", *flags), tmp_path / "printed")
    assert codes == [1, 1]
    (line,) = errors(tmp_path / "printed", 2)
    row = 2  # the first of those that rank 1 scores
    beginning = "error: reward function refuses: raised ConnectionError: no route to the judge"
    assert line.startswith(f"{beginning} for row {row} of 4, whose completion is ")
    assert printed(tmp_path / "printed", 1).count("Traceback") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lrr", "1"], "error: --lrr: no such flag; did you mean --lr?"),
        (
            ["--prompts_per_step", "1"],
            "error: --prompts_per_step: 2 rows are too few for 4 ranks, of which each needs one",
        ),
    ],
)
def test_a_users_mistake_is_told_once_and_leaves_nothing(
    flags: list[str], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_core.run.joined, "PATIENCE", 60.0)  # however busy the machine is, rank 0 comes to tell
    codes = run(4, command(model, tmp_path / "run", *flags), tmp_path / "printed")
    assert codes[0] == 2 and 0 not in codes
    assert [printed(tmp_path / "printed", rank) for rank in (1, 2, 3)] == [""] * 3
    assert printed(tmp_path / "printed", 0).splitlines()[-1] == message
    assert not checkpoints(tmp_path / "run")
