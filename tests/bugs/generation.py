"""Bugs in how completions are generated quickly: pitfall 33."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

GENERATION = "tests/test_generation.py::"
GREEDY = f"{GENERATION}test_greedy_completions_are_the_plain_calls_token_by_token"
DRAW, CACHE = "tests/test_draw.py::", "tests/test_cache.py::"
FREQUENCIES = f"{GENERATION}test_whole_completions_are_drawn_as_often_as_their_probability_says"
RECORDED = f"{GENERATION}test_every_way_to_sample_records_the_learners_logprobs"
DECODING = "tests/test_decoding.py::"

BUGS = [
    Mutation(
        33,
        "every row continues the first prompt",
        "eval/going.py",
        "    begins[first[1:]] = 1\n",
        "",
        "All rows get the first prompt's keys and values: each answers a question that it was not asked, and is "
        "rewarded by the answer to its own.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "a prompt that comes back is taken for the one before",
        "eval/going.py",
        "row == 0 or prompts[row] != prompts[row - 1]]",
        "prompts.index(prompts[row]) == row]",
        "Each prompt is read where it is first seen, and the rows after that belong to it until a new one begins: with "
        "A, B, A the third row continues B.",
        (GREEDY,),
    ),
    Mutation(
        33,
        "positions by column in the prefill",
        "eval/going.py",
        "        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],\n",
        "        position_ids=torch.arange(prompt_NP.shape[1] - 1, device=prompt_NP.device).expand(len(first), -1),\n",
        "Left padding shifts the shorter prompts, while `generate` counts their next token from the mask: the last "
        "token of a prompt stands in the midst of the others.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "the prefill attends to padding",
        "eval/going.py",
        "        attention_mask=attention_RP[:, :-1],\n",
        "",
        "Masked later on, but the prompt's own keys and values were computed with the padding in view.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "the prompt's last token is in the cache already",
        "eval/going.py",
        """        input_ids=prompt_NP[first_R, :-1],
        attention_mask=attention_RP[:, :-1],
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
""",
        """        input_ids=prompt_NP[first_R],
        attention_mask=attention_RP,
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0),
""",
        "`generate` needs one token to begin with and computes it again: the model reads the end of its prompt twice.",
        (RECORDED, GREEDY),
    ),
    Mutation(
        33,
        "the cache keeps the first rows instead of the going ones",
        "eval/going.py",
        "self.cache.batch_select_indices(which)",
        "self.cache.batch_select_indices(torch.arange(len(which), device=which.device))",
        "After the first completion has ended, rows go on with another row's past. Every shape fits, and the text is "
        "fluent.",
        (FREQUENCIES, GREEDY),
    ),
    Mutation(
        33,
        "the mask keeps the first rows instead of the going ones",
        "eval/going.py",
        "self.attention_NW[which]",
        "self.attention_NW[: len(which)]",
        "Rows see another prompt's padding, or lose the beginning of their own; with prompts of one length nothing "
        "shows.",
        (RECORDED,),
    ),
    Mutation(
        33,
        "what is drawn after others left is written to the first rows",
        "eval/going.py",
        "= self.place_N[which], ",
        "= torch.arange(len(which), device=which.device), ",
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
        "eval/samples.py",
        "self.uniform_NT[place_N1, column_NT] if",
        "self.uniform_NT[torch.arange(len(place_N1))[:, None], column_NT] if",
        "Every draw is right, but which completion comes of a seed depends on who has left before: --rows_leave False, "
        "or another batch, gives another run.",
        (f"{GENERATION}test_a_completion_is_the_same_whichever_rows_are_sampled_beside_it",),
    ),
    Mutation(
        33,
        "what came in beside longer rows sees the padding before it",
        "eval/going.py",
        "both(self.attention_NW, others.attention_NW)",
        "both(self.attention_NW, torch.ones_like(others.attention_NW))",
        "A prompt that takes an ended row's place is padded to the width of those that go on. Evaluated one problem at "
        "a time the model does better.",
        (f"{GENERATION}test_a_completion_is_the_same_however_many_are_drawn_at_a_time",),
    ),
    Mutation(
        33,
        "all rows draw by the numbers of the one that is furthest",
        "eval/sampling.py",
        "column_NT = going.drawn_N[:, None] + torch",
        "column_NT = going.drawn_N.max().expand(len(going), 1) + torch",
        "Rows that began later are written into the columns of others' tokens: holes of padding in the middle.",
        (f"{GENERATION}test_a_completion_is_the_same_however_many_are_drawn_at_a_time",),
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
        "eval/going.py",
        "row == 0 or prompts[row] != prompts[row - 1]]",
        "True]",
        "Nothing is wrong but the time: G completions read their prompt G times.",
        (f"{GENERATION}test_the_prompt_is_read_once_for_its_whole_group",),
    ),
    Mutation(
        33,
        "a copy computes with the weights that it was copied from",
        "eval/decoding/compiled.py",
        "        forget_pass(fresh)  # it would be",
        "        pass  # it would be",
        "transformers keeps a model's compiled pass as an attribute, and a copy of the model takes it along: what is "
        "written into the copy's own weights is never read.",
        (f"{DECODING}test_a_copy_of_a_model_with_a_compiled_pass_computes_its_own",),
    ),
    Mutation(
        33,
        "a compiled pass goes on with the first step's weights",
        "eval/decoding/compiled.py",
        "        if parameter is not new[name]:  # what",
        "        if parameter is kept:  # what",
        "A graph reads fixed addresses, so the sampler's half-precision copy stays; without new weights in it every "
        "step samples from the policy that the run began with.",
        (f"{DECODING}test_the_next_step_is_drawn_by_the_weights_that_the_optimizer_has_left",),
    ),
    Mutation(
        33,
        "each batch is as large as its rows are many",
        "eval/decoding/compiled.py",
        "1 << (at_once - 1).bit_length()",
        "at_once",
        "Nothing is wrong but the time: a pass is compiled anew for each number of rows, for half a minute, and after "
        "eight of them never again.",
        (f"{DECODING}test_the_steps_after_the_first_compile_nothing",),
    ),
    Mutation(
        33,
        "prompts that are still being read draw tokens",
        "eval/decoding/paged.py",
        "tokens + [self.nobody] * (self.at_once - len(tokens))",
        "tokens",
        "A pass computes something for each request, also for one whose prompt is half read; it is noted as a token of "
        "whichever row had that place in the pass before.",
        (f"{DECODING}test_a_prompt_that_is_read_in_parts_draws_nothing_before_it_is_read",),
    ),
]
