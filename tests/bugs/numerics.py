"""Bugs in arithmetic: pitfalls 8, 9, 14, 18 and 26."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

ADVANTAGES, OBJECTIVE = "tests/test_advantages.py::", "tests/test_objective.py::"
OPTIM, STEP, RUNS = "tests/test_optim.py::", "tests/test_step.py::", "tests/test_runs.py::"
LOST = "tests/test_lost_numbers.py::"

RUN_SETTINGS = "tests/test_run_settings.py::"

BUGS = [
    Mutation(
        8,
        "equal rewards are left to epsilon",
        "grpo_core/objective.py",
        "    centered_BG = torch.where(all_equal(reward_BG)[:, None], 0.0, centered_BG)\n",
        "",
        "The rounded mean of twelve 0.01s is not 0.01, and the quotient of two rounding errors is anything: with an "
        "epsilon of 1e-8 the advantage is 0.085. A group that agrees should teach nothing, exactly.",
        (f"{ADVANTAGES}test_equal_rewards_have_advantage_exactly_zero",),
    ),
    Mutation(
        8,
        "equality decided by a standard deviation of 0",
        "grpo_core/objective.py",
        "return highest_B <= lowest_B",
        "return ~(nan_std(reward_BG).squeeze(1) > 0)",
        "Rounding makes the standard deviation of equal rewards more than 0: dynamic sampling keeps such groups, and "
        "the log does not count them.",
        (f"{ADVANTAGES}test_equal_rewards_are_known_as_equal_however_their_mean_is_rounded",),
    ),
    Mutation(
        9,
        "the standard deviation over G",
        "grpo_core/objective.py",
        "freedom = (known.sum(dim=1, keepdim=True) - 1).clamp(min=0)",
        "freedom = known.sum(dim=1, keepdim=True)",
        "numpy's default; torch's and TRL's is over G - 1. Every advantage is larger by sqrt(G / (G - 1)): 7% at 8.",
        (f"{ADVANTAGES}test_the_standard_deviation_is_over_n_minus_one",),
    ),
    Mutation(
        9,
        "a group of one is accepted",
        "grpo_core/config.py",
        "            self.group_size >= 2,\n",
        "            self.group_size >= 1,\n",
        "A completion that is its own baseline has advantage 0 (or NaN, by 0/0): the run learns nothing for hours.",
        (f"{ADVANTAGES}test_a_group_of_one_is_refused_because_it_is_its_own_baseline",),
    ),
    Mutation(
        14,
        "gradients clipped before they are unscaled",
        "sft_core/learn/optim.py",
        "        self.scaler.unscale_(self.adamw)  # before clipping, or the bound would apply to the scaled gradient\n"
        "        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item()\n",
        "        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item()\n"
        "        self.scaler.unscale_(self.adamw)\n",
        "The bound of 1 applies to a gradient that is 65,536 times too large: after unscaling almost nothing is left.",
        (f"{OPTIM}test_gradients_are_unscaled_before_they_are_clipped",),
    ),
    Mutation(
        14,
        "a skipped step moves the schedule",
        "sft_core/learn/optim.py",
        "            (self.offloaded or self.adamw).step()\n            self.schedule.step()\n",
        "            (self.offloaded or self.adamw).step()\n        self.schedule.step()\n",
        "Every overflow, and fp16 begins with several, takes a step of the learning rate with it.",
        (f"{OPTIM}test_an_overflow_in_fp16_moves_nothing_halves_the_scale_and_asks_for_the_batch_again",),
    ),
    Mutation(
        14,
        "log-softmax in half precision",
        "sft_core/learn/logprobs.py",
        "        logits = logits.to(policy.logp_dtype)\n",
        "",
        "fp16 log-probabilities are 0.005 off, bf16 ones more; ratios and KL are made of their differences.",
        ("tests/test_logprobs.py::test_log_softmax_is_float32_under_autocast",),
    ),
    Mutation(
        15,
        "chunks without recomputing",
        "sft_core/learn/logprobs.py",
        "checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)",
        "of_chunk(*chunk)",
        "The logits of all chunks are kept for the backward pass: 608 KB a token with Qwen2.5's vocabulary, several "
        "times over. The chunks cost time and save nothing.",
        ("tests/test_logprobs.py::test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary",),
    ),
    Mutation(
        14,
        "weights in half precision under a GradScaler",
        "sft_core/model/policy.py",
        "_whole_model(source.base, dtype=torch.float32,",
        "_whole_model(source.base, dtype=torch.float16 if config.precision == 'fp16' else torch.float32,",
        "fp16 gradients cannot be unscaled (PyTorch refuses), and steps smaller than fp16's spacing would be lost.",
        (f"{RUN_SETTINGS}test_fp16_runs_under_a_grad_scaler_over_float32_weights",),
    ),
    Mutation(
        14,
        "an overflow's batch is not learned again",
        "sft_core/learn/recovery.py",
        "again = not finite and 1 <= self.scaler.get_scale() < scale",
        "again = False",
        "While the scaler searches for its factor, whole batches of samples are paid for and thrown away.",
        (f"{STEP}test_an_overflow_in_fp16_repeats_the_batch_with_half_the_factor",),
    ),
    Mutation(
        18,
        "k1 as the loss",
        "grpo_core/objective.py",
        "return difference_NT.exp() - difference_NT - 1",
        "return -difference_NT",
        "The mean of log(pi / ref) is the KL, but the mean of its gradient on the policy's own samples is 0: the "
        "penalty shows in the log and pulls nowhere.",
        (f"{OBJECTIVE}test_the_mean_gradient_of_k3_pulls_towards_the_reference",),
    ),
    Mutation(
        18,
        "k3 the wrong way round",
        "grpo_core/objective.py",
        "difference_NT = ref_logp_NT - logp_NT",
        "difference_NT = logp_NT - ref_logp_NT",
        "Still never negative and 0 where the two agree, so it looks right; its mean over the policy's samples is not "
        "the KL, and it explodes where the policy is much surer than the reference.",
        (f"{OBJECTIVE}test_the_mean_of_k3_over_the_policys_own_tokens_is_the_kl_divergence",),
    ),
    Mutation(
        26,
        "a NaN gradient is stepped on",
        "sft_core/learn/optim.py",
        "        if finite:\n            # Not",
        "        if True:\n            # Not",
        "One bad batch makes every weight NaN, and the run goes on to its end with them.",
        (f"{OPTIM}test_a_gradient_that_is_not_finite_moves_nothing_in_float32",),
    ),
    Mutation(
        26,
        "skipped steps are not counted",
        "sft_core/learn/recovery.py",
        "            self.skipped += 1\n",
        "",
        "The log of a run that skips half its steps looks like that of a healthy one.",
        (f"{RUN_SETTINGS}test_five_gradients_in_a_row_that_are_not_finite_end_the_run_and_all_are_in_the_log",),
    ),
    Mutation(
        26,
        "a lost run goes on",
        "sft_core/learn/recovery.py",
        "            self.skipped_in_a_row += 1\n",
        "",
        "Where every gradient is NaN the weights are at fault, and the rest of the run's hours are for nothing.",
        (f"{RUN_SETTINGS}test_five_gradients_in_a_row_that_are_not_finite_end_the_run_and_all_are_in_the_log",),
    ),
    Mutation(
        26,
        "bad steps need not be in a row",
        "sft_core/learn/recovery.py",
        "            self.skipped_in_a_row = 0\n",
        "            pass\n",
        "Five harmless skips, spread over a week's run, end it.",
        (f"{OPTIM}test_only_bad_steps_in_a_row_end_a_run",),
    ),
    Mutation(
        26,
        "a loss that is not finite goes unseen where its gradient is",
        "sft_core/learn/optim.py",
        "finite = math.isfinite(grad_norm) and math.isfinite(self.loss)\n",
        "finite = math.isfinite(grad_norm)\n",
        "The step is taken by whatever part of the loss had a gradient, and the log shows a hole.",
        (f"{LOST}test_a_loss_that_is_not_finite_is_skipped_even_where_its_gradient_is",),
    ),
    Mutation(
        26,
        "rows are blamed for their neighbours",
        "sft_core/learn/recovery.py",
        "for at, row in rows.micro_batches(1):",
        "for at, row in rows.micro_batches(self.micro_batch):",
        "Where one row of a packed group is NaN all are, so the message sends people to rows that are sound, or to the "
        "first of a micro-batch.",
        (f"{LOST}test_a_neighbour_that_is_lost_in_the_same_pass_only_is_not_named",),
    ),
    Mutation(
        26,
        "the search for the rows leaves its gradient",
        "sft_core/learn/recovery.py",
        "                    found.append(at.start)\n                self._forget()\n",
        "                    found.append(at.start)\n",
        "The next batch's gradient is added to the lost rows' NaN: one bad batch ends the run.",
        (f"{LOST}test_the_rows_that_hold_the_poison_are_named_and_no_other_and_nothing_moves",),
    ),
    Mutation(
        26,
        "a reference that has lost a row loses its group",
        "sft_core/learn/scored.py",
        "    if micro_batch != 1 and not logp_NT.isfinite().all():\n",
        "    if False:\n",
        "Completions are scored side by side behind their prompt, and a NaN in one reaches the others through the "
        "masked attention, 0 times NaN.",
        (f"{LOST}test_the_rows_that_hold_the_poison_are_named_and_no_other_and_nothing_moves",),
    ),
    Mutation(
        26,
        "NaN logits go on drawing",
        "eval/draw.py",
        "        token_N1 = torch.where(total_N1.isfinite(), token_N1, self.eos_id)\n",
        "",
        "The row goes on with a token that means nothing, to the end of its budget. `torch.multinomial` would raise, "
        "on a GPU with an assertion that takes the process's CUDA context along.",
        (f"{LOST}test_a_row_that_nothing_can_be_drawn_for_ends_there_and_the_others_are_what_they_were",),
    ),
    Mutation(
        26,
        "a hopeless batch is learned again for ever",
        "sft_core/learn/recovery.py",
        "again = not finite and 1 <= self.scaler.get_scale() < scale",
        "again = not finite and self.scaler.is_enabled()",
        "A gradient that is infinite at any factor is asked for until the end of time.",
        (f"{OPTIM}test_a_gradient_that_is_infinite_at_factor_one_is_not_asked_for_for_ever",),
    ),
]
