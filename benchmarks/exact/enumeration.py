"""The exact expectation of a step's gradient: every completion of a small language, and every group of them.

A vocabulary of 4 or 5 tokens and a budget of at most 3 leave few enough completions to list them all. A step draws G of
them for each of B prompts; summing every step's loss times its probability gives the expected loss, and one
backward pass the expected gradient, with no sampling noise. Float64 throughout.

Shapes, beside those of `sft_core.learn.rows`:

    C  completions that exist for a prompt        S  steps that can happen: one group for each prompt
    R  rows of all prompts' completions: B * C    N  rows of one step: B * G
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.objective import group_advantages, importance_ratio, token_advantages, token_weights
from grpo_core.step import kl_penalty, policy_loss
from grpo_core.variants import decoupled_advantages, ended_rows
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, pack_rows
from sft_core.model.policy import Policy
from sft_core.precision import pick_precision

EOS = 0


class TableModel(nn.Module):
    """A language model without a network: one row of logits for every prefix, the prompt (one token) included.

    Prefixes are numbered level by level: with V tokens and B prompts, 0 .. B - 1 are the prompts alone, the next B * V
    the prompts with one token, and so on. To `token_logprobs` it is a transformers model whose hidden states are the
    logits and whose head does nothing.
    """

    base_model_prefix = "table"

    def __init__(self, logits_KV: Tensor, prompts: int) -> None:
        super().__init__()
        self.logits_KV, self.prompts = nn.Parameter(logits_KV), prompts  # K prefixes
        self.config = SimpleNamespace(vocab_size=logits_KV.shape[1])

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        return self.logits_KV.dtype

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids).last_hidden_state[:, -logits_to_keep:])

    def table(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        K, V = self.logits_KV.shape
        within, first, prefixes = input_ids[:, 0], 0, [input_ids[:, 0]]
        for level in range(input_ids.shape[1] - 1):
            first += self.prompts * V**level
            within = within * V + input_ids[:, level + 1]
            prefixes.append(first + within)
        # After the budget's last token nothing is predicted: that prefix has no row, and its logits are not used.
        return SimpleNamespace(last_hidden_state=self.logits_KV[torch.stack(prefixes, dim=1).clamp(max=K - 1)])


def table_policy(vocabulary: int, budget: int, prompts: int = 1, seed: int = 0, spread: float = 1.0) -> Policy:
    """A `TableModel` of random logits with this standard deviation."""
    prefixes = prompts * sum(vocabulary**level for level in range(budget))
    generator = torch.Generator().manual_seed(seed)
    logits_KV = spread * torch.randn(prefixes, vocabulary, generator=generator, dtype=torch.float64)
    return as_policy(TableModel(logits_KV, prompts))


def gpt2_policy(vocabulary: int = 5, seed: int = 0) -> Policy:
    """A GPT-2 of one layer in float64, its weights spread widely enough that it prefers some tokens to others."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "initializer_range": 0.5}
        no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **no_dropout, **special))
    return as_policy(model.double())


def as_policy(model: Any) -> Policy:
    precision = pick_precision("float32", torch.device("cpu"))
    return Policy(model.eval(), None, precision, (EOS,), EOS, layout="rows")  # the table reads prefixes


def moved(policy: Policy, distance: float, seed: int = 1) -> Policy:
    """The policy with noise of this standard deviation on every weight: one to sample from, or a reference."""
    model, generator = copy.deepcopy(policy.model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += distance * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return as_policy(model)


def attention_of(rows: Rows) -> Tensor:
    """attention_NL: 1 on the real tokens of prompt and completion, 0 on padding (int64, as transformers wants it)."""
    position_L = torch.arange(rows.ids_NL.shape[1], device=rows.ids_NL.device)
    start_N = rows.prompt_width - rows.prompt_len_N
    end_N = rows.prompt_width + rows.completion_len_N
    return ((position_L >= start_N[:, None]) & (position_L < end_N[:, None])).long()


@dataclass(frozen=True)
class World:
    """Every completion of every prompt: row b * C + c is completion c of prompt b, whose one token is the id b."""

    rows: Rows
    truncated_R: Tensor  # bool: the budget ended it
    prompts: int  # B
    budget: int

    @property
    def mask_RT(self) -> Tensor:
        return self.rows.mask_NT

    @property
    def length_R(self) -> Tensor:
        return self.rows.completion_len_N

    def logp(self, policy: Policy) -> Tensor:
        """logp_RT, differentiable, by the learner's own function."""
        return token_logprobs(policy, self.rows, entropy="none")[0]

    def chance(self, policy: Policy) -> Tensor:
        """chance_R: the probability of each completion given its prompt, differentiable."""
        return self.logp(policy).sum(dim=1).exp()

    def next_token_logp(self, policy: Policy) -> Tensor:
        """logp_RTV: the whole distribution that each of a row's tokens was drawn from, differentiable."""
        T = self.mask_RT.shape[1]
        logits_RTV: Tensor = policy.model(
            input_ids=self.rows.ids_NL, attention_mask=attention_of(self.rows), logits_to_keep=T + 1
        ).logits[:, :-1]
        return logits_RTV.log_softmax(dim=-1)

    def samples(self, row_N: Tensor, logp_RT: Tensor) -> Samples:
        """These rows as the sampler would have handed them to a step; a text is its row's number."""
        row = row_N.tolist()
        prompts, completions = self.rows.prompt_ids(), self.rows.completion_ids()
        rows = pack_rows([prompts[r] for r in row], [completions[r] for r in row], EOS)
        logp_NT = logp_RT.detach()[row_N, : rows.mask_NT.shape[1]]
        return Samples(rows, [str(r) for r in row], self.truncated_R[row_N], logp_NT)


def world(vocabulary: int, budget: int, prompts: int = 1) -> World:
    """A completion ends at its first EOS, which is a part of it, or at the budget."""
    words = [token for token in range(vocabulary) if token != EOS]
    ended = [[*body, EOS] for length in range(budget) for body in product(words, repeat=length)]
    cut = [list(body) for body in product(words, repeat=budget)]
    rows = pack_rows([[b] for b in range(prompts) for _ in ended + cut], (ended + cut) * prompts, EOS)
    truncated_R = torch.tensor(([False] * len(ended) + [True] * len(cut)) * prompts)
    return World(rows, truncated_R, prompts, budget)


@lru_cache(maxsize=8)
def _combinations(C: int, G: int) -> Tensor:
    return torch.tensor(list(combinations_with_replacement(range(C), G)))


def multisets(chance_C: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """Every group of G completions up to order, and its probability: that of one order times the number of orders,
    G! over the product of m! for each completion that occurs m times.

    >>> multisets(torch.tensor([0.25, 0.75]), 2)
    (tensor([[0, 0],
            [0, 1],
            [1, 1]]), tensor([0.0625, 0.3750, 0.5625]))
    """
    index_SG = _combinations(len(chance_C), G)
    occurrence_S, probability_S = torch.ones(len(index_SG)).to(chance_C), chance_C[index_SG[:, 0]]
    for i in range(1, G):
        # The rows are sorted, so the i-th place holds the second, third, ... of its kind where the one before is equal.
        same_S = index_SG[:, i] == index_SG[:, i - 1]
        occurrence_S = torch.where(same_S, occurrence_S + 1, 1.0)
        probability_S = probability_S * chance_C[index_SG[:, i]] * (i + 1) / occurrence_S
    return index_SG, probability_S


def steps(chance_BC: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """row_SN and chance_S: every step, as row numbers of its B groups one after the other, and its probability."""
    C = chance_BC.shape[1]
    row_SN, chance_S = multisets(chance_BC[0], G)
    for b, chance_C in enumerate(chance_BC[1:], start=1):
        index_MG, chance_M = multisets(chance_C, G)
        S, M = len(chance_S), len(chance_M)
        row_SN = torch.cat([row_SN.repeat_interleave(M, dim=0), (b * C + index_MG).repeat(S, 1)], dim=1)
        chance_S = chance_S.repeat_interleave(M) * chance_M.repeat(S)
    return row_SN, chance_S


@dataclass(frozen=True)
class Estimator:
    """A step's loss on a world: settings, rewards and the distributions that the step compares the policy with."""

    world: World
    config: GRPOConfig
    reward_R: Tensor  # float64; (K, R) for K reward functions under `normalize_then_sum`
    sampler: Policy | None = None  # pi_old; None: the policy itself
    reference: Policy | None = None  # pi_ref; the policy itself where None

    def step_loss(self, logp_NT: Tensor, old_NT: Tensor, ref_NT: Tensor, mask_NT: Tensor, reward: Tensor) -> Tensor:
        """The loss of one step, by `grpo_step`'s own functions in its own order."""
        config = self.config
        if config.reward_aggregation == "normalize_then_sum":
            advantage_BG = decoupled_advantages(reward, torch.ones(len(reward), dtype=reward.dtype))
        else:
            advantage_BG = group_advantages(reward, config.scale_rewards)
        advantage_NT = token_advantages(advantage_BG, mask_NT, logp_NT.dtype)
        weight_NT = token_weights(mask_NT.to(logp_NT.dtype), config.objective.aggregation, config.max_completion_tokens)
        ratio = importance_ratio(logp_NT, old_NT, mask_NT, config.objective.ratio_level)
        surrogate_NT = policy_loss(ratio, logp_NT, old_NT, mask_NT, advantage_NT, config)
        kl_NT = kl_penalty(ratio, logp_NT, ref_NT, config)
        return (weight_NT * (surrogate_NT + config.beta * kl_NT)).sum()

    def expected_loss(self, logp_RT: Tensor) -> Tensor:
        """The mean of `step_loss` over every step that the sampler can draw; differentiable in logp_RT alone."""
        world, B, G = self.world, self.world.prompts, self.config.group_size
        old_RT = world.logp(self.sampler).detach() if self.sampler else logp_RT.detach()
        ref_RT = world.logp(self.reference).detach() if self.reference else logp_RT.detach()
        row_SN, chance_S = steps(old_RT.sum(dim=1).exp().view(B, -1), G)
        everything = Samples(world.rows, [], world.truncated_R, old_RT)
        mask_RT = (ended_rows(everything) if self.config.mask_truncated else world.rows).mask_NT
        logp_RT, old_RT, ref_RT = (torch.where(mask_RT, part, 0.0) for part in (logp_RT, old_RT, ref_RT))
        reward = self.reward_R[..., row_SN].view(*self.reward_R.shape[:-1], -1, B, G)
        rows = (logp_RT[row_SN], old_RT[row_SN], ref_RT[row_SN], mask_RT[row_SN], reward)
        loss_S = torch.vmap(self.step_loss, in_dims=(0, 0, 0, 0, reward.dim() - 3))(*rows)
        return (chance_S * loss_S).sum()

    def direction(self, policy: Policy) -> Tensor:
        """Where the expected step goes: minus the gradient of the expected loss, all weights in one vector."""
        return gradient(-self.expected_loss(self.world.logp(policy)), policy)

    def pull(self, policy: Policy) -> Tensor:
        """pull_RT: the mean advantage that a token's log-probability is multiplied by, weight included:
        minus the gradient of the expected loss, over the probability of the completion."""
        logp_RT = self.world.logp(policy).detach().requires_grad_()
        chance_R1 = logp_RT.detach().sum(dim=1, keepdim=True).exp()
        return -torch.autograd.grad(self.expected_loss(logp_RT), logp_RT)[0] / chance_R1


def settings(budget: int, G: int, **fields: Any) -> GRPOConfig:
    """A configuration with unscaled advantages and token weights of 1 / N, unless `fields` say otherwise."""
    plain = {"scale_rewards": "none", "aggregation": "sequence_sum"}
    config = GRPOConfig(group_size=G, max_completion_tokens=budget, **(plain | fields))
    config.check()
    return config


def gradient(value: Tensor, policy: Policy) -> Tensor:
    """Of a scalar with respect to every weight, in one vector."""
    parts = torch.autograd.grad(
        value, [weight for _, weight in policy.trainable()], retain_graph=True, allow_unused=True
    )
    zeros = (torch.zeros_like(weight) for _, weight in policy.trainable())
    return torch.cat([(zero if part is None else part).flatten() for part, zero in zip(parts, zeros, strict=True)])


def true_gradient(world: World, policy: Policy, reward_R: Tensor) -> Tensor:
    """The gradient of the expected reward, mean over prompts: differentiated as a sum, with no score function."""
    return gradient((world.chance(policy) * reward_R).sum() / world.prompts, policy)


def contains(world: World, token: int) -> Tensor:
    """float64: 1 for the completions that hold this token and end themselves."""
    found_R = (world.rows.completion_NT == token).logical_and(world.mask_RT).any(dim=1)
    return (found_R & ~world.truncated_R).double()


def arbitrary_rewards(rows: int, seed: int = 7) -> Tensor:
    """float64 noise: a reward with no pattern that could make a biased estimator look right."""
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
