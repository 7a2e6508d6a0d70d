"""Bugs in who samples, who learns and who is the reference: pitfalls 6, 7, 16, 19, 20, 24 and 25."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

STEP, SAMPLING, REFERENCE = "tests/test_step.py::", "tests/test_sampling.py::", "tests/test_reference.py::"
RATIO_ONE = f"{STEP}test_the_first_update_has_ratio_exactly_one_and_the_samplers_logprobs"

STEP_IN_A_RUN = "tests/test_step_in_a_run.py::"

SAMPLING_SETTINGS = "tests/test_sampling_settings.py::"
VLLM = "tests/test_vllm.py::"

BUGS = [
    Mutation(
        6,
        "the learner ignores the temperature",
        "sft_core/learn/logprobs.py",
        "logits = logits / temperature",
        "logits = logits / 1.0",
        "Tokens are drawn from one distribution and learned under another: the gradient is not that of the expected "
        "reward. The ratio still begins at 1; in the log only the sampler gap shows it.",
        (RATIO_ONE,),
    ),
    Mutation(
        6,
        "the reference ignores the temperature",
        "grpo_core/reference.py",
        """scored(self.policy, rows, temperature, micro_batch, entropy="none")""",
        """scored(self.policy, rows, 1.0, micro_batch, entropy="none")""",
        "The KL is not 0 at the first step and pulls the policy towards a hotter or colder self.",
        (f"{REFERENCE}test_kl_is_zero_at_the_first_step",),
    ),
    Mutation(
        6,
        "the sampler notes log-probabilities without the temperature",
        "eval/draw.py",
        "chosen_N1 = (scores.gather(1, token_N1) - highest_N1) / self.temperature",
        "chosen_N1 = scores.gather(1, token_N1) - highest_N1",
        "The sampler's log-probabilities are not those of its draws, so the comparison that would find the two bugs "
        "above cries wolf, or is switched off.",
        (f"{SAMPLING}test_the_sampler_records_the_logprob_that_the_learner_computes",),
    ),
    Mutation(
        6,
        "transformers' own top-k of 50",
        "eval/draw.py",
        "    if sampling.top_k:\n        found.append(TopKLogitsWarper(sampling.top_k))",
        "    if True:\n        found.append(TopKLogitsWarper(sampling.top_k or 50))",
        "What `generate` does unless told otherwise in many releases: everything but the 50 likeliest tokens is cut "
        "off, while the learner scores the uncut distribution.",
        (f"{SAMPLING}test_tokens_are_drawn_from_the_whole_vocabulary",),
    ),
    Mutation(
        7,
        "dropout on in the learner",
        "eval/trust.py",
        "    without_dropout(policy.model)  # after a first pass, in which some models make new modules\n",
        "",
        "The sampler has no dropout and the learner has: the ratio starts anywhere but at 1, and clipping acts on "
        "noise.",
        (f"{STEP_IN_A_RUN}test_a_run_turns_dropout_off_in_policy_and_reference",),
    ),
    Mutation(
        7,
        "attention's dropout forgotten",
        "sft_core/model/policy.py",
        """            if ("dropout" in name or "jitter" in name) and isinstance(value, float):""",
        """            if "dropout" in name and "attention" not in name and isinstance(value, float):""",
        "Attention layers keep their dropout as a plain number, not as a module; a loop over `nn.Dropout` misses it.",
        (f"{STEP}test_a_model_with_dropout_samples_and_learns_one_distribution",),
    ),
    Mutation(
        7,
        "the sampler's log-probabilities as the old ones",
        "grpo_core/step.py",
        "old_logp_NT[cut] = logp_NT.detach()",
        "old_logp_NT[cut] = rollout.samples.logp_NT[cut]",
        "Computed a token at a time with a cache, they differ from the learner's by rounding: in float32 that is "
        "little, in half precision it clips tokens in the very first update.",
        (RATIO_ONE, "tests/test_precision.py::test_the_first_update_has_ratio_exactly_one"),
    ),
    Mutation(
        7,
        "old log-probabilities taken anew in every update",
        "grpo_core/step.py",
        "if on_policy:",
        "if True:",
        "The ratio is 1 for ever: nothing is clipped, and mu updates run away from the samples unchecked.",
        (f"{STEP}test_a_step_samples_once_however_many_updates_it_takes",),
    ),
    Mutation(
        7,
        "autocast in the learner alone",
        "eval/sampling.py",
        "        ready_to_generate(model),\n        policy.precision.autocast(),\n",
        "        ready_to_generate(model),\n",
        "The sampler runs in float32 and the learner in half precision: two slightly different policies, and "
        "generation at a fraction of the speed.",
        (f"{SAMPLING}test_the_sampler_computes_in_the_learners_precision",),
    ),
    Mutation(
        16,
        "checkpointing stays on while generating",
        "eval/around.py",
        "    model.eval()\n    model.generation_config = GenerationConfig()\n",
        "    for module in model.modules():\n"
        "        if type(module).__name__ == 'Dropout':\n"
        "            module.eval()\n"
        "    model.generation_config = GenerationConfig()\n",
        "Checkpointed layers in train mode do without the cache. Older releases of transformers recompute the prefix "
        "for each token; 5 passes one token on and nothing else, so it sees itself alone, and the samples are "
        "nonsense.",
        (f"{SAMPLING}test_gradient_checkpointing_changes_no_sample",),
    ),
    Mutation(
        16,
        "use_cache is off",
        "eval/around.py",
        "    config.use_cache = policy.cached\n",
        "    config.use_cache = False\n",
        "Training code sets it against a warning; left so, every token recomputes the whole prefix. Nothing is wrong "
        "but the time, which is quadratic.",
        (f"{SAMPLING}test_gradient_checkpointing_leaves_the_cache_on",),
    ),
    Mutation(
        19,
        "each of the mu updates samples again",
        "grpo_core/step.py",
        "    for update in range(config.mu):\n",
        "    for update in range(config.mu):\n"
        "        if update:\n"
        "            rollout = sample_and_score(learner, examples, clock)\n"
        "            rows, kept_NT = rollout.samples.rows, rollout.samples.rows.mask_NT\n"
        "            advantage_BG = advantages(rollout, config)\n"
        "            advantage_NT = token_advantages(advantage_BG, kept_NT, policy.logp_dtype)\n"
        "            weight_NT = token_weights(rows.mask_NT, config.objective.aggregation, "
        "config.max_completion_tokens)\n"
        "            if learner.reference:\n"
        "                ref_logp_NT = learner.reference.logprobs(rows, config.temperature, size)\n"
        "            old_logp_NT, update = torch.zeros_like(rows.completion_NT, dtype=policy.logp_dtype), 0\n",
        "It learns, but it is not the algorithm: sampling, the costly half, is paid mu times, the ratio is 1 in every "
        "update and clipping is dead code.",
        (f"{STEP}test_a_step_samples_once_however_many_updates_it_takes",),
    ),
    Mutation(
        20,
        "with LoRA, the reference is the base model",
        "grpo_core/reference.py",
        "            set_peft_model_state_dict(model, start, adapter_name=ADAPTER)\n",
        "",
        "A fresh adapter adds 0, so pi_ref is the model before SFT: the KL starts high and undoes what SFT taught. "
        "`disable_adapter()` for the reference is the same bug.",
        (f"{REFERENCE}test_kl_is_zero_at_the_first_step",),
    ),
    Mutation(
        20,
        "the reference is the policy itself",
        "grpo_core/reference.py",
        "model=copy.deepcopy(policy.model).requires_grad_(False).eval())",
        "model=policy.model)",
        "Not copied, it moves along: the KL is 0 for ever and holds nothing.",
        (f"{REFERENCE}test_kl_is_positive_once_the_policy_has_moved",),
    ),
    Mutation(
        20,
        "the reference's adapter stays active",
        "grpo_core/reference.py",
        """        finally:
            model.set_adapter("default")
""",
        """        finally:
            pass
""",
        "After the first look at the reference every gradient goes to the frozen adapter, or nowhere.",
        (f"{REFERENCE}test_holding_and_asking_a_reference_changes_nothing_about_the_policy",),
    ),
    Mutation(
        24,
        "sampling in train mode",
        "eval/around.py",
        "    model.eval()\n    model.generation_config = GenerationConfig()\n",
        "    model.generation_config = GenerationConfig()\n",
        "With dropout, each token is drawn from another random thinning of the policy.",
        (f"{SAMPLING}test_dropout_is_off_while_sampling",),
    ),
    Mutation(
        24,
        "the mode is not put back",
        "eval/around.py",
        "        model.train(was_training)\n",
        "        model.eval()\n",
        "After the first sampling the learner is in eval mode: gradient checkpointing silently stops, and memory runs "
        "out.",
        (f"{SAMPLING_SETTINGS}test_sampling_happens_in_eval_mode_and_restores_the_mode",),
    ),
    Mutation(
        25,
        "the model's generation settings are inherited",
        "eval/around.py",
        "    model.generation_config = GenerationConfig()\n    try:",
        "    try:",
        "A model may ship a repetition penalty, top-k or top-p: `generate` fills in whatever is left unset, and the "
        "samples are no longer the policy's.",
        (f"{SAMPLING_SETTINGS}test_the_models_own_generation_settings_are_not_inherited",),
    ),
    Mutation(
        7,
        "vLLM goes on with the weights that it was started with",
        "grpo_core/vllm_sampler.py",
        "        self.hand_over(weights(policy))\n",
        "",
        "Another program samples, and nobody tells it what was learned: every step is further off-policy, which the "
        "importance weight hides until it is cut.",
        (f"{VLLM}test_a_run_with_vllms_numbers_is_a_run_with_the_default_sampler",),
    ),
    Mutation(
        7,
        "the importance weight upside down",
        "grpo_core/variants.py",
        "(old_logp_NT - sampler_logp_NT) * mask_NT",
        "(sampler_logp_NT - old_logp_NT) * mask_NT",
        "The sampler's rounding is squared instead of undone. Near 1 nobody sees it.",
        (f"{VLLM}test_a_drift_of_the_sampler_is_undone_in_expectation_up_to_the_cap",),
    ),
]
