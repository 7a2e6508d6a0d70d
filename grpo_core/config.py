"""GRPO on a language model: sample groups of answers, reward them, learn from the better ones.

Without a --model, --task, --config or --preset it trains the built-in model on arithmetic word problems, on any CPU,
in minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

from eval.samples import Sampling
from grpo_core.recipes import settings_of
from sft_core.config import ModelConfig, OptimConfig, RunConfig, flag
from sft_core.errors import require
from sft_core.text.config import TaskConfig

# The published losses differ in three independent choices: whose ratio (the token's or the sequence's), what a token
# contributes (`clipped_surrogate` in grpo_core/objective.py, or one of grpo_core/variants.py), and its weight.
RatioLevel = Literal["token", "sequence"]
TokenLoss = Literal["clip", "cispo", "sapo", "vespo"]
Aggregation = Literal["sequence_mean", "token_mean", "constant_length", "sequence_sum"]


class Loss(NamedTuple):
    """One choice of each kind."""

    ratio_level: RatioLevel
    token_loss: TokenLoss
    aggregation: Aggregation


# The names are TRL's (`loss_type`; grpo_trainer.py 1.16.0, lines 3083-3184), where GSPO is a setting instead of a name.
# A paper's further settings (epsilons, unscaled advantages) are flags of their own.
LOSSES: dict[str, Loss] = {
    "grpo": Loss("token", "clip", "sequence_mean"),  # DeepSeekMath, arXiv 2402.03300, eq. 3
    "bnpo": Loss("token", "clip", "token_mean"),  # TRL's name; equal to dapo here, where the batch is the whole step
    "dapo": Loss("token", "clip", "token_mean"),  # DAPO, arXiv 2503.14476, eq. 8
    "dr_grpo": Loss("token", "clip", "constant_length"),  # Dr. GRPO, arXiv 2503.20783, section 3.2 (scale_rewards none)
    "gspo": Loss("sequence", "clip", "sequence_mean"),  # GSPO, arXiv 2507.18071, eq. 5 (epsilons 3e-4 and 4e-4)
    "luspo": Loss("sequence", "clip", "sequence_sum"),  # LUSPO, arXiv 2602.05261: GSPO times each sequence's length
    "cispo": Loss("token", "cispo", "token_mean"),  # MiniMax-M1, arXiv 2506.13585, eq. 4
    "sapo": Loss("token", "sapo", "sequence_mean"),  # SAPO, arXiv 2511.20347, eq. 5
    "vespo": Loss("token", "vespo", "token_mean"),  # VESPO, arXiv 2602.10693
}

# Flags that only some token losses look at.
USED_BY = {
    "epsilon_low": ("clip",),
    "epsilon_high": ("clip", "cispo"),
    "delta": ("clip",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective. The defaults are DAPO's loss without DAPO's other techniques."""

    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "luspo", "cispo", "sapo", "vespo"] = flag(
        "dapo", "a published loss (LOSSES in grpo_core/config.py)"
    )
    ratio_level: Literal["token", "sequence"] | None = flag(
        None, "probability ratio of each token, or the geometric mean over the completion; default: --loss's"
    )
    token_loss: Literal["clip", "cispo", "sapo", "vespo"] | None = flag(
        None, "what a token contributes (grpo_core/objective.py and variants.py); default: --loss's"
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant_length", "sequence_sum"] | None = flag(
        None, "the weight of a token (token_weights in grpo_core/objective.py); default: --loss's"
    )
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "divide advantages by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)"
    )
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = flag(
        "sum_then_normalize", "sum the rewards before or after normalizing each function's (after: GDPO)"
    )
    epsilon_low: float = flag(0.2, "clip: the ratio's lower bound is 1 - this (PPO; GSPO uses 3e-4)")
    epsilon_high: float = flag(0.2, "clip, CISPO: the ratio's upper bound is 1 + this (PPO; DAPO uses 0.28, GSPO 4e-4)")
    delta: float = flag(0.0, "clip: upper bound of the ratio at negative advantages (INTELLECT-2: 4); 0: none")
    sapo_temperature_pos: float = flag(1.0, "SAPO's gate temperature for positive advantages (as in the paper)")
    sapo_temperature_neg: float = flag(1.05, "SAPO's gate temperature for the others (as in the paper)")
    vespo_k_pos: float = flag(2.0, "VESPO: power of the ratio at advantages of 0 or more (TRL)")
    vespo_lambda_pos: float = flag(3.0, "VESPO: exponential decay at advantages of 0 or more (TRL)")
    vespo_k_neg: float = flag(3.0, "VESPO: power of the ratio at negative advantages (TRL)")
    vespo_lambda_neg: float = flag(2.0, "VESPO: exponential decay at negative advantages (TRL)")
    beta: float = flag(0.0, "KL coefficient (DeepSeekMath: 0.04); 0: no reference model (TRL)")
    kl_correction: bool = flag(False, "multiply the KL by the ratio (DeepSeek-V3.2; TRL's use_bias_correction_kl)")
    ref_sync_every: int = flag(0, "optimizer steps between updates of the reference model; 0: it stays frozen")
    ref_sync_mix: float = flag(0.6, "share of the policy in the updated reference (TR-DPO)")
    mask_truncated: bool = flag(False, "exclude truncated completions from the loss (DAPO)")
    top_entropy: float = flag(
        1.0,
        "train on this share of the tokens, those of highest entropy ('80/20': 0.2; one more forward pass)",
    )
    entropy_coef: float = flag(0.0, "weight of a bonus on the mean token entropy; 0: none")
    off_policy_threshold: float = flag(
        0.0,
        "mask rows of negative advantage whose KL from the sampling policy exceeds this per token, in nats "
        "(DeepSeek-V3.2); 0: none",
    )

    @property
    def objective(self) -> Loss:
        """The three choices in force: the named loss's, but for those that were set by themselves."""
        named = LOSSES[self.loss]
        return Loss(
            self.ratio_level or named.ratio_level,
            self.token_loss or named.token_loss,
            self.aggregation or named.aggregation,
        )

    @property
    def entropy(self) -> Literal["value", "gradient"]:
        """What the learner needs of the entropy: a metric, or a term of the loss."""
        return "gradient" if self.entropy_coef else "value"

    def check(self) -> None:
        require(0 <= self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "0 to 1")
        for name in ("beta", "epsilon_high", "entropy_coef", "off_policy_threshold", "ref_sync_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(
            self.delta == 0 or self.delta > 1 + self.epsilon_high,
            "delta",
            self.delta,
            f"more than 1 + epsilon_high ({1 + self.epsilon_high:g}), or 0 for none",
        )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 < self.top_entropy <= 1, "top_entropy", self.top_entropy, "above 0, up to 1")
        require(0 < self.ref_sync_mix <= 1, "ref_sync_mix", self.ref_sync_mix, "above 0, up to 1")
        require(
            not self.ref_sync_every or self.beta > 0,
            "ref_sync_every",
            self.ref_sync_every,
            "0 if --beta is 0: there is no reference model to update",
        )
        require(not self.kl_correction or self.beta > 0, "kl_correction", self.kl_correction, "False if --beta is 0")
        require(
            self.reward_aggregation == "sum_then_normalize" or self.scale_rewards == "group",
            "scale_rewards",
            self.scale_rewards,
            "group: normalize_then_sum divides by the group's standard deviation, then by the batch's",
        )
        kind = self.objective.token_loss
        for name, kinds in USED_BY.items():
            default = type(self).__dataclass_fields__[name].default
            require(
                kind in kinds or getattr(self, name) == default,
                name,
                getattr(self, name),
                f"{default}, its default: the token loss {kind} does not use it ({', '.join(kinds)} does)",
            )


@dataclass(frozen=True)
class GRPOConfig(RunConfig, ObjectiveConfig, OptimConfig, ModelConfig, TaskConfig):
    """A GRPO run. A step samples `prompts_per_step` x `group_size` completions and learns them in micro-batches."""

    recipe: Literal["grpo", "r1_zero", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "vespo", "gdpo"] | None = flag(
        None, "a paper's settings of objective, optimizer and sampling (grpo_core/recipes.py); flags override them"
    )
    sft_preset: Literal["tiny", "learns"] = flag(
        "tiny", "with --model tiny: the preset of sft_core.train that it is first trained with"
    )
    prompts_per_step: int = flag(4, "B: prompts per step (4 x 8 completions fit a T4)")
    group_size: int = flag(8, "G: completions per prompt (8: TRL; DeepSeekMath used 64)")
    max_completion_tokens: int = flag(256, "longest completion in tokens")
    temperature: float = flag(1.0, "sampling temperature; also applied to the learner's log-probabilities (1: TRL)")
    top_k: int = flag(0, "sample from the k most likely tokens; 0: all (the learner scores the full distribution)")
    top_p: float = flag(1.0, "sample from the most likely tokens whose probabilities sum to this; 1: all")
    min_p: float = flag(
        0.0, "sample from tokens with at least this share of the most likely token's probability; 0: all"
    )
    vllm: bool = flag(False, "sample with vLLM on the same GPU (extra: vllm); not tried with a real vLLM yet")
    vllm_memory: float = flag(0.3, "the part of the GPU's memory that vLLM may take (TRL)")
    sampler_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = flag(
        "token_truncate", "with --vllm: importance weights of tokens or completions, at most --sampler_cap or 0 above"
    )
    sampler_cap: float = flag(3.0, "with --vllm: the largest importance weight (TRL)")
    rewards: list[str] = flag(
        ["correctness_reward_func"], "names of reward functions, or my_module:my_reward, or file.py:my_reward"
    )
    reward_format: Literal["text", "chat"] = flag(
        "text", "what reward functions get: texts, or lists of messages, as TRL's for conversations do"
    )
    reward_weights: list[float] = flag([], "one weight per reward function; none: all 1")
    reward_timeout: float = flag(
        300.0, "seconds that one reward function may take per step; 0: no limit (raise it for slow judges)"
    )
    overlong_buffer: int = flag(
        0, "last tokens of the completion budget, over which soft_overlong_reward_func falls to -1; 0: a fifth (DAPO)"
    )
    dynamic_sampling: int = flag(
        0, "how often groups of equal rewards are replaced by groups of new prompts (DAPO); 0: never"
    )
    mu: int = flag(
        1,
        "optimizer steps per batch of completions (1: DeepSeekMath, TRL); at 1 the ratio is 1 and nothing is clipped",
    )
    shuffle_rewards: bool = flag(False, "control experiment: shuffle the step's rewards among its rows")
    eval_batch_size: int = flag(64, "held-out completions generated at a time")
    eval_samples: int = flag(
        0,
        "samples per held-out problem besides the greedy answer, at --temperature, for pass@k and maj@k; 0: none",
    )
    record_tokens: bool = flag(
        True, "write every sampled token and its log-probability to tokens.jsonl, for benchmarks.browse"
    )
    show_every: int = flag(10, "steps between printed samples (question, expected, response, extracted); 0: never")

    settings_of = staticmethod(settings_of)  # what --recipe sets

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_completion_tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    def check(self) -> None:
        for part in (TaskConfig, ModelConfig, OptimConfig, ObjectiveConfig, RunConfig):
            part.check(self)
        for name in ("prompts_per_step", "max_completion_tokens", "mu", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "2 or more: a completion is judged against the others of its group",
        )
        require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "more than 0: greedy answers of a group are all the same",
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        require(
            self.top_p == 1 or not self.deterministic or self.device == "cpu",
            "top_p",
            self.top_p,
            "1 under --deterministic, unless --device is cpu: on CUDA no running sum of floats is deterministic",
        )
        require(0 <= self.min_p < 1, "min_p", self.min_p, "0 or more and below 1")
        if self.vllm:
            self._check_vllm()
        for name in ("top_k", "dynamic_sampling", "show_every", "eval_samples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.reward_timeout <= 1e6, "reward_timeout", self.reward_timeout, "0 to 1e6; 0: no limit")
        require(
            0 <= self.overlong_buffer <= self.max_completion_tokens,
            "overlong_buffer",
            self.overlong_buffer,
            f"0 to --max_completion_tokens ({self.max_completion_tokens})",
        )
        for name in ("delta", "off_policy_threshold"):
            require(
                self.mu > 1 or not getattr(self, name),
                name,
                getattr(self, name),
                "0 if --mu is 1: it only acts after an earlier update on the same batch",
            )
        require(
            not (self.dynamic_sampling and self.shuffle_rewards),
            "dynamic_sampling",
            self.dynamic_sampling,
            "0 with --shuffle_rewards: the control would select groups by shuffled rewards",
        )
        require(
            not (self.lora or self.adapter_path) or not self.ref_sync_every or self.ref_sync_mix == 1,
            "ref_sync_mix",
            self.ref_sync_mix,
            "1 with LoRA: a mixture of two adapters is not the mixture of their products",
        )
        require(
            not self.endless or self.max_steps > 0,
            "max_steps",
            self.max_steps,
            f"more than 0: the {self.task} task has no end",
        )

    def _check_vllm(self) -> None:
        require(find_spec("vllm") is not None, "vllm", True, "the vllm package: pip install '.[vllm]'")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "above 0 and below 1")
        require(self.sampler_cap >= 1, "sampler_cap", self.sampler_cap, "1 or more")
        for name, value in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            told = f"{value} with --vllm, whose log-probabilities are those of what is left"
            require(getattr(self, name) == value, name, getattr(self, name), told)
        for name in ("lora", "adapter_path", "use_4bit"):
            require(not getattr(self, name), name, getattr(self, name), "none with --vllm, which gets all weights")
        require(self.objective.token_loss != "vespo", "loss", "vespo", "another with --vllm")
