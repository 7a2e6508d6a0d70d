"""Bugs in how ranks share a step: pitfall 36."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

EQUAL = "tests/test_ranks.py::test_ranks_do_what_one_process_does"
IN_PARTS = "tests/test_ranks.py::test_ranks_with_parts_of_the_weights_do_too"
PARTS = "tests/test_ranks_in_parts.py::"
RUNS, APART = "tests/test_ranks_runs.py::", "tests/test_ranks_apart.py::"

BUGS = [
    Mutation(
        36,
        "gradients averaged instead of summed",
        "sft_core/learn/ranks.py",
        "gradient.copy_(total.view_as(gradient))",
        "gradient.copy_(total.view_as(gradient) / world())",
        "The weights of tokens have counted all ranks' rows already: N ranks learn at an N-th of the gradient, which "
        "clipping and AdamW hide.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "zeros for a weight that nobody used",
        "sft_core/learn/ranks.py",
        "used = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]",
        "used = list(parameters)",
        "Without a gradient AdamW leaves a weight alone; with one of zeros it decays it.",
        (f"{APART}test_a_weight_that_no_rank_has_used_is_left_alone_and_one_that_a_rank_has_used_is_not",),
    ),
    Mutation(
        36,
        "local token counts",
        "grpo_core/step.py",
        "    weight_NT = token_weights(mask_NT, aggregation, config.max_completion_tokens)\n",
        """    from sft_core.learn import ranks

    own = rows.part(ranks.rank(), ranks.world())
    mine_NT = torch.zeros_like(mask_NT)
    mine_NT[own.start : own.stop] = mask_NT[own.start : own.stop]
    weight_NT = token_weights(mine_NT, aggregation, config.max_completion_tokens)
""",
        "Each rank divides by its own tokens: those of a rank with short completions count for more.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "a mean of rank means",
        "sft_core/train.py",
        """    return -sum(ranks.gathered(sum(totals), "held-out loss")) / float(rows.completion_len_N.sum())
""",
        """    own = rows.part(ranks.rank(), ranks.world())
    mean = sum(totals) / float(rows.completion_len_N[own.start : own.stop].sum())
    return -sum(ranks.gathered(mean, "held-out loss")) / ranks.world()
""",
        "Ranks hold unlike numbers of tokens, so the mean of their means is not the mean.",
        (f"{RUNS}test_supervised_fine_tuning_and_evaluation_too",),
    ),
    Mutation(
        36,
        "one seed on all ranks",
        "eval/samples.py",
        "= self.uniform_NT[place_N1, column_NT] if",
        "= self.uniform_NT[place_N1 - place_N1.min(), column_NT] if",
        "All ranks draw by the same numbers, so that their completions of a prompt would be copies, and the batch is "
        "an N-th of what it seems.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "the spread of each rank's own groups",
        "grpo_core/step.py",
        "        return group_advantages(rollout.reward_BG, config.scale_rewards)\n",
        """        from sft_core.learn import ranks

        own = ranks.share(len(rollout.reward_BG))
        mine = group_advantages(rollout.reward_BG[own.start : own.stop], config.scale_rewards)
        return torch.cat(ranks.gathered(mine, "advantages"))
""",
        "--scale_rewards batch asks for the batch's spread; with the number of ranks the objective changes.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "a rank without completions leaves the exchange out",
        "eval/samples.py",
        """        drawn = (list(mine), self.completion_NT[mine], self.logp_NT[mine].cpu())
""",
        """        if not mine:
            return
        drawn = (list(mine), self.completion_NT[mine], self.logp_NT[mine].cpu())
""",
        "Where there are fewer prompts than ranks, the others wait for ever, or take its next message for this one.",
        (f"{RUNS}test_a_run_of_ranks_leaves_what_one_process_leaves",),
        hangs_after=20.0,
    ),
    Mutation(
        36,
        "metrics of rank 0's rows",
        "sft_core/learn/optim.py",
        """        return [each for part in ranks.gathered(learned, "what was learned") for each in part]
""",
        "        return learned\n",
        "Loss, KL and clipping in the log are those of an N-th of the step, and nothing shows it.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "log-probabilities of rank 0's rows",
        "grpo_core/step.py",
        'rows.gathered(old_logp_NT, "old log-probabilities")',
        "old_logp_NT",
        "The rows of other ranks are zeros there, which looks like a sampler that has gone mad.",
        (EQUAL,),
    ),
    Mutation(
        36,
        "each rank looks at its own loss",
        "sft_core/learn/optim.py",
        """        self.loss = ranks.whole(self.loss, "loss")
""",
        "",
        "A loss that is not finite is so on one rank: it leaves a step out that the others take, and from then on "
        "the ranks train different models.",
        (f"{APART}test_a_loss_that_is_not_finite_on_one_rank_stops_all",),
    ),
    Mutation(
        36,
        "rows at fault are looked for on each rank",
        "sft_core/learn/recovery.py",
        """            return [row for part in ranks.gathered(found, "rows at fault") for row in part]
""",
        "            return found\n",
        "The row that cannot be learned is another rank's, and the log, which rank 0 writes, does not name it.",
        (f"{APART}test_a_row_that_is_not_finite_on_one_rank_is_skipped_and_named_by_all",),
    ),
    Mutation(
        36,
        "rewards that draw random numbers",
        "grpo_core/scoring.py",
        "    same_random_state()  # whatever each rank's functions have drawn\n",
        "",
        "From then on each rank draws its completions by other numbers than the ones that a checkpoint holds.",
        (f"{APART}test_whatever_rewards_draw_all_ranks_go_on_with_one_random_state",),
    ),
    Mutation(
        36,
        "every rank writes",
        "sft_core/run/following.py",
        "RunFolder(config, kind) if ranks.first() else None",
        "RunFolder(config, kind)",
        "Two processes in one folder: lines of the log twice, checkpoints that are cut while they are written.",
        (f"{RUNS}test_a_run_of_ranks_leaves_what_one_process_leaves",),
    ),
    Mutation(
        36,
        "what is tried at loading waits for the others",
        "sft_core/learn/trust.py",
        "with torch.random.fork_rng(devices), ranks.alone():",
        "with torch.random.fork_rng(devices):",
        "A rank on whose machine a shortcut fails tries one way more than the others, which wait for ever; and each "
        "draws a part only of the few probes.",
        (f"{APART}test_what_is_tried_at_loading_waits_for_no_other_rank",),
    ),
    Mutation(
        36,
        "a checkpoint of one shard",
        "sft_core/learn/shards.py",
        "    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor\n",
        "    return tensor.to_local() if isinstance(tensor, DTensor) else tensor\n",
        "Each matrix is saved as the rows that rank 0 holds; what reads it finds other shapes.",
        (f"{PARTS}test_a_policy_in_parts_is_put_together_again_and_takes_other_weights",),
        hangs_after=60.0,
    ),
    Mutation(
        36,
        "weights in parts, and the mean of the gradients",
        "sft_core/learn/shards.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(ranks.world()))",
        "FSDP averages over ranks what has been divided by all ranks' tokens before.",
        (IN_PARTS,),
    ),
    Mutation(
        36,
        "the norm of one rank's part",
        "sft_core/learn/optim.py",
        "whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item()",
        "whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item() / ranks.world() ** 0.5",
        "The root of one part's squares, where other ranks have the other parts: clipping comes too late.",
        (IN_PARTS,),
    ),
    Mutation(
        36,
        "a rank with fewer micro-batches gathers fewer weights",
        "sft_core/learn/shards.py",
        "range(most - len(mine))",
        "range(0)",
        "The others wait for it in the middle of a pass, or take the weights that it gathers next for these.",
        (IN_PARTS,),
        hangs_after=60.0,
    ),
    Mutation(
        36,
        "a micro-batch that is passed again counts again",
        "sft_core/learn/optim.py",
        "            loss = loss * 0\n",
        "            pass\n",
        "The last rows of a rank that has fewer micro-batches have twice their weight in the gradient.",
        (IN_PARTS,),
    ),
    Mutation(
        36,
        "one rank saves what all hold",
        "sft_core/run/progress.py",
        "if self.at_rest and not (self.ending or self.shared):",
        "if self.at_rest and not self.ending:",
        "A rank that gets a signal gathers weights to save them, and the others give it those of another layer.",
        (f"{PARTS}test_after_a_signal_to_one_rank_all_complete_the_step_and_save_it",),
        hangs_after=60.0,
    ),
]
