"""A reward function of one's own may do anything: what the message says of it, and that the run is saved first."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rewards import Reward, RewardError, score
from rewards.call import within
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


def test_a_function_that_changes_its_lists_changes_nobody_elses() -> None:
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


def test_a_value_whose_own_methods_raise_is_refused_too() -> None:
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


def test_no_alarm_is_left_and_an_earlier_one_keeps_running() -> None:
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
