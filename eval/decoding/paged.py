"""Decoding by transformers' continuous batching: each row's keys and values lie in pages, no row is padded, and the
next prompt comes in at the token after one that has ended.

Its `generate_batch` draws with `torch.multinomial`, and gives back log-probabilities of what top-k and top-p have left.
Its manager, one level below, lets each request bring arguments for a logits processor. So the one here is told of each
row's place among all, and draws by that row's numbers, as `Draw` does everywhere.

Without flash attention, which this project does not need, each query is compared with the keys of all rows that are
being drawn. And prompts are read once a row, not once a group.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessorList, TextStreamer
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from eval.around import generation_config
from eval.draw import Draw, cuts
from eval.samples import Sheet
from sft_core.model.backbone import without_adapter
from sft_core.model.policy import Policy

AT_A_TIME = 512  # tokens of prompts, and those of rows that go on, in one pass
QUIET = logging.getLogger("ContinuousBatchingLogger")  # transformers'; what goes wrong is raised here


class PagedDraw(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each row in a pass, whichever they are, and keeps its log-probability."""

    supported_kwargs = {"place": int, "prompt": int}  # of each request: its place, its prompt's tokens
    ignored_kwargs = ()

    def __init__(self, sheet: Sheet, at_once: int) -> None:
        self.sampling, self.end, self.at_once = sheet.sampling, sheet.policy.eos_ids[0], at_once
        self.T, self.nobody = self.sampling.max_completion_tokens, sheet.uniform_NT.numel()
        # One more than there are tokens, for what a pass computes beside the rows' next ones.
        self.uniform = torch.cat([sheet.uniform_NT.flatten(), sheet.uniform_NT.new_zeros(1)]).to(sheet.policy.device)
        with torch.inference_mode(False):  # another thread writes here
            self.logp = torch.zeros(self.nobody + 1, device=sheet.policy.device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(self.nobody)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Which token of all each row's next one is; always `at_once` of them, over those of the last pass."""
        states = [request.state for request in requests_with_new_token]
        given = [(state.logit_processor_kwargs, state.current_len()) for state in states]
        tokens = [own["place"] * self.T + known - own["prompt"] for own, known in given]
        return torch.tensor(tokens + [self.nobody] * (self.at_once - len(tokens)), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        token_N = tensor_arg[: len(scores)].long()
        draw = Draw(self.sampling.temperature, self.uniform[token_N, None], self.end, cuts(self.sampling))
        marked: Tensor = draw(token_N, scores)
        self.logp[token_N] = draw.logp[0]
        return marked


def fill_paged(
    sheet: Sheet,
    model: Any,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    at_once: int,
    streamer: TextStreamer | None,
) -> None:
    """Draw the completions of the prompts at these places, at most `at_once` of them at a time.

    Raises:
        RuntimeError: continuous batching failed, or is that of a release that scores all tokens of a prompt.
    """
    if "requests_with_new_token" not in signature(ContinuousBatchingLogitsProcessor.prepare_tensor_args).parameters:
        raise RuntimeError("continuous batching needs a later release of transformers")
    T, drawn, level = sheet.sampling.max_completion_tokens, sheet.sampling.temperature > 0, QUIET.level
    draw = PagedDraw(sheet, at_once)
    QUIET.setLevel(logging.CRITICAL)
    try:
        with _ready(model, sheet.policy):
            manager = model.init_continuous_batching(
                generation_config(sheet.policy, T), batching(at_once, max(len(prompts[place]) for place in places) + T)
            )
            if drawn:
                manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([draw]))
                manager.logit_processor.tensors_required = 1
            for place in places:  # before it starts: what shares a pass must not depend on who was quicker
                own = {"place": place, "prompt": len(prompts[place])} if drawn else {}
                manager.add_request(list(prompts[place]), str(place), **own)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)  # the other thread has a stream of its own
            manager.start()
            try:
                for _ in places:
                    _write(sheet, _next(manager), streamer)
            finally:
                manager.stop(block=True, hard_stop=True)
    finally:
        QUIET.setLevel(level)
    if drawn:
        sheet.logp_NT[places] = draw.logp[:-1].view_as(sheet.logp_NT)[places]


def _next(manager: Any) -> Any:
    """The next request that has ended."""
    while (result := manager.get_result(timeout=1)) is None:
        if not manager.is_running():
            raise RuntimeError("continuous batching ended early")
    if result.error is not None:
        raise RuntimeError(f"continuous batching: {result.error}")
    return result


def _write(sheet: Sheet, result: Any, streamer: TextStreamer | None) -> None:
    place, ids = int(result.request_id), torch.tensor(result.generated_tokens)
    sheet.completion_NT[place, : len(ids)] = ids
    sheet.ended(torch.tensor([place]))
    if streamer is not None:
        streamer.put(torch.tensor(result.prompt_ids))
        streamer.put(ids)
        streamer.end()


def batching(at_once: int, longest: int) -> ContinuousBatchingConfig:
    """Room for so many rows of at most `longest` tokens. The class has other fields in each release."""
    known: dict[str, Any] = {field.name: field.default for field in fields(ContinuousBatchingConfig)}
    page = known.get("page_size") or known["block_size"]
    wanted: dict[str, Any] = {
        "num_blocks": at_once * -(-longest // page),
        "max_batch_tokens": max(AT_A_TIME, at_once),
        "max_requests_per_batch": at_once,
        "max_blocks_per_request": 0,
        "use_cuda_graph": False,
        "use_async_batching": False,
        "auto_switch_to_flash": False,  # whose numbers would be others than the learner's
        "disable_nccl_graph_mixing": False,
    }
    return ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})


@contextmanager
def _ready(model: Any, policy: Policy) -> Iterator[None]:
    """With attention by transformers' own function, which knows pages. The pass is made in another thread, which has
    its own autocast; and what autocast has made of keys and values is not what pages are made for."""
    inner = without_adapter(model)
    attention, forward = inner.config._attn_implementation, inner.forward

    @functools.wraps(forward)
    def in_precision(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if "update" not in vars(cache):
            cache.update = functools.partial(_update, cache.update, cache.dtype)
        with policy.precision.autocast():
            return forward(*args, cache=cache, **kwargs)

    inner.set_attn_implementation("sdpa")
    inner.forward = in_precision
    try:
        yield
    finally:
        del inner.forward
        inner.set_attn_implementation(attention)


def _update(update: Any, dtype: torch.dtype, key_states: Tensor, value_states: Tensor, **given: Any) -> Any:
    return update(key_states=key_states.to(dtype), value_states=value_states.to(dtype), **given)
