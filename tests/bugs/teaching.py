"""Slips of what should not teach, and of several reward functions: 30 to 32."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

STEP = "tests/test_step.py::"
LOSSES, ROLLOUT = "tests/test_losses.py::", "tests/test_rollout.py::"


BUGS = [
    Mutation(
        30,
        "the new group keeps the old rewards",
        "grpo_core/dynamic.py",
        "torch.cat([rollout.reward_BG, fresh.reward_BG])[source_B],",
        "rollout.reward_BG,",
        "The replaced group's rewards were equal, so its advantages are 0: the new samples are paid for and teach "
        "nothing.",
        (f"{ROLLOUT}test_every_row_of_the_joined_batch_keeps_its_own_tokens_logprobs_and_rewards",),
    ),
    Mutation(
        30,
        "the new group keeps the old question",
        "grpo_core/dynamic.py",
        "[examples[group] for group in source_B.tolist()],",
        "list(rollout.examples),",
        "The records name a question that was not asked, and accuracy is measured against its gold.",
        (f"{ROLLOUT}test_groups_of_equal_rewards_are_replaced_in_their_place_by_those_of_further_prompts",),
    ),
    Mutation(
        30,
        "the new group keeps the old scores",
        "grpo_core/dynamic.py",
        "rollout.scores.followed_by(fresh.scores).reordered(rows),",
        "rollout.scores,",
        "Each reward function's log, and GDPO's advantages, are those of the group that was thrown away.",
        (f"{ROLLOUT}test_every_row_of_the_joined_batch_keeps_its_own_tokens_logprobs_and_rewards",),
    ),
    Mutation(
        30,
        "the groups that do teach are replaced",
        "grpo_core/dynamic.py",
        "            equal_B = equal_groups(rollout, learner.config)\n            if not equal_B.any():\n",
        "            equal_B = ~equal_groups(rollout, learner.config)\n            if not equal_B.any():\n",
        "Good groups are thrown away until none is left.",
        (f"{ROLLOUT}test_groups_of_equal_rewards_are_replaced_in_their_place_by_those_of_further_prompts",),
    ),
    Mutation(
        31,
        "truncated and ended mixed up",
        "grpo_core/variants.py",
        "samples.rows.without_completions(samples.truncated_N)",
        "samples.rows.without_completions(~samples.truncated_N)",
        "The model learns from nothing but the completions that it could not finish.",
        (f"{LOSSES}test_truncated_rows_lose_their_completion",),
    ),
    Mutation(
        31,
        "tokens left out still count in the mean",
        "grpo_core/step.py",
        "    rows = variants.ended_rows(rollout.samples) if config.mask_truncated else rollout.samples.rows\n"
        "    kept_NT = variants.kept_tokens(policy, rows, config, size) if config.top_entropy < 1 else rows.mask_NT\n",
        "    rows = rollout.samples.rows\n"
        "    kept_NT = variants.ended_rows(rollout.samples).mask_NT if config.mask_truncated else rows.mask_NT\n",
        "Their advantage is 0 but not their weight: the more completions are cut off, the smaller the gradient of the "
        "others, and a KL penalty still acts on what was to be left alone.",
        (f"{STEP}test_completions_that_were_cut_off_count_in_no_mean_over_tokens",),
    ),
    Mutation(
        31,
        "the off-policy mask on good completions",
        "grpo_core/variants.py",
        "((advantage_NT >= 0) | (drift_N1 <= threshold))",
        "((advantage_NT <= 0) | (drift_N1 <= threshold))",
        "What should be made more likely again is dropped, and bad completions the policy has left are pushed on down.",
        ("grpo_core/variants.py::grpo_core.variants.near_policy_rows",),
    ),
    Mutation(
        31,
        "the off-policy drift with the wrong sign",
        "grpo_core/variants.py",
        "drift_NT = old_logp_NT - logp_NT.detach()",
        "drift_NT = logp_NT.detach() - old_logp_NT",
        "Rows are dropped for having become more likely, which are the ones that a bad advantage should act on.",
        ("grpo_core/variants.py::grpo_core.variants.near_policy_rows",),
    ),
    Mutation(
        31,
        "the surest tokens instead of the least sure",
        "grpo_core/variants.py",
        "return mask_NT & (entropy_NT >= bound",
        "return mask_NT & (entropy_NT <= bound",
        "Learning from the forks of the reasoning becomes learning from the copying between them.",
        ("grpo_core/variants.py::grpo_core.variants.high_entropy_tokens",),
    ),
    Mutation(
        31,
        "the entropy bonus as a penalty",
        "grpo_core/step.py",
        "loss = loss - config.entropy_coef * entropy_NT",
        "loss = loss + config.entropy_coef * entropy_NT",
        "The policy collapses faster with the option than without.",
        (f"{STEP}test_the_entropy_bonus_raises_the_entropy",),
    ),
    Mutation(
        31,
        "an entropy bonus without a gradient",
        "sft_core/learn/logprobs.py",
        """torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient")""",
        """torch.no_grad()""",
        "The loss changes, the gradient does not: the option does nothing, and its curve in the log looks as if it "
        "did.",
        (f"{STEP}test_the_entropy_bonus_raises_the_entropy",),
    ),
    Mutation(
        32,
        "GDPO without normalising each function",
        "grpo_core/variants.py",
        "score_KBG = group_advantages(value_KBG.reshape(K * B, G)).view(K, B, G) * weight_K[:, None, None]",
        "score_KBG = value_KBG.nan_to_num(0.0) * weight_K[:, None, None]",
        "The function with the largest standard deviation drowns the others, which is what normalising first is for.",
        ("grpo_core/variants.py::grpo_core.variants.decoupled_advantages",),
    ),
    Mutation(
        32,
        "GDPO without its weights",
        "grpo_core/variants.py",
        ".view(K, B, G) * weight_K[:, None, None]",
        ".view(K, B, G)",
        "--reward_weights is taken and ignored.",
        (f"{LOSSES}test_decoupled_advantages_are_normalised_twice",),
    ),
    Mutation(
        32,
        "no opinion counts as 0",
        "rewards/combine.py",
        "weighted = [weight * value for weight, value in terms if value is not None]",
        "weighted = [weight * (value or 0.0) for weight, value in terms]",
        "A function that does not judge a row pays it as the worst: 'no opinion' becomes 'worthless'.",
        ("tests/test_score.py::test_none_leaves_a_function_out_of_its_row_and_all_none_is_nan",),
    ),
    Mutation(
        32,
        "a row without any opinion joins its group's mean",
        "grpo_core/objective.py",
        "centered_BG = reward_BG - reward_BG.nanmean(dim=1, keepdim=True)",
        "centered_BG = reward_BG - reward_BG.nan_to_num(0.0).mean(dim=1, keepdim=True)",
        "The baseline sinks, and the advantages of the others no longer sum to 0.",
        ("tests/test_advantages.py::test_a_row_without_a_reward_gets_zero_and_is_left_out_of_mean_and_std",),
    ),
]
