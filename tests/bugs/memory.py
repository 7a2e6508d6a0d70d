"""Bugs in what only saves memory: pitfall 34."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

HALF, OFFLOAD, MEMORY = "tests/test_half.py::", "tests/test_offload.py::", "tests/test_out_of_memory.py::"
TO_THE_BIT = f"{OFFLOAD}test_every_weight_is_that_of_a_plain_adamw_to_the_bit"

BUGS = [
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
        "smaller = halved(self.micro_batch, rows) if out_of_memory(error) and not self.shared else None",
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
