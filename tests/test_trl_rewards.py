"""Reward functions written for TRL run unchanged: called for texts and for conversations, `async` ones, too."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_core.scoring import score_groups
from grpo_core.step import sample_groups
from rewards import Reward, RewardError, TrainerState, load_reward
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_messages
from tests.helpers import grpo_config, tiny_policy

# The shapes of TRL's documentation ("Using a custom reward function"), in words of this project's own.


def by_length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def tagged(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^[a-z ]*$", content, re.DOTALL) else 0.25 for content in contents]


def boxed(completions: list[Any], target: list[str], **kwargs: Any) -> list[float | None]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(wanted in text) if wanted else None for text, wanted in zip(texts, target, strict=True)]


async def asked_at_once(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    asked = 0

    async def ask(text: str) -> float:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return float(asked)  # all have begun before the first ends

    return list(await asyncio.gather(*(ask(str(completion)) for completion in completions)))


def shaped(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


FUNCTIONS = {"text": [by_length, boxed, asked_at_once, shaped], "chat": [tagged, boxed, asked_at_once, shaped]}
EXAMPLES = [Example(f"What is {n}?", f"#### {n}", str(n), columns={"target": "a" if n else None}) for n in range(2)]


def values(form: str) -> dict[str, list[float | None]]:
    config = grpo_config(group_size=3, reward_format=form)
    samples = sample_groups(tiny_policy(), EXAMPLES, config)
    rewards = [Reward(function.__name__, function) for function in FUNCTIONS[form]]
    scores, _ = score_groups(rewards, samples, EXAMPLES, config, TrainerState(3, 12))
    return {"texts": samples.texts, **scores.by_function}  # type: ignore[dict-item]


@pytest.mark.parametrize("form", FUNCTIONS)
def test_trls_trainer_gives_the_same_values(form: str) -> None:
    trl = pytest.importorskip("trl")
    mine = values(form)
    trainer = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    config = grpo_config(group_size=3)
    rows: list[dict[str, Any]] = []
    for example in EXAMPLES:
        prompt: Any = example.question if form == "text" else prompt_messages(example, config)
        rows += [{"prompt": prompt, "answer": example.answer, **example.columns}] * 3
    texts: list[Any] = mine["texts"]
    completions = texts if form == "text" else [[{"role": "assistant", "content": text}] for text in texts]
    found = theirs(trainer, FUNCTIONS[form], rows, completions)
    for column, function in enumerate(FUNCTIONS[form]):
        expected = [float("nan") if value is None else value for value in mine[function.__name__]]
        assert torch.equal(found[:, column].nan_to_num(-9), torch.tensor(expected).nan_to_num(-9)), function.__name__


def theirs(trainer: Any, functions: list[Any], rows: list[dict[str, Any]], completions: list[Any]) -> torch.Tensor:
    """TRL's own `_calculate_rewards`, with the attributes that it reads."""
    import threading

    from accelerate import Accelerator
    from transformers import TrainerState as Theirs

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    for name, value in {
        "accelerator": Accelerator(cpu=True),
        "args": SimpleNamespace(report_to=[], device=torch.device("cpu")),
        "reward_funcs": functions,
        "reward_processing_classes": [None] * len(functions),
        "reward_func_names": [function.__name__ for function in functions],
        "state": Theirs(global_step=3, max_steps=12),
        "environments": None,
        "async_loop": loop,
        "_log_completion_extra": lambda *_: None,
        "_log_metric": lambda *_: None,
        "_metrics": {"train": {}},
    }.items():
        object.__setattr__(trainer, name, value)
    try:
        return trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, [[1]] * len(rows))  # type: ignore[no-any-return]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_async_answers_are_asked_for_at_the_same_time() -> None:
    assert values("text")["asked_at_once"] == [6.0] * 6


def test_the_trainer_state_tells_how_far_the_run_is() -> None:
    assert values("chat")["shaped"] == [0.25] * 6


def test_a_function_for_conversations_that_gets_texts_is_told_of_the_flag() -> None:
    config = grpo_config(group_size=3)
    samples = sample_groups(tiny_policy(), EXAMPLES, config)
    with pytest.raises(RewardError, match="written for chat messages. --reward_format chat"):
        score_groups([Reward("tagged", tagged)], samples, EXAMPLES, config)


def test_a_function_is_loaded_from_a_file_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def half(text):\n    return len(text) / 2\n")
    path = tmp_path / "my-rewards.py"
    path.write_text("from beside import half\ndef mine(completions, **_):\n    return [half(c) for c in completions]\n")
    assert load_reward(f"{path}:mine")(completions=["abcd"]) == [2.0]
    with pytest.raises(ValueError, match="mein does not exist in .*my-rewards.py; the nearest known name is mine"):
        load_reward(f"{path}:mein")
    with pytest.raises(ValueError, match="none.py is not a file"):
        load_reward(f"{tmp_path}/none.py:mine")
    path.write_text("def mine(:\n")
    with pytest.raises(ValueError, match="my-rewards.py, line 1: "):
        load_reward(f"{path}:mine")
