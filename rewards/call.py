"""One reward function called on one batch, within a time limit, and what it returned.

The functions are the user's own, so they may do anything. What goes wrong becomes a `RewardError`, which names the
function and the row: a batch can hold thousands of texts, and its author needs the one that broke the function. The
row is found by calling the function again on single rows.

NaN is refused although TRL takes it for "no opinion": it is far more often a 0/0 than a decision. Return None instead.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from traceback import StackSummary, TracebackException
from typing import Any, NamedTuple, TypeVar

from rewards.functions import Completion, completion_text

RewardFunction = Callable[..., Sequence[float | None]]

T = TypeVar("T")

SHOWN = 200  # characters of a text in a message


class RewardError(ValueError):
    """A reward function that did not give every completion a finite number or None."""

    def __init__(self, name: str, problem: str, row: int | None = None, traceback: str = "") -> None:
        super().__init__(f"reward function {name}: {problem}")
        self.name, self.row = name, row  # row None: no single row fails by itself
        self.traceback = traceback  # of the function itself, where it raised or was stopped; else ''


class TimeUp(BaseException):
    """Not an `Exception`, so that the `except Exception` of the function that hangs does not catch it."""


class TrainerState(NamedTuple):
    """How far the run is, in optimizer steps, for rewards that change with it: two fields of transformers' class of
    this name, which TRL passes."""

    global_step: int
    max_steps: int


@dataclass(frozen=True)
class Batch:
    """What a reward function is called with, one entry a row, and the run's state."""

    prompts: Sequence[Completion]
    completions: Sequence[Completion]
    columns: dict[str, list[Any]]
    state: TrainerState | None = None
    before: int = 0  # rows of the step that another process scores, and how many rows the step has: for messages
    of: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Fresh lists: what a function does to them reaches neither the next function nor the learner."""
        columns = {"prompts": self.prompts, "completions": self.completions, **self.columns}
        state = {"trainer_state": self.state} if self.state else {}
        return {**{name: list(column) for name, column in columns.items()}, **state}

    def only(self, row: int) -> Batch:
        cut = {name: column[row : row + 1] for name, column in self.columns.items()}
        return replace(
            self, prompts=self.prompts[row : row + 1], completions=self.completions[row : row + 1], columns=cut
        )

    def named(self, row: int | None) -> str:
        """The row, for a message."""
        rows = self.of or len(self.completions)
        if row is None:
            return f"the batch of {rows} rows, but for none of them by itself"
        return f"row {self.before + row} of {rows}, whose completion is {shown(self.completions[row])}"


def call(name: str, function: RewardFunction, batch: Batch, seconds: float = 0.0) -> list[float | None]:
    """One value for each row of the batch: a float, or None for no opinion.

    >>> batch = Batch(["?", "?"], ["four", "4"], {})
    >>> call("digits", lambda completions, **columns: [text.isdigit() for text in completions], batch)
    [0.0, 1.0]
    >>> call("parity", lambda completions, **columns: [int(text) % 2 for text in completions], batch)
    Traceback (most recent call last):
    rewards.call.RewardError: reward function parity: raised ValueError: invalid literal for int() with base 10: \
'four' for row 0 of 2, whose completion is 'four'
    """
    try:
        returned = _returned(function, batch, seconds)
    except (Exception, SystemExit, TimeUp) as error:
        raise _failure(name, function, batch, seconds, error) from error
    count, values = len(batch.completions), _listed(returned)
    if values is None:
        raise RewardError(name, f"returned {_value(returned)}, not a list of {count} values")
    if len(values) != count:
        row = _first_row(batch, seconds, lambda one, left: _is_not_one_value(function, one, left))
        raise RewardError(name, f"returned {len(values)} values for {count} completions: {batch.named(row)}", row)
    return [_finite(name, batch, row, value) for row, value in enumerate(values)]


def _returned(function: RewardFunction, batch: Batch, seconds: float) -> Any:
    def run() -> Any:
        returned: Any = function(**batch.arguments())
        if inspect.iscoroutine(returned):  # an `async def`, which may await many answers at the same time
            returned = asyncio.run(returned)
        return list(returned) if isinstance(returned, Iterator) else returned  # a generator's body runs here

    return within(seconds, run)


def _failure(name: str, function: RewardFunction, batch: Batch, seconds: float, error: BaseException) -> RewardError:
    row = _first_row(batch, seconds, lambda one, left: _raises(type(error), function, one, left))
    return RewardError(name, f"{_problem(error, seconds)} for {batch.named(row)}", row, _own_traceback(error))


def _listed(returned: Any) -> list[Any] | None:
    """The values one by one: of a list, an array, a tensor; None where they are not in the order of the rows."""
    if isinstance(returned, (str, bytes, bytearray, Mapping, Set)):
        return None
    try:
        return list(returned)
    except TypeError:
        return None


def _finite(name: str, batch: Batch, row: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        # float('1.5') works, but a function that returns text returns the wrong thing.
        number = math.nan if isinstance(value, (str, bytes, bytearray)) else float(value)
    except Exception:  # whatever the value's own __float__ raises: a tensor of several elements a RuntimeError
        number = math.nan
    if not math.isfinite(number):
        place = f"row {batch.before + row}"
        problem = f"returned {_value(value)} for {place}; each value must be a finite number, or None for no opinion"
        raise RewardError(name, f"{problem}. That is {batch.named(row)}", row)
    return number


# --- which row was it?


def _first_row(batch: Batch, seconds: float, fails: Callable[[Batch, float], bool]) -> int | None:
    """The first row that fails by itself, where that is found in `seconds`."""
    if len(batch.completions) == 1:
        return 0
    start = time.monotonic()
    for row in range(len(batch.completions)):
        left = seconds - (time.monotonic() - start) if seconds else 0.0
        # A row that is stopped after less than half of the limit may be one of many slow ones.
        if seconds and left < seconds / 2:
            return None
        if fails(batch.only(row), left):
            return row
    return None


def _raises(kind: type[BaseException], function: RewardFunction, one: Batch, seconds: float) -> bool:
    try:
        _returned(function, one, seconds)
    except (Exception, SystemExit, TimeUp) as error:
        return isinstance(error, kind)  # another one may only mean that a single row is too few
    return False


def _is_not_one_value(function: RewardFunction, one: Batch, seconds: float) -> bool:
    try:
        values = _listed(_returned(function, one, seconds))
    except (Exception, SystemExit, TimeUp):
        return False
    return values is None or len(values) != 1


# --- what it says


def shown(completion: Completion) -> str:
    """The beginning of a text, escaped, on one line.

    >>> shown("so\\n#### 4"), shown("4" * 1000)[-24:]
    ("'so\\\\n#### 4'", "44'... (1000 characters)")
    """
    try:
        text = completion_text(completion)
    except (LookupError, TypeError):  # not the chat that it should be
        return _value(completion)
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text)} characters)"


def _value(value: Any) -> str:
    """On one line and short, whatever its `repr` does: that of an int of 5,000 digits raises."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = "a value that cannot be printed"
    return text if len(text) <= 60 else f"{text[:60]}... (a {type(value).__name__})"


def _problem(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimeUp):
        return f"did not return within {seconds:g} seconds (--reward_timeout)"
    try:
        text = " ".join(str(error).split())[:SHOWN]
    except Exception:
        text = ""
    chat = text.startswith("string indices must be integers")
    hint = " (is it written for chat messages? --reward_format chat)" if chat else ""
    return f"raised {type(error).__name__}" + (f": {text}{hint}" if text else "")


def _own_traceback(error: BaseException) -> str:
    """As Python prints it, without this file's lines."""
    report = TracebackException.from_exception(error)
    report.stack = StackSummary.from_list([frame for frame in report.stack if frame.filename != __file__])
    return "".join(report.format())


# --- the time limit


def within(seconds: float, function: Callable[[], T]) -> T:
    """What the function returns, if it does so within so many seconds; 0: however long it takes.

    An alarm, which costs two system calls. It reaches Python code, sleeps, locks, sockets and regular expressions; a C
    function that never looks for signals runs on. A function that sets an alarm of its own takes this one's place.

    Raises:
        TimeUp: it took longer, even where it caught that itself.
    """
    if not seconds or not _alarms_work():
        return function()
    armed, expired = True, False

    def expire(*_: object) -> None:
        nonlocal expired
        expired = True
        if armed:
            raise TimeUp(f"after {seconds:g} seconds")

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, expire)
    # Again every second, for a function with a bare `except:`.
    earlier, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            result = function()
        finally:
            armed = False  # an alarm from here on raises nothing: it could come in the middle of taking it off
    finally:
        left = max(earlier - (time.monotonic() - start), 1e-6) if earlier else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)  # first: an alarm without a handler ends the process
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
    if expired:
        raise TimeUp(f"after {seconds:g} seconds")
    return result


def _alarms_work() -> bool:
    """Alarms are for the main thread of a Unix process; elsewhere a warning says that there is no limit."""
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return True
    warnings.warn(
        "--reward_timeout is not in force: alarms need Unix and the main thread", RuntimeWarning, stacklevel=2
    )
    return False
