"""A reward function of one's own may do anything: what the message says of it, and that the run is saved first."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo_core.train
from rewards import Reward, RewardError, score
from rewards.call import within
from sft_core.model.tiny import build_tiny
from tests.helpers import message_of

ROWS = ["one", "two", "bad\n" + "x" * 500, "four"]
BAD = r"row 2 of 4, whose completion is 'bad\\nx{196}'\.\.\. \(504 characters\)$"
Function = Callable[..., Any]


def each(value: Callable[[str], Any]) -> Function:
    """A reward that does this for one completion after the other."""
    return lambda completions, **columns: [value(text) for text in completions]


def failure(function: Function, timeout: float = 0.0, rows: list[str] = ROWS) -> RewardError:
    """How `mine` fails on these completions, after a function that is fine."""
    fine = Reward("fine", each(lambda text: 1.0))
    with pytest.raises(RewardError) as caught:
        score([fine, Reward("mine", function)], ["?"] * len(rows), rows, {"answer": ["4"] * len(rows)}, timeout)
    error = caught.value
    assert str(error).startswith("reward function mine: ") and error.name == "mine" and "\n" not in str(error)
    return error


# --- functions that raise


def picky(text: str) -> float:
    if text.startswith("bad"):
        raise KeyError("no\nsuch key " + "k" * 1000)
    return 1.0


def test_a_function_that_raises_is_named_with_its_row_and_with_where_it_raised() -> None:
    error = failure(each(picky))
    assert error.row == 2 and re.search(BAD, str(error))
    assert str(error).startswith("reward function mine: raised KeyError: 'no\\nsuch key kkk") and len(str(error)) < 600
    assert "in picky\n" in error.traceback and error.traceback.startswith("Traceback")
    assert "rewards/call.py" not in error.traceback  # the user's lines alone
    assert isinstance(error.__cause__, KeyError)


def test_a_function_that_raises_for_no_row_by_itself_says_so() -> None:
    def spread(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise ZeroDivisionError("no spread")
        raise ValueError("one row is too few")  # another error, which says nothing of the first

    error = failure(spread)
    expected = "raised ZeroDivisionError: no spread for the batch of 4 rows, but for none of them by itself"
    assert error.row is None and str(error).endswith(expected)


def test_a_generator_that_raises_on_its_way_and_a_function_that_exits_are_named() -> None:
    def lazily(completions: list[str], **columns: Any) -> Iterator[float]:
        yield from map(picky, completions)

    assert failure(lazily).row == 2
    assert "raised SystemExit: 3 for row 2" in str(failure(each(lambda text: sys.exit(3) if "bad" in text else 1.0)))


def test_every_column_is_cut_to_the_row_that_is_tried_alone() -> None:
    calls = []

    def noting(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        calls.append((prompts, completions, answer))
        return [picky(text) for text in completions]

    failure(noting)
    assert calls == [(["?"] * 4, ROWS, ["4"] * 4), *((["?"], [text], ["4"]) for text in ROWS[:3])]


def test_what_a_function_does_to_its_lists_reaches_nobody_else() -> None:
    def greedy(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        answer.clear()
        return [float(bool(completions.pop())) for _ in range(len(completions))]

    completions, columns = ["a", "b"], {"answer": ["4", "5"]}
    assert score([Reward("greedy", greedy)], ["?", "?"], completions, columns).total == [1.0, 1.0]
    assert (completions, columns) == (["a", "b"], {"answer": ["4", "5"]})


# --- functions that return the wrong thing


@pytest.mark.parametrize("skipped", ["bad", "nothing"])
def test_a_wrong_number_of_values_names_both_numbers_and_the_row_that_is_skipped(skipped: str) -> None:
    def short(completions: list[str], **columns: Any) -> list[float]:
        kept = [text for text in completions if not text.startswith(skipped)]
        return [1.0 for _ in kept[: max(1, len(completions) - 1)]]

    error = failure(short)
    assert "returned 3 values for 4 completions: " in str(error)
    assert (error.row == 2 and re.search(BAD, str(error))) if skipped == "bad" else error.row is None


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "1.5", [1.0], object(), torch.zeros(2), torch.tensor(float("nan")), 10**5000, 1j],
    ids=lambda value: f"{value!s:.12}" if not isinstance(value, int) else "an int that cannot be printed",
)
def test_a_value_that_is_no_finite_number_names_its_row(value: Any) -> None:
    error = failure(each(lambda text: value if text.startswith("bad") else 1.0))
    assert error.row == 2 and re.search(BAD, str(error)) and len(str(error)) < 500
    assert " for row 2; each value must be a finite number, or None for no opinion. " in str(error)


@pytest.mark.parametrize(
    "returned", [None, 1.0, torch.tensor(1.0), "1234", {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {1.0, 2.0, 3.0, 4.0}]
)
def test_what_is_not_a_value_for_each_row_in_order_is_refused(returned: Any) -> None:
    error = failure(lambda completions, **columns: returned)
    assert str(error).endswith(", not a list of 4 values") and f"returned {repr(returned)[:4]}" in str(error)


def test_a_value_whose_own_methods_raise_is_refused_all_the_same() -> None:
    class Broken:
        def __float__(self) -> float:
            raise KeyError("float")

        def __repr__(self) -> str:
            raise KeyError("repr")

    assert "returned a value that cannot be printed for row 2" in str(
        failure(each(lambda text: Broken() if text.startswith("bad") else None))
    )


# --- functions that hang


def test_a_function_that_hangs_is_stopped_and_named_with_its_row_and_with_where_it_hung() -> None:
    def endless(text: str) -> float:
        while text.startswith("bad"):
            pass
        return 1.0

    start = time.monotonic()
    error = failure(each(endless), timeout=0.3)
    assert 0.5 < time.monotonic() - start < 10  # once the batch, once the row
    assert error.row == 2 and re.search(BAD, str(error))
    assert "did not return within 0.3 seconds (--reward_timeout) for row 2" in str(error)
    assert "in endless\n" in error.traceback


def backtrack(text: str) -> float:
    return float(bool(re.match(r"(a+)+$", "a" * 40 + "b")))


def keep_going(text: str) -> float:
    try:
        time.sleep(60)
    except Exception:
        pytest.fail("a function's own `except Exception` is not for the time limit")
    return 1.0


def sleep_again(text: str) -> float:
    try:
        time.sleep(60)
    except:  # noqa: E722
        time.sleep(60)
    return 1.0


def come_back_late(text: str) -> float:
    try:
        time.sleep(60)
    except:  # noqa: E722
        return 1.0
    return 1.0


@pytest.mark.parametrize("hang", [backtrack, lambda text: time.sleep(60), keep_going, sleep_again, come_back_late])
def test_regular_expressions_sleeps_and_functions_that_catch_everything_are_stopped_too(hang: Function) -> None:
    start = time.monotonic()
    error = failure(each(hang), timeout=0.2, rows=["one"])
    assert error.row == 0 and "did not return within 0.2 seconds" in str(error)
    assert time.monotonic() - start < 10


def test_many_slow_rows_are_not_blamed_on_the_one_at_which_the_time_was_up() -> None:
    error = failure(each(lambda text: time.sleep(0.5)), timeout=1.5)
    assert error.row is None and "for the batch of 4 rows, but for none of them by itself" in str(error)


def test_the_limit_is_each_functions_own_and_0_is_none() -> None:
    slow = [Reward(name, each(lambda text: time.sleep(0.5))) for name in ("a", "b", "c")]
    assert score(slow, ["?"], ["x"], {}, timeout=1.4).by_function == {"a": [None], "b": [None], "c": [None]}
    assert score(slow, ["?"], ["x"], {}, timeout=0).by_function["c"] == [None]


def test_no_alarm_is_left_and_an_earlier_one_goes_on() -> None:
    rung: list[int] = []
    earlier = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        assert within(5, lambda: 4) == 4
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        within(5, lambda: time.sleep(0.1))
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.9 and rung == []
        time.sleep(1.1)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def test_outside_the_main_thread_a_warning_says_that_there_is_no_limit() -> None:
    def in_thread() -> None:
        with pytest.warns(RuntimeWarning, match="--reward_timeout is not in force"):
            seen.append(within(0.01, lambda: time.sleep(0.1) or "done"))

    seen: list[Any] = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == ["done"]


def test_a_limit_that_is_no_time_is_refused() -> None:
    for value in ("-1", "nan", "inf"):
        assert message_of(["--reward_timeout", value]).startswith(f"--reward_timeout {float(value)}: expected 0 to 1e6")


# --- in a run


MODULE = """
import time
calls = 0

def judge(text):
    {body}
    return 1.0

def mine(prompts, completions, **columns):
    global calls
    calls += 1
    if calls < 3:
        return [len(text) % 7 / 4 for text in completions]
    {whole}
    return [judge(text) for text in completions]
"""
FAILURES = {
    "raises": ("1 / 0", "", r"raised ZeroDivisionError: division by zero for row 0 of 8, whose completion is '"),
    "short": ("", "return [1.0] * 7", r"returned 7 values for 8 completions: "),
    "nan": ("return float('nan')", "", r"returned nan for row 0; .* That is row 0 of 8, whose completion is '"),
    "none": ("", "return None", r"returned None, not a list of 8 values$"),
    "tensor": ("import torch; return torch.zeros(2)", "", r"returned tensor\(\[0\., 0\.\]\) for row 0; "),
    "hangs": ("time.sleep(60)", "", r"did not return within 0\.5 seconds \(--reward_timeout\) for row 0 of 8, "),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


def failing_run(folder: Path, model: Path, *flags: str) -> int:
    """The exit code of `python -m grpo_core.train`, small, whose reward fails at step 3."""
    argv = ["--model", str(model), "--task", "arithmetic", "--max_steps", "5", "--eval_problems", "0", "--lr", "1e-2"]
    argv += ["--prompt_format", "hash", "--system_prompt", "", "--prompts_per_step", "2", "--group_size", "4"]
    argv += [
        "--max_completion_tokens",
        "6",
        "--max_prompt_tokens",
        "90",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--no_progress",
    ]
    argv += ["--rewards", "numeric_reward_func", "failing_module:mine", "--output_dir", str(folder)]
    with pytest.raises(SystemExit) as caught:
        grpo_core.train.main([*argv, *flags])
    return int(str(caught.value.code))


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, whole: str) -> None:
    (folder / "failing_module.py").write_text(MODULE.format(body=body or "pass", whole=whole or "pass"))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "failing_module", raising=False)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_is_saved_before_a_failing_reward_function_ends_it_by_name_and_row(
    kind: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body, whole, message = FAILURES[kind]
    write_module(tmp_path, monkeypatch, body, whole)
    assert failing_run(tmp_path / "run", model, "--reward_timeout", "0.5") == 1
    lines = capsys.readouterr().err.splitlines()
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert lines[:2] == ["", f"saved: {saved}; go on with --resume {tmp_path / 'run'}"]
    assert re.match("error: reward function mine: " + message, lines[-1])
    own = 'failing_module.py", line' in "".join(lines)
    assert own == (kind in ("raises", "hangs")) and len(lines) == (3 if not own else len(lines))
    assert not any("rewards/call.py" in line or "grpo_core" in line for line in lines[2:])  # the user's own lines alone

    trained, start = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (saved, model))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"kind": "train"') == 2


def test_a_step_that_was_saved_already_is_not_saved_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, monkeypatch, "1 / 0", "")
    assert failing_run(tmp_path / "run", model, "--save_every", "1") == 1
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
