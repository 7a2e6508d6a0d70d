"""Bugs in what only saves time and memory: pitfalls 33 and 34."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

GENERATION, HALF, OFFLOAD = "tests/test_generation.py::", "tests/test_half.py::", "tests/test_offload.py::"
MEMORY = "tests/test_out_of_memory.py::"
GREEDY = f"{GENERATION}test_greedy_completions_are_the_plain_calls_token_by_token"
DRAW, CACHE = "tests/test_draw.py::", "tests/test_cache.py::"
FREQUENCIES = f"{GENERATION}test_whole_completions_are_drawn_as_often_as_their_probability_says"
RECORDED = f"{GENERATION}test_every_way_to_sample_records_the_learners_logprobs"
TO_THE_BIT = f"{OFFLOAD}test_every_weight_is_that_of_a_plain_adamw_to_the_bit"

BUGS = [
    Mutation(
        33,
        "every row continues the first prompt",
        "eval/sampling.py",
        "    begins[first[1:]] = 1\n",
        "",
        "All rows get the first prompt's keys and values: each answers a question that it was not asked, and is "
        "rewarded by the answer to its own.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "a prompt that comes back is taken for the one before",
        "eval/sampling.py",
        "row == 0 or prompts[row] != prompts[row - 1]]",
        "prompts.index(prompts[row]) == row]",
        "Each prompt is read where it is first seen, and the rows after that belong to it until a new one begins: with "
        "A, B, A the third row continues B.",
        (GREEDY,),
    ),
    Mutation(
        33,
        "positions by column in the prefill",
        "eval/sampling.py",
        "        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],\n",
        "        position_ids=torch.arange(prompt_NP.shape[1] - 1, device=prompt_NP.device).expand(len(first), -1),\n",
        "Left padding shifts the shorter prompts, while `generate` counts their next token from the mask: the last "
        "token of a prompt stands in the midst of the others.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "the prefill attends to padding",
        "eval/sampling.py",
        "        attention_mask=attention_RP[:, :-1],\n",
        "",
        "Masked later on, but the prompt's own keys and values were computed with the padding in view.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "the prompt's last token is in the cache already",
        "eval/sampling.py",
        """        input_ids=prompt_NP[first, :-1],
        attention_mask=attention_RP[:, :-1],
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
""",
        """        input_ids=prompt_NP[first],
        attention_mask=attention_RP,
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0),
""",
        "`generate` needs one token to begin with and computes it again: the model reads the end of its prompt twice.",
        (RECORDED, GREEDY),
    ),
    Mutation(
        33,
        "the cache keeps the first rows instead of the going ones",
        "eval/sampling.py",
        "cache.batch_select_indices(going)",
        "cache.batch_select_indices(torch.arange(len(going), device=device))",
        "After the first completion has ended, rows go on with another row's past. Every shape fits, and the text is "
        "fluent.",
        (FREQUENCIES, GREEDY),
    ),
    Mutation(
        33,
        "the mask keeps the first rows instead of the going ones",
        "eval/sampling.py",
        "pad(attention[going], (0,",
        "pad(attention[: len(going)], (0,",
        "Rows see another prompt's padding, or lose the beginning of their own; with prompts of one length nothing "
        "shows.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "what is drawn after others left is written to the first rows",
        "eval/sampling.py",
        "width = alive[going], longer",
        "width = torch.arange(len(going), device=device), longer",
        "The ends of completions change owners: rows that had ended are written over, the others stop in mid-word.",
        (FREQUENCIES,),
    ),
    Mutation(
        33,
        "rows leave whatever the model remembers",
        "sft_core/model/policy.py",
        "rows_leave=config.rows_leave and divisible,",
        "rows_leave=config.rows_leave,",
        "Models with sliding windows or recurrent states keep other things than a key and a value for each token, and "
        "those cannot be taken up again in mid-completion as a plain cache can.",
        (f"{GENERATION}test_a_model_that_does_not_attend_to_everything_is_sampled_in_one_plain_call",),
    ),
    Mutation(
        33,
        "ended rows stay",
        "eval/sampling.py",
        "(self.ended_N.sum() * LEAVING >= len(self.ended_N))",
        "(self.ended_N.sum() >= len(self.ended_N))",
        "Nothing is wrong but the time: the batch keeps its size until its longest completion ends.",
        (f"{GENERATION}test_rows_that_have_ended_leave",),
    ),
    Mutation(
        33,
        "random numbers go by place and not by row",
        "eval/sampling.py",
        "uniform_NT[alive, width:]",
        "uniform_NT[: len(alive), width:]",
        "Every draw is right, but which completion comes of a seed depends on who has left before: --rows_leave False, "
        "or another batch, gives another run.",
        (f"{GENERATION}test_a_completion_is_the_same_whichever_rows_are_sampled_beside_it",),
    ),
    Mutation(
        33,
        "the end of the vocabulary is never drawn",
        "eval/draw.py",
        "return torch.cat([sums, left_NB.sum(dim=-1, keepdim=True)], dim=1)",
        "return sums",
        "Words behind the last whole block have no weight: the last 384 of Qwen2.5's, and all of a small vocabulary.",
        (f"{DRAW}test_the_ends_of_the_interval_fall_on_the_first_and_last_token_with_a_weight",),
    ),
    Mutation(
        33,
        "keys in half precision for any attention",
        "eval/cache.py",
        """autocast_dtype if model.config._attn_implementation in ("sdpa", NAME) else None""",
        "autocast_dtype",
        "Attention that computes its scores in float32 loses digits while sampling, and not while learning.",
        (f"{CACHE}test_only_layers_that_keep_every_token_get_room_and_half_precision_only_where_attention_casts",),
    ),
    Mutation(
        33,
        "every row reads its own prompt",
        "eval/sampling.py",
        "row == 0 or prompts[row] != prompts[row - 1]]",
        "True]",
        "Nothing is wrong but the time: G completions read their prompt G times.",
        (f"{GENERATION}test_the_prompt_is_read_once_for_its_whole_group",),
    ),
    Mutation(
        34,
        "the twin's embedding in half precision too",
        "sft_core/model/half.py",
        "isinstance(module, (torch.nn.Linear, Conv1D))",
        "isinstance(module, (torch.nn.Linear, Conv1D, torch.nn.Embedding))",
        "Autocast leaves embeddings in float32, and the residual stream with them. Rounded, the sampler's numbers are "
        "not the learner's.",
        (f"{HALF}test_a_twins_logits_are_the_policys_under_autocast_bit_by_bit",),
    ),
    Mutation(
        34,
        "the policy itself is halved",
        "sft_core/model/half.py",
        "twin = copy.deepcopy(model, shared)",
        "twin = model",
        "The float32 masters are gone after the first sampling, with them every update smaller than bf16 can tell.",
        (f"{HALF}test_making_a_twin_leaves_the_policy_as_it_was",),
    ),
    Mutation(
        34,
        "the twin of the first step samples for ever",
        "sft_core/model/half.py",
        """    twin = copy.deepcopy(model, shared)
    halve(twin, dtype, tied=True)
""",
        """    twins = vars(model).setdefault("_twins", [])
    if not twins:
        twins.append(copy.deepcopy(model, shared))
        halve(twins[0], dtype, tied=True)
    twin = twins[0]
""",
        "A copy that is not made anew does not learn: from the second step on, samples come from a policy of the past, "
        "and only the sampler's log-probabilities tell.",
        (f"{HALF}test_every_sampling_uses_the_current_weights",),
    ),
    Mutation(
        34,
        "the twin shares nothing",
        "sft_core/model/half.py",
        "copy.deepcopy(model, shared)",
        "copy.deepcopy(model)",
        "Nothing is wrong but the memory: while it is made, all weights are there three times over.",
        (f"{HALF}test_a_twin_has_matrices_of_its_own_and_shares_all_else",),
    ),
    Mutation(
        34,
        "a reference that follows in half precision",
        "grpo_core/reference.py",
        "if policy.half_dtype and not sync_every:",
        "if policy.half_dtype:",
        "Mixed into a bf16 weight, a change below 1 in 256 is rounded away: the reference stays where it was.",
        (f"{HALF}test_a_reference_that_follows_stays_in_float32",),
    ),
    Mutation(
        34,
        "offloaded moments are not written back",
        "sft_core/learn/offload.py",
        "offset=offset), dtype=dtype)",
        "offset=offset), dtype=dtype).clone()",
        "Every step finds moments of zero: AdamW's bias correction, which counts on, then shrinks the step to nothing.",
        (TO_THE_BIT,),
    ),
    Mutation(
        34,
        "all pieces in one place",
        "sft_core/learn/offload.py",
        "_mapped(self.file, self.offsets[number, piece],",
        "_mapped(self.file, 0,",
        "Each piece's moments are the last one's. The loss still falls, for a while.",
        (TO_THE_BIT,),
    ),
    Mutation(
        34,
        "each piece counts a step",
        "sft_core/learn/offload.py",
        '"step": self.updates[number].clone()',
        '"step": self.updates[number]',
        "AdamW adds 1 at each call, so a parameter of many pieces is soon hundreds of steps ahead, and the bias "
        "correction is gone: its first steps are ten times too small.",
        (TO_THE_BIT,),
    ),
    Mutation(
        34,
        "the moments outlive the run",
        "sft_core/learn/offload.py",
        "            weakref.finalize(self, os.close, self.file)\n",
        "            pass\n",
        "Eight bytes a weight stay on the disk for each run of a notebook, until it is full.",
        (f"{OFFLOAD}test_the_file_has_room_for_two_numbers_a_weight_and_no_name",),
    ),
    Mutation(
        34,
        "half a gradient is kept when memory runs out",
        "sft_core/learn/recovery.py",
        "            self.adamw.zero_grad(set_to_none=True)\n            self.micro_batch",
        "            self.micro_batch",
        "The micro-batches before, and the layers that the broken pass had reached, count twice.",
        (f"{MEMORY}test_memory_may_run_out_in_a_later_micro_batch",),
    ),
    Mutation(
        34,
        "the attempt that was too large stays in memory",
        "sft_core/learn/recovery.py",
        "                traceback.clear_frames(error.__traceback__)  # which hold the tensors that were too much\n",
        "",
        "The error holds its frames, and they hold the activations. Where one of them holds the error too, as happens "
        "in libraries, all stay until the collector comes: the smaller micro-batch finds no more room than the large.",
        (f"{MEMORY}test_what_the_failed_attempt_held_is_freed_before_the_next",),
    ),
    Mutation(
        34,
        "any error is taken for a lack of memory",
        "sft_core/learn/recovery.py",
        "smaller = halved(self.micro_batch, rows) if out_of_memory(error) else None",
        "smaller = halved(self.micro_batch, rows)",
        "A bug's message comes after log2 of the micro-batch attempts and as many lines that blame the memory.",
        (f"{MEMORY}test_other_errors_pass_through",),
    ),
    Mutation(
        34,
        "only CUDA's lack of memory is known",
        "sft_core/learn/recovery.py",
        """isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)""",
        "isinstance(error, torch.OutOfMemoryError)",
        "The CPU's allocator says it with a plain RuntimeError, and the run ends.",
        (f"{MEMORY}test_an_sft_step_that_runs_out_of_memory_learns_the_same",),
    ),
    Mutation(
        14,
        "a pass that overflowed counts in the metrics",
        "grpo_core/step.py",
        """            clock.lap("optimizer")
        updates.append(terms_of_each)  # of the pass that counts
""",
        """            updates.append(terms_of_each)
            clock.lap("optimizer")
""",
        "Where the first of two updates overflows it is counted twice: losses and clipped shares lean to the update "
        "that clips nothing.",
        (f"{MEMORY}test_memory_and_fp16s_range_may_run_out_in_one_step",),
    ),
]
