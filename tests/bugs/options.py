"""Slips that the options of `grpo_core` invite: 27 to 29."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

OBJECTIVE, REFERENCE = "tests/test_objective.py::", "tests/test_reference.py::"
VARIANTS, LOSSES = "tests/test_variants.py::", "tests/test_losses.py::"

MOVING_REFERENCE = "tests/test_moving_reference.py::"

BUGS = [
    Mutation(
        27,
        "the clipped product without the minimum",
        "grpo_core/objective.py",
        "return -torch.minimum(ratio.clamp(max=delta) * advantage_NT, clipped * advantage_NT)",
        "return -clipped * advantage_NT",
        "A token that moved the wrong way by more than epsilon has no gradient back: mistakes are frozen in.",
        (f"{OBJECTIVE}test_a_good_token_that_became_less_probable_is_never_clipped",),
    ),
    Mutation(
        27,
        "a maximum instead of the minimum",
        "grpo_core/objective.py",
        "-torch.minimum(ratio.clamp(max=delta) * advantage_NT, ",
        "-torch.maximum(ratio.clamp(max=delta) * advantage_NT, ",
        "PPO's pessimism turned into optimism: what has gone far enough is pushed on, what went wrong is let go. From "
        "a sign moved out of the minimum and not turned over.",
        (f"{OBJECTIVE}test_a_good_token_above_the_upper_bound_has_no_gradient",),
    ),
    Mutation(
        27,
        "the two epsilons swapped",
        "grpo_core/objective.py",
        "clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)",
        "clipped = ratio.clamp(1 - epsilon_high, 1 + epsilon_low)",
        "Nothing happens while they are equal; with DAPO's 0.28 the room is given to the wrong side.",
        (f"{OBJECTIVE}test_a_good_token_above_the_upper_bound_has_no_gradient",),
    ),
    Mutation(
        27,
        "delta on the clipped branch",
        "grpo_core/objective.py",
        "-torch.minimum(ratio.clamp(max=delta) * advantage_NT, clipped * advantage_NT)",
        "-torch.minimum(ratio * advantage_NT, clipped.clamp(max=delta) * advantage_NT)",
        "delta is above 1 + epsilon_high, so there it bounds nothing: a bad token that became 50 times more likely "
        "pulls 50 times as hard, which is what the option was set against.",
        ("grpo_core/objective.py::grpo_core.objective.clipped_surrogate",),
    ),
    Mutation(
        27,
        "CISPO's weight with a gradient",
        "grpo_core/variants.py",
        "-ratio.clamp(max=1 + epsilon_high).detach() * advantage_NT * logp_NT",
        "-ratio.clamp(max=1 + epsilon_high) * advantage_NT * logp_NT",
        "The weight is meant to be a constant. With its own gradient, which is times log pi < 0, good tokens are made "
        "less likely as soon as log pi is below -1.",
        (f"{VARIANTS}test_every_cispo_token_pulls_by_its_weight_through_its_log_probability_alone",),
    ),
    Mutation(
        27,
        "CISPO bounded by epsilon instead of 1 + epsilon",
        "grpo_core/variants.py",
        "-ratio.clamp(max=1 + epsilon_high).detach()",
        "-ratio.clamp(max=epsilon_high).detach()",
        "TRL's convention with the paper's number: at epsilon_high 0.2 every gradient is a fifth of its size.",
        ("grpo_core/variants.py::grpo_core.variants.cispo",),
    ),
    Mutation(
        27,
        "SAPO's temperatures swapped",
        "grpo_core/variants.py",
        "sapo(ratio, advantage_NT, config.sapo_temperature_pos, config.sapo_temperature_neg)",
        "sapo(ratio, advantage_NT, config.sapo_temperature_neg, config.sapo_temperature_pos)",
        "The gate that should close sooner, on tokens to be made less likely, closes later. With 1 and 1.05 no curve "
        "shows it.",
        (f"{LOSSES}test_sapo_gets_each_signs_temperature",),
    ),
    Mutation(
        27,
        "SAPO's gate the wrong way round",
        "grpo_core/variants.py",
        "-torch.sigmoid(tau_NT * (ratio - 1))",
        "-torch.sigmoid(tau_NT * (1 - ratio))",
        "The gradient changes its sign: good tokens become less likely.",
        ("grpo_core/variants.py::grpo_core.variants.sapo",),
    ),
    Mutation(
        27,
        "VESPO's ratio averaged over the tokens",
        "grpo_core/variants.py",
        ".clamp(-20, 20).sum(dim=1, keepdim=True)",
        ".clamp(-20, 20).mean(dim=1, keepdim=True)",
        "W is a product over the completion. As a mean over the padded row it hardly leaves 1 and damps nothing.",
        ("grpo_core/variants.py::grpo_core.variants.vespo",),
    ),
    Mutation(
        27,
        "VESPO's weight with a gradient",
        "grpo_core/variants.py",
        "    with torch.no_grad():\n        log_w_N1",
        "    with torch.enable_grad():\n        log_w_N1",
        "phi is a constant in the paper; its gradient bends the direction of every update after the first.",
        (f"{VARIANTS}test_vespo_weights_by_a_gamma_density_of_the_whole_completions_ratio",),
    ),
    Mutation(
        27,
        "VESPO's constants swapped",
        "grpo_core/variants.py",
        "vespo(logp_NT, old_logp_NT, advantage_NT, positive, negative)",
        "vespo(logp_NT, old_logp_NT, advantage_NT, negative, positive)",
        "Good and bad completions are damped by each other's curve; both are 1 at W = 1, so the first update is right.",
        (f"{LOSSES}test_vespo_gets_each_signs_powers",),
    ),
    Mutation(
        28,
        "the sequence's ratio averaged over padding",
        "grpo_core/objective.py",
        "log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)",
        "log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.shape[1]",
        "A short completion's ratio depends on the longest of its micro-batch and hardly leaves 1.",
        (f"{OBJECTIVE}test_the_sequences_ratio_is_the_geometric_mean_over_its_own_tokens",),
    ),
    Mutation(
        28,
        "the sequence's ratio without its root",
        "grpo_core/objective.py",
        "log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)",
        "log_ratio_NT.sum(dim=1, keepdim=True)",
        "A product over 200 tokens leaves GSPO's bounds of 4e-4 at once: everything is clipped.",
        (f"{OBJECTIVE}test_the_sequences_ratio_is_the_geometric_mean_over_its_own_tokens",),
    ),
    Mutation(
        28,
        "Dr. GRPO by the longest completion",
        "grpo_core/objective.py",
        "return mask_NT / (N * max_completion_tokens)",
        "return mask_NT / (N * mask_NT.shape[1])",
        "The constant that was to make a token's weight independent of lengths is a length: steps with one long "
        "completion learn less from all.",
        (f"{OBJECTIVE}test_constant_length_gives_a_token_one_weight_whatever_the_lengths",),
    ),
    Mutation(
        28,
        "LUSPO without the lengths",
        "grpo_core/config.py",
        """"luspo": Loss("sequence", "clip", "sequence_sum"),""",
        """"luspo": Loss("sequence", "clip", "sequence_mean"),""",
        "Which is GSPO again, under another name.",
        (f"{OBJECTIVE}test_luspo_is_gspo_with_every_completion_weighted_by_its_length",),
    ),
    Mutation(
        29,
        "the KL is rewarded",
        "grpo_core/step.py",
        "(surrogate_NT + config.beta * kl_NT)",
        "(surrogate_NT - config.beta * kl_NT)",
        "The sign of equation 3, which is maximised, in a loss, which is minimised: the policy is driven away from the "
        "reference.",
        (f"{REFERENCE}test_the_kl_pulls_the_policy_back_to_the_reference",),
    ),
    Mutation(
        29,
        "the corrected KL's ratio without a gradient",
        "grpo_core/variants.py",
        "return kl_NT * ratio\n",
        "return kl_NT * ratio.detach()\n",
        "On-policy the ratio is 1, so its gradient is all that the correction adds: nothing is left of it.",
        (f"{LOSSES}test_the_kl_is_k3_and_its_correction_the_ratio_with_its_gradient",),
    ),
    Mutation(
        29,
        "the reference moves by the wrong share",
        "grpo_core/reference.py",
        "ours.lerp_(theirs, self.sync_mix)",
        "ours.lerp_(theirs, 1 - self.sync_mix)",
        "alpha * old + (1 - alpha) * new, read the other way round. At 0.5 nothing differs; at 1 the reference never "
        "moves.",
        (f"{MOVING_REFERENCE}test_the_reference_becomes_a_mixture_of_itself_and_the_policy",),
    ),
    Mutation(
        29,
        "the policy moves instead of the reference",
        "grpo_core/reference.py",
        "ours.lerp_(theirs, self.sync_mix)",
        "theirs.lerp_(ours, self.sync_mix)",
        "Every so often most of what was learned is undone.",
        (f"{MOVING_REFERENCE}test_the_reference_becomes_a_mixture_of_itself_and_the_policy",),
    ),
    Mutation(
        29,
        "the reference follows every step",
        "grpo_core/reference.py",
        "if not self.sync_every or self.updates % self.sync_every:",
        "if not self.sync_every:",
        "A reference at the policy's heels holds it to nothing.",
        (f"{MOVING_REFERENCE}test_the_reference_moves_at_every_kth_update_and_at_no_other",),
    ),
]
