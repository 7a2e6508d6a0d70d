"""A paper's whole recipe by one flag: `--recipe dapo`. Its settings stand above a preset's and below your own flags.

A recipe sets what the paper says of the objective, the optimizer and the sampling, as far as this project has it. Sizes
(models, batches, budgets) are yours; `besides` says what the paper used and what is missing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What a paper sets, each with the place that says so."""

    paper: str
    settings: Mapping[str, tuple[Any, str]]
    besides: str


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(
        "DeepSeekMath, arXiv 2402.03300",
        {
            "loss": ("grpo", "eq. 3"),
            "scale_rewards": ("group", "section 4.1.2"),
            "beta": (0.04, "section 4.2"),
            "mu": (1, "section 4.2: a single update"),
            "lr": (1e-6, "section 4.2"),
        },
        "64 completions a question, 1,024 a batch, 1,024 tokens; a reward model; clip range not stated",
    ),
    "r1_zero": Recipe(
        "DeepSeek-R1, arXiv 2501.12948 (2nd version)",
        {
            "loss": ("grpo", "eq. 1, which is printed with a ratio of whole answers; by token as in DeepSeekMath"),
            "scale_rewards": ("group", "eq. 3"),
            "beta": (0.001, "section 2.1"),
            "mu": (1, "section 2.1: one inner epoch"),
            "lr": (3e-6, "section 2.1"),
            "temperature": (1.0, "section 2.1"),
            "ref_sync_every": (400, "section 2.1: the policy replaces the reference"),
            "ref_sync_mix": (1.0, "section 2.1"),
        },
        "16 completions a question, 32 questions a step; 8,192 sampled at a time and learned in 16 parts, which --mu "
        "(whole batches) is not; 32,768 tokens, later 65,536; clip range not stated (R1's first stage: 10); rewards "
        "for accuracy and format",
    ),
    "dr_grpo": Recipe(
        "Dr. GRPO, arXiv 2503.20783",
        {
            "loss": ("dr_grpo", "section 3.2: a constant instead of the length"),
            "scale_rewards": ("none", "section 3.2"),
            "beta": (0.0, "section 3, table 6"),
            "mu": (1, "table 6"),
            "temperature": (1.0, "table 6"),
            "lr": (1e-6, "table 6"),
            "lr_schedule": ("constant", "table 6"),
            "adam_beta2": (0.95, "table 6"),
        },
        "8 completions a question, 3,000 tokens",
    ),
    "dapo": Recipe(
        "DAPO, arXiv 2503.14476",
        {
            "loss": ("dapo", "eq. 8: token-level loss"),
            "scale_rewards": ("group", "eq. 9"),
            "epsilon_low": (0.2, "section 4.1"),
            "epsilon_high": (0.28, "section 4.1: clip-higher"),
            "dynamic_sampling": (8, "section 3.2; the paper has no limit, the code 10"),
            "mask_truncated": (True, "section 3.4: overlong filtering"),
            "beta": (0.0, "section 2.3"),
            "lr": (1e-6, "section 4.1"),
            "lr_schedule": ("constant", "section 4.1"),
        },
        "add soft_overlong_reward_func to --rewards (eq. 13); a warm-up over 20 steps; eq. 8 divides by the tokens of "
        "a group, here by the step's; 16 completions a prompt, 512 prompts, 16 updates on "
        "parts of a batch, which --mu (whole batches) is not; 20,480 tokens, 4,096 of them the buffer; rewards of 1 "
        "and -1",
    ),
    "gspo": Recipe(
        "GSPO, arXiv 2507.18071",
        {
            "loss": ("gspo", "eq. 5"),
            "scale_rewards": ("group", "eq. 6"),
            "epsilon_low": (3e-4, "section 5.1"),
            "epsilon_high": (4e-4, "section 5.1"),
            "beta": (0.0, "section 2 leaves the KL out of the formulas, for brevity; not said to be 0"),
        },
        "4 updates on parts of a batch, which --mu (whole batches) is not",
    ),
    "cispo": Recipe(
        "MiniMax-M1, arXiv 2506.13585",
        {
            "loss": ("cispo", "eq. 4"),
            "scale_rewards": ("group", "section 3.1"),
            "dynamic_sampling": (8, "section 3.1, after DAPO; no limit in the paper"),
            "beta": (0.0, "section 3.1: no KL"),
            "adam_beta1": (0.9, "section 3.2"),
            "adam_beta2": (0.95, "section 3.2"),
            "adam_epsilon": (1e-15, "section 3.2"),
        },
        "the bound of the weight is not stated; here it is 1 + --epsilon_high, 1.2 unless you set it (ScaleRL, arXiv "
        "2510.13786, found bounds of 4, 5 and 8 alike: --epsilon_high 3, 4, 7); eq. 4 divides by the tokens of a "
        "group, here by the step's; 16 updates on parts of a batch; add soft_overlong_reward_func to --rewards",
    ),
    "sapo": Recipe(
        "SAPO, arXiv 2511.20347",
        {
            "loss": ("sapo", "eq. 5"),
            "scale_rewards": ("group", "as in GRPO"),
            "sapo_temperature_pos": (1.0, "section 5.1"),
            "sapo_temperature_neg": (1.05, "section 5.1"),
            "beta": (0.0, "eq. 5 has no KL"),
        },
        "4 updates on parts of a batch, which --mu (whole batches) is not",
    ),
    "vespo": Recipe(
        "VESPO, arXiv 2602.10693",
        {
            "loss": ("vespo", "3rd version: eq. 17 and 20; the mean over tokens as in the published code"),
            "scale_rewards": ("group", "the published code"),
            "vespo_k_pos": (2.0, "section 4.1"),
            "vespo_lambda_pos": (3.0, "section 4.1"),
            "vespo_k_neg": (3.0, "section 4.1"),
            "vespo_lambda_neg": (2.0, "section 4.1"),
            "beta": (0.0, "the published code"),
            "lr": (1e-6, "the published code"),
        },
        "8 completions a question, 16,384 tokens, 8 updates on parts of a batch, which --mu (whole batches) is not",
    ),
    "gdpo": Recipe(
        "GDPO, arXiv 2601.05242",
        {
            "loss": ("grpo", "eq. 3"),
            "reward_aggregation": ("normalize_then_sum", "eq. 4 to 6"),
            "scale_rewards": ("group", "eq. 4"),
            "lr": (1e-6, "tables 6 and 7"),
        },
        "made for several --rewards; with one it is GRPO, normalised over the batch once more; "
        "the KL differs from task to task, tables 6 and 7",
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    """A recipe's flags.

    >>> settings_of("gdpo")
    {'loss': 'grpo', 'reward_aggregation': 'normalize_then_sum', 'scale_rewards': 'group', 'lr': 1e-06}
    """
    return {flag: value for flag, (value, _) in RECIPES[name].settings.items()}


def objective_line(config: Any) -> str:
    """The objective that a config has, in words; what differs from its recipe; what has no effect."""
    ratio, kind, aggregation = config.objective
    whose = {"token": "each token's ratio", "sequence": "each completion's ratio (geometric mean)"}[ratio]
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    bound = {"clip": f" clipped to {low:g}..{high:g}", "cispo": f" as a weight of at most {high:g}"}
    mean = {
        "token_mean": "mean over the step's tokens",
        "sequence_mean": "mean over each completion, then over completions",
        "constant_length": "sum over tokens, divided by the budget",
        "sequence_sum": "each completion times its length",
    }[aggregation]
    scale = {"group": "the group's", "batch": "the batch's", "none": "no"}[config.scale_rewards]
    parts = [
        f"{config.loss}: {whose}{bound.get(kind, f' through the gate of {kind}')}",
        mean,
        f"advantages divided by {scale} standard deviation",
        f"KL {config.beta:g}" if config.beta else "no KL",
    ]
    if config.mu == 1:
        parts.append("at --mu 1 the ratio is 1: bounds and gates have no effect")
    if config.recipe:
        recipe = RECIPES[config.recipe]
        own = [
            f"--{flag} {getattr(config, flag)} (the paper: {value})"
            for flag, (value, _) in recipe.settings.items()
            if getattr(config, flag) != value
        ]
        parts.append(f"recipe {config.recipe} of {recipe.paper}{', but ' + ', '.join(own) if own else ''}")
        parts.append(f"besides, there: {recipe.besides}")
    return "; ".join(parts)
