"""Trusted by test, not by name: the learner's shortcuts are tried on the very model that was loaded.

The learner computes logits as head(backbone), and lays rows one behind the other, for attention to cut. Both are
right for most models and silently wrong for some: logits may be scaled behind the head, positions may be counted by
the model itself, masks ignored. So a few short rows are scored by the plain model, one at a time and unpadded, and then
as the learner does it. A shortcut that gives other numbers is switched off, in one line; where the plainest way is
wrong, too, the run is refused. Faults that only long texts show (sliding windows) are known by the model's config.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.model.segments import Layout, layouts
from sft_core.precision import Precision

# Nats by which a token's log-probability may differ: some hundred roundings of the arithmetic in use, at logits of
# about 20. What is wrong in kind is mostly off by tenths of a nat.
BOUNDS = {None: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
# So little is rounding without another look. More, within the bound, may be a small fault (a state that read padding
# and forgot most of it): then the plainer ways are tried, too, and the first counts that is almost as close as any.
SURELY_ROUNDING, ALMOST = BOUNDS | {None: 2e-5}, 4
GAPS = {None: 0.01, torch.float16: 0.05, torch.bfloat16: 0.3}  # the same for the mean of whole completions
TEMPERATURE = 0.8  # not 1, at which one that is forgotten changes nothing
# Lengths in tokens of two groups: short, because each token takes time. With prompts of 5 and 2 the padding of Moshi's
# shape goes unnoticed, with two drawn tokens (eval/trust.py) Zamba2's.
PROMPTS, COMPLETIONS = (13, 3), ((1, 2), (2,))


HEAD = "the output head by itself"
LACKING = {"groups": "attention by segments", "rows": "prompts encoded once a group"}


class Way(NamedTuple):
    """A policy without some of its shortcuts, and which."""

    policy: Policy
    without: str = ""


def trusted_learner(policy: Policy) -> Policy:
    """The policy with those of the learner's shortcuts that give the plain model's log-probabilities, in the mode
    (train or eval) that the model is in.

    Raises:
        Refused: none of the ways to score tokens does, or dropout is on.
    """
    ways = []
    for layout, lacking in plainer_layouts(policy):
        way = replace(policy, layout=layout)
        ways += [Way(way, lacking), Way(replace(way, split_head=False), " and ".join(filter(None, (HEAD, lacking))))]
    rows = probe_rows(policy)
    with torch.no_grad(), undisturbed(policy):
        truth_NT = plain_logprobs(policy, rows, TEMPERATURE, together=True)

        def apart_by(way: Policy) -> float:
            found_NT, _ = token_logprobs(exact(way), rows, TEMPERATURE, entropy="none")
            return largest_difference(found_NT, truth_NT, rows)

        try:
            return first_that_agrees(ways, "learner", apart_by)
        except Refused as error:
            if policy.model.training:
                policy.model.eval()
                first_that_agrees(ways, "learner", apart_by)  # or the mode is not what is wrong
                raise Refused(f"{error}. In eval mode it does: there is dropout that cannot be switched off") from None
            raise


def plainer_layouts(policy: Policy) -> list[tuple[Layout, str]]:
    """The policy's layout and the slower ones, each with what it does without."""
    usable = layouts(policy.model)
    return [(each, LACKING[each] if each != policy.layout else "") for each in usable[usable.index(policy.layout) :]]


def refuse_gap(mean_gap: float, policy: Policy) -> None:
    """On the first texts of the run itself, which are longer than the probes.

    Raises:
        Refused: sampler and learner are further apart than rounding, in the mean of all tokens.
    """
    bound = GAPS[policy.precision.autocast_dtype]
    if mean_gap > bound:  # NaN is `Optimizer.stop_if_lost`'s
        raise Refused(
            f"--model: sampler and learner disagree on the texts of the first step by {mean_gap:.2g} nats a token, "
            f"{bound:g} is rounding; with this model nothing right would be learned"
        )


def first_that_agrees(ways: Sequence[Way], who: str, apart_by: Callable[[Policy], float]) -> Policy:
    """The first policy whose numbers are the plain model's to rounding; where none's surely are, the first within the
    bound that is almost as close as any. Says what it does without.

    Raises:
        Refused: no policy's are.
    """
    start, dtype = time.perf_counter(), exact(ways[0].policy).precision.autocast_dtype
    tried: list[tuple[Way, float, str]] = []
    for way in ways:
        try:
            off = apart_by(way.policy)
            said = f"log-probabilities up to {off:.2g} nats off, {BOUNDS[dtype]:g} are rounding"
        except Exception as error:  # a library's, of any kind: the model cannot be used in this way
            off, said = math.nan, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        tried.append((way, off, said))
        if off <= SURELY_ROUNDING[dtype]:  # NaN is not
            break
    fine = [(way, off) for way, off, _ in tried if off <= BOUNDS[dtype]]
    if not fine:
        raise Refused(f"--model: the {who} does not compute what the plain model does ({said}); nothing was learned")
    closest = min(off for _, off in fine)
    (policy, without), off = next(
        (way, off) for way, off in fine if off <= max(SURELY_ROUNDING[dtype], ALMOST * closest)
    )
    wrong = [said for way, _, said in tried if way.policy is not policy]
    if without:
        print(f"{who} without {without}: with this model it would be wrong ({wrong[0]})", file=sys.stderr)
    check = {"part": who, "without": without, "nats_off": off, "bound": BOUNDS[dtype], "wrong": wrong}
    check["seconds"] = round(time.perf_counter() - start, 3)
    return replace(policy, checks=(*policy.checks, check))


def probe_rows(
    policy: Policy,
    prompt_lengths: Sequence[int] = PROMPTS,
    completion_lengths: Sequence[Sequence[int]] = COMPLETIONS,
    seed: int = 0,
) -> Rows:
    """Groups of completions of unlike lengths: ids from all over the vocabulary, the same at each call."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(policy.vocabulary, (length,), generator=generator).tolist()

    prompts = [ids(length) for length in prompt_lengths]
    repeated = [prompt for prompt, lengths in zip(prompts, completion_lengths, strict=True) for _ in lengths]
    completions = [ids(length) for lengths in completion_lengths for length in lengths]
    return pack_rows(repeated, completions, policy.pad_id).to(policy.device)


def plain_logits(policy: Policy, rows: Rows, together: bool = False) -> Iterator[Tensor]:
    """Of each row, the logits that predict its completion's tokens (T, V), by the definition: the model in eval mode, a
    row at a time, no padding, no mask, no cache. Differentiable.

    `together` reads the rows in one batch, which is faster: the shorter ones go on with their own tokens, which come
    too late to change what is predicted before them.
    """
    model, was_training, precision = policy.model, policy.model.training, exact(policy).precision

    def read(batch: list[list[int]]) -> Tensor:
        with precision.autocast():
            return model(input_ids=torch.tensor(batch, device=policy.device), use_cache=False).logits  # type: ignore[no-any-return]

    pairs = list(zip(rows.prompt_ids(), rows.completion_ids(), strict=True))
    texts = [prompt + completion for prompt, completion in pairs]
    length = max(map(len, texts))
    batches = [[(text * length)[:length] for text in texts]] if together else [[text] for text in texts]
    model.eval()
    try:
        each = (logits_LV for batch in batches for logits_LV in read(batch))
        for (prompt, completion), logits_LV in zip(pairs, each, strict=True):
            first = len(prompt) - 1
            yield logits_LV[first : first + len(completion)].float()
    finally:
        model.train(was_training)


@torch.no_grad()
def plain_logprobs(policy: Policy, rows: Rows, temperature: float = 1.0, together: bool = False) -> Tensor:
    """logp_NT of `plain_logits`."""
    logp_NT = torch.zeros(rows.completion_NT.shape, device=policy.device)
    for row, logits_TV in enumerate(plain_logits(policy, rows, together)):
        length = len(logits_TV)
        logp_TV = (logits_TV / temperature).log_softmax(dim=-1)
        logp_NT[row, :length] = logp_TV.gather(-1, rows.completion_NT[row, :length, None]).squeeze(-1)
    return logp_NT


def exact(policy: Policy) -> Policy:
    """The policy in float32 where all of its weights are: a fault in kind does not depend on the precision, and there
    rounding hides none."""
    if all(p.dtype == torch.float32 for p in policy.model.parameters()):
        return replace(policy, precision=Precision(policy.device, None))
    return policy


def largest_difference(found_NT: Tensor, truth_NT: Tensor, rows: Rows) -> float:
    """Nats, over the completions' own tokens."""
    return float((found_NT - truth_NT)[rows.mask_NT].abs().max())


@contextmanager
def undisturbed(policy: Policy) -> Iterator[None]:
    """Random numbers that the block draws are not taken from the run's, and no other rank is waited for."""
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices), ranks.alone():
        torch.manual_seed(0)
        yield
