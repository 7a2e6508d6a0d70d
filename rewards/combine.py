"""From the names on the command line to one number per completion: reward functions, their weights, their sum."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.call import Batch, RewardFunction, TrainerState, call
from rewards.functions import (
    Completion,
    correctness_reward_func,
    int_reward_func,
    numeric_reward_func,
    soft_format_reward_func,
    soft_overlong_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

REWARDS: dict[str, RewardFunction] = {
    "correctness_reward_func": correctness_reward_func,
    "int_reward_func": int_reward_func,
    "strict_format_reward_func": strict_format_reward_func,
    "soft_format_reward_func": soft_format_reward_func,
    "xmlcount_reward_func": xmlcount_reward_func,
    "numeric_reward_func": numeric_reward_func,
    "soft_overlong_reward_func": soft_overlong_reward_func,
}


@dataclass(frozen=True)
class Reward:
    """One term of the sum."""

    name: str  # what the logs call it: the function's name, without the module
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of N completions."""

    total: list[float]  # N: sum of weight x value over the functions that gave one; nan where none did
    by_function: dict[str, list[float | None]]  # name -> N values before their weight; None: no opinion on this row
    weights: dict[str, float] = field(default_factory=dict)  # name -> weight; 1 where none is given

    def followed_by(self, other: Scores) -> Scores:
        """Both batches as one."""
        together = {name: values + other.by_function[name] for name, values in self.by_function.items()}
        return Scores(self.total + other.total, together, self.weights)

    def reordered(self, rows: Sequence[int]) -> Scores:
        """The numbered rows, in this order."""
        by_function = {name: [values[row] for row in rows] for name, values in self.by_function.items()}
        return Scores([self.total[row] for row in rows], by_function, self.weights)


def load_reward(name: str) -> RewardFunction:
    """The reward function of this name: one of `REWARDS`, `my_module:my_reward`, imported, or `my_file.py:my_reward`.

    >>> load_reward("numeric_reward_func") is REWARDS["numeric_reward_func"]
    True
    >>> load_reward("math:prod").__name__
    'prod'
    >>> load_reward("numeric")
    Traceback (most recent call last):
    ValueError: --rewards 'numeric': no such reward function; the nearest known name is numeric_reward_func. Accepted: \
correctness_reward_func, int_reward_func, strict_format_reward_func, soft_format_reward_func, xmlcount_reward_func, \
numeric_reward_func, soft_overlong_reward_func, or my_module:my_reward or my_file.py:my_reward, a function of your own
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.rpartition(":") if ".py:" in name else name.partition(":")
    if module_name.endswith(".py"):
        return _attribute(name, _module_of_file(name, Path(module_name)), attribute)
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(
            f"--rewards {name!r}: no such reward function{_nearest(name, REWARDS)}. Accepted: {', '.join(REWARDS)}, or "
            "my_module:my_reward or my_file.py:my_reward, a function of your own"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only a missing module is a slip on the command line; any other error inside it keeps its own traceback.
        raise ValueError(
            f"--rewards {name!r}: cannot import {module_name} ({error}). The module must be in the folder that "
            f"`python -m` is run from, on PYTHONPATH or installed. Known without one: {', '.join(REWARDS)}"
        ) from error
    return _attribute(name, module, attribute)


def _module_of_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--rewards {name!r}: {path} is not a file")
    # Under a name of its own, so that no installed module is taken for it; what lies beside it can be imported.
    spec = importlib.util.spec_from_file_location(f"rewards_file_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"--rewards {name!r}: {path}, line {error.lineno}: {error.msg}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _attribute(name: str, module: ModuleType, attribute: str) -> RewardFunction:
    function = getattr(module, attribute, None)
    if not callable(function):
        found = f"is {function!r:.60}, not a function" if hasattr(module, attribute) else "does not exist"
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        where = name.rpartition(":")[0]
        raise ValueError(f"--rewards {name!r}: {attribute} {found} in module {where}{_nearest(attribute, own)}")
    loaded: RewardFunction = function
    return loaded


def _nearest(name: str, known: Iterable[str]) -> str:
    # cutoff 0: a short guess such as 'int' is too unlike 'int_reward_func' for the default, and is clear all the same.
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest known name is {nearest[0]}" if nearest else ""


def load_rewards(names: Sequence[str], weights: Sequence[float] | None = None) -> list[Reward]:
    """The rewards of a run, in the order given; without weights each counts once.

    >>> [(reward.name, reward.weight) for reward in load_rewards(["numeric_reward_func", "math:prod"], [1.0, 0.5])]
    [('numeric_reward_func', 1.0), ('prod', 0.5)]
    """
    if not names:
        raise ValueError(f"--rewards: no reward function given. Accepted: {', '.join(REWARDS)}, my_module:my_reward")
    weights = weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"--reward_weights: {len(weights)} weights {list(weights)} for the {len(names)} functions {list(names)} of "
            "--rewards; give one weight for each, or none for all 1.0"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"--reward_weights: {list(weights)}; every weight must be a finite number")
    rewards = [
        # Logs have one column per function, named as TRL names it: without the module.
        Reward(name.rpartition(":")[2], load_reward(name), float(weight))
        for name, weight in zip(names, weights, strict=True)
    ]
    short_names = [reward.name for reward in rewards]
    for name, short_name in zip(names, short_names, strict=True):
        if short_names.count(short_name) > 1:
            raise ValueError(
                f"--rewards {name!r}: two functions called {short_name} in {list(names)}, and the logs tell functions "
                "apart by that name; give each function once, and rename one where two modules use the same name"
            )
    return rewards


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    columns: dict[str, list[Any]],
    timeout: float = 0.0,
    state: TrainerState | None = None,
    before: int = 0,
    of: int | None = None,
) -> Scores:
    """Call every reward function on the batch, each for at most `timeout` seconds (0: no limit), and sum the
    weighted values row by row. `before`, `of`: where messages are to count the rows within a larger batch.

    >>> rewards = load_rewards(["correctness_reward_func", "int_reward_func"], [1.0, 0.1])
    >>> scores = score(rewards, ["?", "?"], ["<answer>4</answer>", "<answer>5</answer>"], {"answer": ["4", "4"]})
    >>> scores.total
    [2.05, 0.05]
    >>> scores.by_function
    {'correctness_reward_func': [2.0, 0.0], 'int_reward_func': [0.5, 0.5]}

    Raises:
        RewardError: a function raised, took too long, or returned anything but a finite number or None for each row.
    """
    assert len({reward.name for reward in rewards}) == len(rewards), "two rewards of one name"
    lengths = {"completions": len(completions)} | {name: len(column) for name, column in columns.items()}
    assert set(lengths.values()) == {len(prompts)}, f"{len(prompts)} prompts, but {lengths}"

    check_signatures(rewards, [*columns, *(["trainer_state"] if state else [])])
    batch = Batch(prompts, completions, columns, state, before, of)
    by_function: dict[str, list[float | None]] = {
        reward.name: call(reward.name, reward.function, batch, timeout) if completions else [] for reward in rewards
    }
    total = []
    for row in range(len(completions)):
        terms = [(reward.weight, by_function[reward.name][row]) for reward in rewards]
        weighted = [weight * value for weight, value in terms if value is not None]
        # A sum over nothing would be 0, which says "worthless" where the functions said "no opinion".
        total.append(sum(weighted) if weighted else math.nan)
    return Scores(total, by_function, {reward.name: reward.weight for reward in rewards})


def check_signatures(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Refuse a reward function that cannot be called with these columns, before anything is sampled for it.

    >>> check_signatures(load_rewards(["numeric_reward_func"]), ["answer"])
    """
    for reward in rewards:
        arguments: dict[str, Any] = dict.fromkeys(["prompts", "completions", *columns])
        try:
            inspect.signature(reward.function).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"reward function {reward.name}: {error}. It is called with keywords: prompts, completions and one for "
                f"each column of the data, here {', '.join(columns) or 'none'}; write `**columns` for those it does "
                "not use"
            ) from None
