"""GRPO on one page: Algorithm 1 of DeepSeekMath (arXiv 2402.03300) in plain PyTorch, without any options.

    python -m grpo_core.one_page              learn arithmetic word problems from rewards: any CPU, a few minutes
    python -m grpo_core.one_page FOLDER       the same from another model, in Hugging Face format

Tensors are named by their shape: B prompts in a step, G completions of each, N = B * G rows; P prompt tokens and T
completion tokens, padded; L = P + T; V words. `grpo_core/step.py` is the same with speed, options and checks in
functions; tests/test_one_page.py compares the two: on the same samples, the same losses, gradients and weights.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from rewards import numeric_reward_func
from sft_core.text.arithmetic import ArithmeticStream
from sft_core.text.config import PromptConfig
from sft_core.text.example import Example
from sft_core.text.prompts import encode_prompt, prompt_messages
from sft_core.text.tasks import Endless

steps, seed = 80, 42
B, G = 16, 8  # prompts in a step; completions of each prompt: its group
max_new_tokens, temperature = 48, 1.0
epsilon = 0.2  # the clipped ratio stays within 1 - epsilon and 1 + epsilon
beta = 0.0  # weight of the KL to the reference (DeepSeekMath: 0.04; 0: no KL penalty)
mu = 1  # optimizer steps on the samples of one step
micro_batch = 64  # rows in one forward and backward pass: affects memory, never the gradient
lr, max_grad_norm = 1e-5, 1.0
prompt_format = PromptConfig(prompt_format="hash", system_prompt="")

Rows = tuple[Tensor, Tensor, Tensor]  # ids_NL; attention_NL and mask_NT, 1 on what counts


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[int]], **how: Any) -> Rows:
    """One completion for each of N prompts. By default tokens are drawn from the policy itself: no top-k, no top-p."""
    # Padded on the left, so that generation continues at the right of every row. Padding is known by its position, not
    # by its id: many tokenizers pad with the very token that says "stop".
    flipped = [torch.tensor(ids[::-1]) for ids in prompts]
    prompt_NP = pad_sequence(flipped, batch_first=True).flip(1)
    attention_NP = pad_sequence([torch.ones_like(ids) for ids in flipped], batch_first=True).flip(1)
    drawing = how or {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model.eval()
    model.generation_config = GenerationConfig()  # without the model's own top-k, top-p, repetition penalty
    settings = GenerationConfig(max_new_tokens=max_new_tokens, **drawing, **ends)
    ids_NL = model.generate(input_ids=prompt_NP, attention_mask=attention_NP, generation_config=settings)
    stop_NT = (ids_NL[:, prompt_NP.shape[1] :] == tokenizer.eos_token_id).long()
    mask_NT = (stop_NT.cumsum(dim=1) - stop_NT == 0).long()  # up to the first stop token, included: it is trained
    return ids_NL, torch.cat([attention_NP, mask_NT], dim=1), mask_NT


def token_logprobs(model: Any, ids_NL: Tensor, attention_NL: Tensor, T: int) -> Tensor:
    """log pi(token | everything before it) for the last T tokens of each row, at the temperature of the sampler."""
    position_NL = (attention_NL.cumsum(dim=1) - 1).clamp(min=0)  # the padding on the left has no position
    logits_NLV = model(input_ids=ids_NL, attention_mask=attention_NL, position_ids=position_NL).logits
    logp_NTV = (logits_NLV[:, -T - 1 : -1] / temperature).log_softmax(dim=-1)  # predicted one token before
    return logp_NTV.gather(-1, ids_NL[:, -T:, None]).squeeze(-1)


def group_advantages(reward_BG: Tensor) -> Tensor:
    """How much better than its group was each completion? (section 4.1.2)"""
    centered_BG = reward_BG - reward_BG.mean(dim=1, keepdim=True)
    range_B1 = reward_BG.amax(dim=1, keepdim=True) - reward_BG.amin(dim=1, keepdim=True)
    # In a group of equal rewards there is nothing to learn: exactly 0, not the quotient of two rounding errors.
    return torch.where(range_B1 == 0, 0.0, centered_BG / (reward_BG.std(dim=1, keepdim=True) + 1e-4))


def token_losses(logp_NT: Tensor, old_logp_NT: Tensor, ref_logp_NT: Tensor, advantage_N1: Tensor) -> Tensor:
    """Equation 3 with the sign flipped: the clipped surrogate, and beta times the k3 estimate of the KL (eq. 4)."""
    ratio_NT = (logp_NT - old_logp_NT).exp()
    clipped_NT = ratio_NT.clamp(1 - epsilon, 1 + epsilon)
    surrogate_NT = -torch.minimum(ratio_NT * advantage_N1, clipped_NT * advantage_N1)
    difference_NT = ref_logp_NT - logp_NT
    kl_NT = difference_NT.exp() - difference_NT - 1
    return surrogate_NT + beta * kl_NT


def update(model: Any, reference: Any, optimizer: Any, rows: Rows, reward_BG: Tensor) -> list[float]:
    """Take mu optimizer steps on N rows; return their losses."""
    ids_NL, attention_NL, mask_NT = rows
    (N, T), losses = mask_NT.shape, []
    micro_batches = torch.arange(N).split(micro_batch)
    advantage_N1 = group_advantages(reward_BG).view(N, 1)

    model.train()
    with torch.no_grad():  # pi_old is the policy that sampled, pi_ref the one that training began with
        old_logp_NT, ref_logp_NT = (
            torch.cat([token_logprobs(each, ids_NL[at], attention_NL[at], T) for at in micro_batches])
            for each in (model, reference)
        )
    # Every token of the step has the same weight (DAPO, arXiv 2503.14476, eq. 8), so micro-batches simply add.
    weight_NT = mask_NT.to(old_logp_NT.dtype) / mask_NT.sum()

    for _ in range(mu):
        total = 0.0
        for at in micro_batches:
            logp_NT = token_logprobs(model, ids_NL[at], attention_NL[at], T)
            losses_NT = token_losses(logp_NT, old_logp_NT[at], ref_logp_NT[at], advantage_N1[at].to(logp_NT))
            loss = (weight_NT[at] * losses_NT).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def texts_of(tokenizer: Any, rows: Rows) -> list[str]:
    ids_NL, _, mask_NT = rows
    pairs = zip(ids_NL[:, -mask_NT.shape[1] :], mask_NT.bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]


def prompts_of(tokenizer: Any, problems: list[Example]) -> list[list[int]]:
    return [encode_prompt(tokenizer, prompt_messages(problem, prompt_format)) for problem in problems]


def step(model: Any, reference: Any, tokenizer: Any, optimizer: Any, problems: list[Example]) -> tuple[float, float]:
    """One step of Algorithm 1: sample a group per problem, score, learn. Returns the mean reward and mean length."""
    repeated = [problem for problem in problems for _ in range(G)]  # rows b * G .. b * G + G - 1 belong to problem b
    rows = sample(model, tokenizer, prompts_of(tokenizer, repeated))
    texts, questions = texts_of(tokenizer, rows), [problem.question for problem in repeated]
    rewards = numeric_reward_func(questions, texts, answer=[problem.answer for problem in repeated])
    reward_BG = torch.tensor(rewards, dtype=torch.float64).view(-1, G)
    update(model, reference, optimizer, rows, reward_BG)
    return reward_BG.mean().item(), rows[2].sum().item() / len(repeated)


def accuracy(model: Any, tokenizer: Any, problems: list[Example]) -> float:
    """The share of problems that greedy answers solve."""
    texts = texts_of(tokenizer, sample(model, tokenizer, prompts_of(tokenizer, problems), do_sample=False))
    return sum(numeric_reward_func(texts, texts, answer=[problem.answer for problem in problems])) / len(problems)


def learn_from_rewards(folder: str) -> tuple[float, float]:
    """The whole run; returns held-out accuracy before and after."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    training = Endless(ArithmeticStream("train", seed, difficulty=4))
    held_out = Endless(ArithmeticStream("heldout", seed=0, difficulty=4))  # the same for every seed
    asked = [held_out[i] for i in range(512)]

    before, start = accuracy(model, tokenizer, asked), time.perf_counter()
    print(f"held-out accuracy before: {before:.1%}")
    for done in range(steps):
        problems = [training[i] for i in range(done * B, (done + 1) * B)]
        reward, length = step(model, reference, tokenizer, optimizer, problems)
        if (done + 1) % 10 == 0:
            seconds = time.perf_counter() - start
            print(f"step {done + 1:3}: mean reward {reward:.2f}, mean length {length:4.1f} tokens, {seconds:3.0f} s")
    after = accuracy(model, tokenizer, asked)
    print(f"held-out accuracy after:  {after:.1%}")
    return before, after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        learn_from_rewards(sys.argv[1])
    else:  # the built-in model after SFT, trained now or by an earlier run: where grpo_core.train starts, too
        from grpo_core.config import GRPOConfig
        from grpo_core.train import PRESETS
        from grpo_core.warmstart import tiny_sft
        from sft_core.cli import parse_config

        learn_from_rewards(str(tiny_sft(parse_config(GRPOConfig, ["--preset", "tiny"], PRESETS))))
