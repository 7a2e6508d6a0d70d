"""Completions drawn by vLLM on the policy's own GPU, in place of `sample_groups`: the same rows, by other kernels.

**It has not met a real vLLM yet**: the tests have a stand-in of its interface, `LLM`, `SamplingParams`, and outputs
with log-probabilities. How weights are handed over is what TRL 1.16 does (trl/generation/vllm_generation.py, line 511).

Other kernels round otherwise, so the tokens come from a slightly other distribution than the learner's. vLLM says by
which probability it drew each, and `variants.sampler_correction` weighs the token's loss by what the policy gives it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.samples import Samples, Sheet
from grpo_core.config import GRPOConfig
from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.model.policy import Policy
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_ids


class VLLMSampler:
    """`Learner.sampler` for --vllm. vLLM holds weights of its own, which get the policy's before each batch."""

    def __init__(self, policy: Policy, config: GRPOConfig) -> None:
        """
        Raises:
            Refused: there are several ranks.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its weights are to be within reach of this process
        from vllm import LLM  # an extra; `check` asks for it

        if ranks.world() > 1:
            raise Refused("--vllm: one rank only; under torchrun leave it out")
        dtype = str(policy.precision.autocast_dtype or torch.float32).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as folder:
            policy.save(Path(folder))
            self.llm = LLM(
                model=folder,
                dtype=dtype,
                gpu_memory_utilization=config.vllm_memory,
                max_model_len=config.max_prompt_tokens + config.max_completion_tokens,
                max_num_seqs=config.prompts_per_step * config.group_size,
                logprobs_mode="processed_logprobs",  # at the temperature
            )

    def __call__(self, policy: Policy, examples: Sequence[Example], config: GRPOConfig) -> Samples:
        from vllm import SamplingParams

        self.hand_over(weights(policy))
        prompts = [
            ids for example in examples for ids in [prompt_ids(policy.tokenizer, example, config)] * config.group_size
        ]
        sheet = Sheet(policy, len(prompts), config.sampling, None)
        rules: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_completion_tokens}
        # Neither the model's generation_config nor its tokenizer has a say: the policy knows what ends a completion.
        rules |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}
        rules |= {"ignore_eos": True, "stop_token_ids": list(policy.eos_ids), "detokenize": False}
        seeds = (sheet.uniform_NT[:, 0] * 2**31).long().tolist()  # of the run's own random numbers
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(
            asked, sampling_params=[SamplingParams(seed=seed, **rules) for seed in seeds], use_tqdm=False
        )
        for row, output in enumerate(outputs):
            (drawn,) = output.outputs
            ids = list(drawn.token_ids)
            assert drawn.finish_reason != "stop" or ids[-1] in policy.eos_ids, "the token that ends it is part of it"
            sheet.completion_NT[row, : len(ids)] = torch.tensor(ids)
            logps = [at[token].logprob for at, token in zip(drawn.logprobs, ids, strict=True)]
            sheet.logp_NT[row, : len(ids)] = torch.tensor(logps, device=sheet.logp_NT.device)
        sheet.ended(torch.arange(len(prompts)))
        return sheet.samples(prompts)

    def hand_over(self, named: Iterator[tuple[str, Tensor]]) -> None:
        """Write the policy's weights into vLLM's, and forget what prompts read with the old ones had given."""
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(named)
        self.llm.reset_prefix_cache()


def weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """By the names of the model's files; vLLM casts them."""
    yield from ((name, parameter.detach()) for name, parameter in policy.model.named_parameters())
