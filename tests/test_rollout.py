"""Every row keeps its own prompt, tokens, log-probabilities and rewards, also where
groups of equal rewards are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.dynamic import equal_groups, replacing_equal_groups
from grpo_core.dynamic import joined as joined_samples
from grpo_core.metrics import Tally, step_record
from grpo_core.step import Rollout, StepReport, grpo_step, sample_groups
from grpo_core.train import PromptSource
from rewards import Reward, Scores, load_rewards
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import pack_rows
from sft_core.model.policy import Policy
from sft_core.text.example import Example
from sft_core.text.prompts import encode_prompt, prompt_messages
from sft_core.text.tasks import Task
from tests.helpers import caught, ends_often, grpo_config, tiny_policy, with_samples

# Prompts of unlike lengths: a group that takes another's place needs other padding.
STOCK = [Example(" ".join([f"No {i}."] * (1 + 5 * (i % 3))) + " How many?", f"#### {i}", str(i)) for i in range(12)]


def number_of(question: str) -> int:
    return int(question.split()[1].rstrip("."))


@dataclass
class Varied:
    """A reward that differs within the groups of some problems and is equal within all others'. It keeps its calls."""

    problems: set[int]
    called: list[list[int]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        numbers = [number_of(prompt) for prompt in prompts]
        self.called.append(numbers)
        # Told apart by problem and by row: 3.0, 3.1, 3.2, ... for problem 3.
        return [number + 0.1 * (row % 3) * (number in self.problems) for row, number in enumerate(numbers)]


@dataclass
class Further:
    """The rest of the stock, as `PromptSource` gives the task's; it keeps what it was asked for."""

    at: int = 4
    asked: list[int] = field(default_factory=list)

    def __call__(self, count: int) -> list[Example]:
        self.asked.append(count)
        self.at += count
        return STOCK[self.at - count : self.at]


def dynamic(varied: set[int], attempts: int = 3, **fields: Any) -> tuple[StepReport, Further, Varied, Any]:
    """A step on problems 0 to 3 that replaces groups of equal rewards by those of problems 4, 5, ..."""
    reward, further = Varied(varied), Further()
    config = grpo_config(prompts_per_step=4, dynamic_sampling=attempts, micro_batch=5, **fields)
    parts = caught(ends_often(tiny_policy()), config, reward)
    torch.manual_seed(0)
    return (
        grpo_step(replace(parts, roll_out=replacing_equal_groups(further)), STOCK[:4]),
        further,
        reward,
        parts.optimizer,
    )


def problems(report: StepReport) -> list[int]:
    return [number_of(example.question) for example in report.rollout.examples]


# --- dynamic sampling ---


def test_groups_of_equal_rewards_are_replaced_in_their_place_by_those_of_further_prompts() -> None:
    report, further, reward, _ = dynamic({0, 2, 4, 5})
    assert problems(report) == [0, 4, 2, 5]
    assert further.asked == [2] and [sorted(set(call)) for call in reward.called] == [[0, 1, 2, 3], [4, 5]]
    assert report.rollout.replaced == 2


def test_only_what_is_equal_again_is_replaced_again() -> None:
    report, further, _, _ = dynamic({0, 5, 7, 8})
    assert problems(report) == [0, 7, 5, 8]  # 4, 5, 6 for 1, 2, 3; then 7 and 8 for 4 and 6
    assert further.asked == [3, 2]


@pytest.mark.parametrize(("attempts", "asked"), [(1, [4]), (2, [4, 4]), (3, [4, 4])])
def test_groups_are_replaced_no_more_often_than_allowed_and_no_more_than_needed(
    attempts: int, asked: list[int]
) -> None:
    report, further, _, _ = dynamic({8, 9, 10, 11}, attempts)
    assert further.asked == asked and report.rollout.replaced == sum(asked)


def test_groups_that_are_equal_to_the_end_stay_and_give_zero_gradient() -> None:
    report, further, _, optimizer = dynamic(set(), attempts=2)
    assert problems(report) == [8, 9, 10, 11] and further.asked == [4, 4] and report.rollout.replaced == 8
    (gradient,) = optimizer.gradients
    assert all((g == 0).all() for g in gradient.values())


def test_nothing_is_drawn_where_every_group_differs() -> None:
    report, further, reward, _ = dynamic({0, 1, 2, 3})
    assert problems(report) == [0, 1, 2, 3] and not further.asked and len(reward.called) == 1
    assert report.rollout.replaced == 0


def test_nothing_is_drawn_where_dynamic_sampling_is_off() -> None:
    assert grpo_config().dynamic_sampling == 0
    report, further, reward, _ = dynamic(set(), attempts=0)
    assert problems(report) == [0, 1, 2, 3] and not further.asked and len(reward.called) == 1


def rows_agree(rollout: Rollout, policy: Policy, config: GRPOConfig, reward: Varied) -> None:
    """Everything that a rollout says of a row is said of that row."""
    G, samples = config.group_size, rollout.samples
    repeated = [example for example in rollout.examples for _ in range(G)]
    prompts = [encode_prompt(policy.tokenizer, prompt_messages(example, config)) for example in repeated]
    assert samples.rows.prompt_ids() == prompts
    special = {0, 1, 2}
    ids_of_rows = samples.rows.completion_ids()
    for ids, text, cut_off in zip(ids_of_rows, samples.texts, samples.truncated_N.tolist(), strict=True):
        assert text == policy.tokenizer.decode([token for token in ids if token not in special])
        assert cut_off == (ids[-1] not in policy.eos_ids)
    with torch.no_grad():
        learned_NT, _ = token_logprobs(policy, samples.rows, config.temperature)
    torch.testing.assert_close(samples.logp_NT, learned_NT, rtol=0, atol=1e-5)
    expected = [
        number_of(example.question) + 0.1 * (row % 3) * (number_of(example.question) in reward.problems)
        for row, example in enumerate(repeated)
    ]
    assert rollout.reward_BG.flatten().tolist() == rollout.scores.total == expected
    assert rollout.scores.by_function == {"reward": expected}


def test_every_row_of_the_joined_batch_keeps_its_own_tokens_logprobs_and_rewards() -> None:
    report, _, reward, _ = dynamic({0, 5, 7, 8})
    rollout, rows = report.rollout, report.rollout.samples.rows
    config = grpo_config(prompts_per_step=4)
    rows_agree(rollout, ends_often(tiny_policy()), config, reward)
    # Rows of unlike lengths were joined, and nothing is wider than its longest row.
    assert rows.prompt_len_N.unique().numel() > 2 and rows.completion_len_N.unique().numel() > 2
    assert rows.prompt_width == rows.prompt_len_N.max() and rows.mask_NT.shape[1] == rows.completion_len_N.max()
    assert (rollout.samples.logp_NT[~rows.mask_NT] == 0).all()
    assert Tally.of(report).gap["sampler_gap_max"] < 1e-5
    assert report.advantage_BG.tolist() == [pytest.approx([-0.999, 0, 0.999], abs=1e-3)] * 4


def test_replaced_groups_are_learned_as_if_they_had_been_sampled_at_first() -> None:
    policy, config = ends_often(tiny_policy()), grpo_config(prompts_per_step=4, micro_batch=5)
    report, _, reward, optimizer = dynamic({0, 5, 7, 8})
    again = with_samples(caught(policy, config, Varied(reward.problems)), report.rollout.samples)
    grpo_step(again, report.rollout.examples)
    for name, gradient in again.optimizer.gradients[0].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(gradient, optimizer.gradients[0][name], rtol=0, atol=1e-7)


def test_replaced_groups_are_counted_in_the_log_and_the_others_only_once() -> None:
    report, _, _, _ = dynamic({0, 5, 7, 8})
    record = step_record(report)
    assert record["replaced_groups"] == 5 and record["zero_variance_share"] == 0
    assert record["tokens_generated"] == int(report.rollout.samples.rows.completion_len_N.sum())


def some_samples(lengths: list[int], logp_width: int, first: int) -> Samples:
    """Hand-made samples whose every number says which row it belongs to."""
    rows = pack_rows(
        [[first + i] * (i + 1) for i in range(len(lengths))], [[first + i] * n for i, n in enumerate(lengths)], 0
    )
    logp_NT = torch.where(rows.mask_NT, -(first + torch.arange(len(lengths)))[:, None].float(), 0.0)
    logp_NT = torch.nn.functional.pad(logp_NT, (0, logp_width - logp_NT.shape[1]))
    return Samples(
        rows, [str(first + i) for i in range(len(lengths))], torch.tensor([n == 4 for n in lengths]), logp_NT
    )


@pytest.mark.parametrize("chosen", [[0, 3, 2], [4, 3], [1, 0], [2, 4, 0, 1, 3]])
def test_joined_samples_are_the_chosen_rows_padded_anew(chosen: list[int]) -> None:
    lengths, other = [2, 4, 1], [3, 1]
    joined = joined_samples(some_samples(lengths, 4, 10), some_samples(other, 3, 13), chosen)
    assert joined.texts == [str(10 + row) for row in chosen]
    for at, row in enumerate(chosen):
        length = (lengths + other)[row]
        assert joined.rows.completion_ids()[at] == [10 + row] * length
        assert joined.rows.prompt_ids()[at] == [10 + row] * (row + 1 if row < 3 else row - 2)
        assert joined.logp_NT[at].tolist() == [-(10 + row)] * length + [0] * (joined.rows.mask_NT.shape[1] - length)
        assert joined.truncated_N[at] == (length == 4)


def test_the_data_continues_after_the_prompts_that_replaced_others() -> None:
    task = Task("stock", STOCK, [])
    order = [number_of(example.question) for example in task.draw(0, 12, seed=5)]
    source = PromptSource(task, seed=5)
    # The second and the fourth group are equal, and so is the first of their replacements.
    parts = caught(ends_often(tiny_policy()), grpo_config(dynamic_sampling=2), Varied({order[i] for i in (0, 2, 5, 6)}))
    report = grpo_step(replace(parts, roll_out=replacing_equal_groups(source)), source(4))
    assert problems(report) == [order[0], order[6], order[2], order[5]] and source.position == 7
    assert [number_of(example.question) for example in source(3)] == order[7:10]


# --- rewards ---


@pytest.mark.parametrize(("buffer", "at"), [(4, 4), (0, 1), (8, 8), (2, 2)])
def test_the_soft_overlong_reward_knows_the_runs_budget_and_buffer(buffer: int, at: int) -> None:
    """A budget of 8 tokens; a buffer of 0 stands for a fifth of it."""
    parts = caught(ends_often(tiny_policy()), grpo_config(group_size=4, overlong_buffer=buffer))
    parts = replace(parts, rewards=load_rewards(["soft_overlong_reward_func"]))
    torch.manual_seed(0)
    report = grpo_step(parts, STOCK[:2])
    lengths = report.rollout.samples.rows.completion_len_N.tolist()
    assert min(lengths) < 8 == max(lengths)
    expected = [-max(0, length - (8 - at)) / at for length in lengths]
    assert report.rollout.reward_BG.flatten().tolist() == pytest.approx(expected)
    assert report.rollout.scores.by_function["soft_overlong_reward_func"] == pytest.approx(expected)


def test_reward_functions_get_each_rows_tokens_without_padding() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Sequence[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(prompts)

    policy, config = ends_often(tiny_policy()), grpo_config(group_size=4)
    samples = sample_groups(policy, STOCK[:2], config)
    grpo_step(with_samples(caught(policy, config, reward), samples), STOCK[:2])
    assert seen["completion_ids"] == samples.rows.completion_ids()
    assert seen["max_completion_tokens"] == [8] * 8 and seen["overlong_buffer"] == [1] * 8


def test_shuffled_rewards_move_a_rows_values_together() -> None:
    config = grpo_config(group_size=4, shuffle_rewards=True, reward_weights=[1.0, 100.0])
    one = Reward("one", lambda prompts, **_: list(range(len(prompts))))
    hundred = Reward("hundred", lambda prompts, **_: [None if i == 3 else float(i) for i in range(len(prompts))], 100.0)
    parts = replace(caught(ends_often(tiny_policy()), config), rewards=[one, hundred])
    torch.manual_seed(0)
    report = grpo_step(parts, STOCK[:2])
    scores = report.rollout.scores
    dealt = scores.by_function["one"]
    assert sorted(dealt) == list(range(8)) and dealt != list(range(8))  # type: ignore[type-var]
    assert scores.by_function["hundred"] == [None if value == 3 else value for value in dealt]
    assert scores.total == [value if value == 3 else 101 * value for value in dealt]  # type: ignore[operator]
    assert report.rollout.reward_BG.flatten().tolist() == scores.total


def test_groups_that_differ_in_each_function_are_kept_though_their_sums_are_equal() -> None:
    """Where each reward function is normalised by itself, equal sums of different values teach all the same."""
    values: dict[str, list[float | None]] = {"a": [0, 1, 2, 3, 5, 5, 5, 5], "b": [3, 2, 1, 0, 1, 1, 1, 1]}
    samples: Any = None  # not looked at
    total = [3.0] * 4 + [6.0] * 4
    rollout = Rollout([], samples, Scores(total, values), torch.tensor(total, dtype=torch.float64).view(2, 4))
    assert equal_groups(rollout, grpo_config()).tolist() == [True, True]
    decoupled = grpo_config(reward_aggregation="normalize_then_sum")
    assert equal_groups(rollout, decoupled).tolist() == [False, True]
