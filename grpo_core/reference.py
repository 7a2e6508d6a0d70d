"""pi_ref: a copy of the policy as it was when GRPO began, so that the KL starts at 0; frozen by default."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.config import GRPOConfig
from sft_core.learn.rows import Rows, Tokens
from sft_core.learn.scored import scored
from sft_core.learn.shards import in_parts, part_of, share_out, whole
from sft_core.model.half import halve
from sft_core.model.policy import Policy, is_adapted

ADAPTER = "reference"


def policy_and_reference(policy: Policy, config: GRPOConfig) -> tuple[Policy, Reference | None]:
    """The policy, shared out among ranks if asked, and its reference, where there is a KL."""
    reference = Reference(policy, config.ref_sync_every, config.ref_sync_mix) if config.beta else None
    policy = in_parts(policy, config)
    if reference and policy.hollow and not is_adapted(policy.model):  # a second adapter is a part of the policy
        share_out(reference.policy.model)
    return policy, reference


class Reference:
    """With full fine-tuning, a second model. With LoRA, a second adapter on the same base model: a few megabytes.

    (For a policy that starts from an SFT adapter, the base model without an adapter would be the wrong reference.)
    """

    def __init__(self, policy: Policy, sync_every: int = 0, sync_mix: float = 1.0) -> None:
        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        self.learned, self.sync_every, self.sync_mix, self.updates = policy.model, sync_every, sync_mix, 0
        if is_adapted(policy.model):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            model = policy.model
            start = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
            config = copy.deepcopy(model.peft_config["default"])
            config.lora_dropout = 0.0
            model.add_adapter(ADAPTER, config)
            set_peft_model_state_dict(model, start, adapter_name=ADAPTER)
            model.set_adapter("default")
            self.policy = policy
        else:
            self.policy = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False).eval())
            if policy.half_dtype and not sync_every:
                halve(self.policy.model, policy.half_dtype)

    def logprobs(self, rows: Rows, temperature: float, micro_batch: int | Tokens) -> Tensor:
        """log pi_ref of each completion token, (N, T), 0 on padding; without gradient."""
        with self._active():
            return scored(self.policy, rows, temperature, micro_batch, entropy="none")[0]

    @torch.no_grad()
    def follow(self) -> None:
        """Call after each optimizer step. Every `sync_every` steps (0: never) the weights
        become (1 - mix) * pi_ref + mix * pi_theta (TR-DPO, arXiv 2404.09656). With LoRA mix is 1: a copy."""
        self.updates += 1
        if not self.sync_every or self.updates % self.sync_every:
            return
        for ours, theirs in self._pairs():
            ours.lerp_(theirs, self.sync_mix)

    def numbers(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def tensors(self) -> dict[str, Tensor]:
        """The weights, if they move; a frozen reference can be made again from the model that the run began with."""
        return {str(i): whole(mine) for i, (mine, _) in enumerate(self._pairs())} if self.sync_every else {}

    @torch.no_grad()
    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.updates = numbers["updates"]
        for i, (mine, _) in enumerate(self._pairs() if tensors else ()):
            mine.copy_(part_of(tensors[str(i)], mine))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight of the reference with the policy's."""
        if is_adapted(self.learned):
            weights = dict(self.learned.named_parameters())
            named = [(name, name.replace(f".{ADAPTER}.", ".default.")) for name in weights if f".{ADAPTER}." in name]
            yield from ((weights[mine], weights[its]) for mine, its in named)
        else:
            yield from zip(self.policy.model.parameters(), self.learned.parameters(), strict=True)

    @contextmanager
    def _active(self) -> Iterator[None]:
        model = self.policy.model
        if not is_adapted(model):
            yield
            return
        model.set_adapter(ADAPTER, inference_mode=True)
        for parameter in self.trained:  # FSDP asks once, at the first pass, which have a gradient
            parameter.requires_grad_()
        try:
            yield
        finally:
            model.set_adapter("default")
