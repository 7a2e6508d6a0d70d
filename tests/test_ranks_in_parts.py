"""Ranks that share out the weights (--parallel fsdp): the same runs, and each holds a part only."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import grpo_core.step
import sft_core.run.progress
import sft_core.train
from benchmarks.families.build import small_config, small_model
from grpo_core.step import grpo_step
from sft_core.learn import ranks
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Rows, pack_rows
from sft_core.learn.shards import in_parts, load_weights, whole, whole_policy
from sft_core.model.policy import Policy, without_dropout
from sft_core.run.checkpoint import checkpoints
from sft_core.run.progress import Progress
from tests.faulty import FORKS, SFT, command, dies, on_call, sends
from tests.helpers import PEFT_IS_BEHIND, adapted, checkpoint_activations, grpo_config, tiny_policy
from tests.killing import differences
from tests.test_ranks import EXAMPLES, SEED, parts_for
from tests.test_ranks_apart import in_ranks
from tests.test_ranks_runs import assert_like, errors, on, printed, run

pytestmark = [FORKS, pytest.mark.filterwarnings(PEFT_IS_BEHIND)]

FSDP = ("--parallel", "fsdp")
ROWS = pack_rows([[5, 6]] * 6, [[7, 8, 2], [9, 2], [7, 9, 8, 2]] * 2, pad_id=0)


def learning(
    policy: Policy, optimizer: Optimizer, factor: Callable[[int], float] = lambda row: 1.0
) -> Callable[[slice, Rows], int]:
    """The sum of the rows' log-probabilities, each times its factor."""

    def learn(at: slice, micro: Rows) -> int:
        logp_NT, _ = token_logprobs(policy, micro)
        factor_N1 = torch.tensor([[factor(row)] for row in range(at.start, at.stop)])
        optimizer.backward((logp_NT * factor_N1).sum())
        return at.start

    return learn


def in_ways(parallel: str = "fsdp", precision: Literal["float32", "fp16"] = "float32") -> tuple[Policy, Optimizer]:
    policy = in_parts(tiny_policy(precision=precision), grpo_config(parallel=parallel))
    return policy, Optimizer(policy, grpo_config(micro_batch=2), 10)


def test_each_rank_holds_its_part_of_weights_gradients_moments_and_reference(tmp_path: Path) -> None:
    def check() -> None:
        parts = parts_for("mu 2 with KL", torch.float32, "fsdp")
        optimizer, reference = parts.optimizer, parts.reference
        held = list[int]()
        clip_and_step = optimizer.clip_and_step

        def watched() -> tuple[float, bool]:
            held.append(sum(p.grad.to_local().numel() for p in optimizer.parameters))
            return clip_and_step()

        optimizer.clip_and_step = watched  # type: ignore[method-assign]
        torch.manual_seed(SEED)
        grpo_step(parts, EXAMPLES)
        assert reference
        moments = [state[name] for state in optimizer.adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
        for tensors, times in ((optimizer.parameters, 1), (moments, 2), (reference.policy.model.parameters(), 1)):
            held.append(sum(each.to_local().numel() for each in tensors if isinstance(each, DTensor)) // times)
        total = sum(p.numel() for p in optimizer.parameters)
        assert all(abs(count - total / 2) < total / 50 for count in held), (held, total)

    in_ranks(2, check, tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_in_parts_is_put_together_again_and_takes_other_weights(lora: bool, tmp_path: Path) -> None:
    plain = adapted(tiny_policy()) if lora else tiny_policy()
    weights = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    plain.save(tmp_path / "saved")

    def check() -> None:
        policy = in_parts(adapted(tiny_policy()) if lora else tiny_policy(), grpo_config(parallel="fsdp"))
        together = whole_policy(policy)
        if ranks.first():
            found = dict(together.model.named_parameters())
            assert all(torch.equal(found[name], weight) for name, weight in weights.items())
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.zero_()
        load_weights(policy, lambda plain: plain.load(tmp_path / "saved"))
        for name, parameter in policy.trainable():
            assert torch.equal(whole(parameter.detach()), weights[name]), name

    in_ranks(2, check, tmp_path)


def gradients(policy: Policy, parallel: str) -> dict[str, Tensor]:
    policy = in_parts(policy, grpo_config(parallel=parallel))
    policy.model.train()
    optimizer = Optimizer(policy, grpo_config(micro_batch=2), 10)
    optimizer.accumulate(ROWS, learning(policy, optimizer))
    return {name: whole(p.grad).clone() for name, p in policy.trainable() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    def check() -> None:
        plain = gradients(tiny_policy(dtype=torch.float64), "ddp")
        policy = tiny_policy(dtype=torch.float64)
        checkpoint_activations(policy)
        found = gradients(policy, "fsdp")
        assert found.keys() == plain.keys()
        assert all(torch.allclose(found[name], its, rtol=0, atol=1e-12) for name, its in plain.items())

    in_ranks(2, check, tmp_path)


def test_families_whose_layers_share_weights_or_lie_in_one_another(tmp_path: Path) -> None:
    def policy_of(family: str) -> Policy:
        tokenizer = tiny_policy().tokenizer
        ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = small_model(small_config(family, len(tokenizer), ids))
        without_dropout(model)
        return replace(tiny_policy(), model=model, layout="rows", split_head=family != "bert")

    def check() -> None:
        for family in ("zamba2", "bert", "mbart", "gpt2"):
            plain, found = gradients(policy_of(family), "ddp"), gradients(policy_of(family), "fsdp")
            assert found.keys() == plain.keys()
            largest = max(float(its.abs().max()) for its in plain.values())
            assert all((found[name] - its).abs().max() < 1e-5 * largest for name, its in plain.items()), family

    in_ranks(2, check, tmp_path)


def test_a_row_that_is_not_finite_on_one_rank_is_skipped_and_named_by_all(tmp_path: Path) -> None:
    def check() -> None:
        policy, optimizer = in_ways()
        before = [whole(p.detach()).clone() for p in optimizer.parameters]
        optimizer.accumulate(ROWS, learning(policy, optimizer, lambda row: math.nan if row == 4 else 1.0))
        assert optimizer.clip_and_step()[1] is False
        assert (optimizer.skipped, optimizer.skipped_rows) == (1, [4])
        assert all(map(torch.equal, before, map(whole, optimizer.parameters)))

    in_ranks(2, check, tmp_path)


def test_a_gradient_that_overflows_on_one_rank_halves_the_loss_scale_of_all(tmp_path: Path) -> None:
    def check() -> None:
        found = []
        for parallel in ("fsdp", "ddp"):
            policy, optimizer = in_ways(parallel, "fp16")
            scale = optimizer.scaler.get_scale()
            optimizer.accumulate(ROWS, learning(policy, optimizer, lambda row: 1e38 if row == 4 else 1.0))
            assert optimizer.clip_and_step()[1] is True
            assert optimizer.scaler.get_scale() == scale / 2
            again = True
            while again:
                optimizer.accumulate(ROWS, learning(policy, optimizer))
                norm, again = optimizer.clip_and_step()
            found.append((optimizer.scaler.get_scale(), norm))
        (in_parts, its), (whole, norm) = found
        assert in_parts == whole and its == pytest.approx(norm, rel=1e-3)

    in_ranks(2, check, tmp_path)


def test_after_a_pass_that_counts_for_nothing_gradients_count_again(tmp_path: Path) -> None:
    """Of five rows rank 0 has two, and passes one micro-batch less than rank 1."""

    def check() -> None:
        policy, optimizer = in_ways()
        optimizer.micro_batch = 1
        rows = ROWS.cut(0, 5)
        learned = optimizer.accumulate(rows, learning(policy, optimizer))
        assert learned == [0, 1, 2, 3, 4]
        assert len(rows.part(0, 2)) == 2 and len(rows.part(1, 2)) == 3
        optimizer.loss = torch.zeros(())
        optimizer.backward(sum((whole(p) * 0).sum() for p in optimizer.parameters[:1]) + 1.0)
        assert optimizer.loss == 1

    in_ranks(2, check, tmp_path)


def test_memory_that_runs_out_on_one_rank_ends_all(tmp_path: Path) -> None:
    """The others wait for it in the middle of a pass, which it cannot repeat alone."""

    def check() -> None:
        policy, optimizer = in_ways()
        learn = learning(policy, optimizer)

        def learn_little(at: slice, micro: Rows) -> int:
            if ranks.rank() == 1:
                raise torch.OutOfMemoryError("too much")
            return learn(at, micro)

        with pytest.raises(ranks.Lost if ranks.rank() == 0 else torch.OutOfMemoryError):
            optimizer.accumulate(ROWS, learn_little)

    in_ranks(2, check, tmp_path)


# --- whole runs


@pytest.fixture(scope="module")
def whole_of_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, by two ranks."""
    folder = tmp_path_factory.mktemp("parts")
    assert run(2, command(model, folder / "run", *FSDP), folder / "printed") == [0, 0]
    return folder / "run"


def test_a_run_in_parts_leaves_what_one_process_leaves(whole_of_two: Path, whole: Path) -> None:
    assert_like(whole_of_two, whole)


def test_supervised_fine_tuning_too(model: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        argv = command(model, tmp_path / str(count), *FSDP, own=[*SFT, "--batch_size", "5"])
        assert run(count, argv, tmp_path / f"printed-{count}", sft_core.train.main) == [0] * count
    assert_like(tmp_path / "2", tmp_path / "1")


def test_checkpoints_are_read_by_any_number_of_ranks_whole_or_in_parts(
    begun: dict[int, Path], model: Path, whole: Path, tmp_path: Path
) -> None:
    """One process has saved step 1; two ranks with parts go on and save step 2; two with all weights finish, and four
    with parts."""
    last = Path(shutil.copytree(begun[1], tmp_path / "run"))
    argv = [*command(model, last), "--resume"]
    codes = run(2, [*argv, *FSDP], tmp_path / "two", before=on(0, partial(on_call, Progress, "save", 1, dies, True)))
    assert codes == [9, 1]
    assert [path.name for path in checkpoints(last)] == ["step-000001", "step-000002"]
    for count, flags in ((2, ("--parallel", "ddp")), (4, FSDP)):
        again = shutil.copytree(last, tmp_path / str(count))
        argv = [*command(model, again, *flags), "--resume"]
        assert run(count, argv, tmp_path / f"printed-{count}") == [0] * count
        assert_like(again, whole)


@pytest.mark.parametrize("moment, rank", [("sampling", 1), ("learning", 0), ("saving", 1)])
def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    moment: str, rank: int, model: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    """The other says so, and the next start ends with the same bits."""
    at = {
        "sampling": (grpo_core.step, "sample", 3),
        "learning": (Optimizer, "backward", 3),
        "saving": (sft_core.run.progress, "whole_policy", 3),
    }
    argv = [*command(model, tmp_path / "run", *FSDP), "--resume"]
    codes = run(2, argv, tmp_path / "killed", before=on(rank, partial(on_call, *at[moment], dies)))
    assert codes == ([9, 1] if rank == 0 else [1, 9])
    (line,) = errors(tmp_path / "killed", 2)
    assert line.startswith(f"error: rank {rank} (last seen at: ") and "has ended or hangs" in line
    assert run(2, argv, tmp_path / "again") == [0, 0]
    assert differences(whole_of_two, tmp_path / "run") == []


def test_after_a_signal_to_one_rank_all_complete_the_step_and_save_it(
    model: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    argv = command(model, tmp_path / "run", "--save_every", "0", *FSDP)
    act = partial(on_call, grpo_core.step, "sample", 2, sends(signal.SIGTERM))
    assert run(2, argv, tmp_path / "ended", before=on(1, act)) == [143, 143]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert f"go on with --resume {tmp_path / 'run'}" in printed(tmp_path / "ended", 0)
    assert errors(tmp_path / "ended", 2) == [] and printed(tmp_path / "ended", 1) == ""
    assert run(2, [*argv, "--resume"], tmp_path / "again") == [0, 0]
    assert differences(whole_of_two, tmp_path / "run") == []
