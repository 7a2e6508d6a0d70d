"""Bugs in what is said of a model: pitfall 35."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

EVAL, STATISTICS = "tests/test_eval.py::", "tests/test_statistics.py::"

BUGS = [
    Mutation(
        35,
        "an evaluation's samples move the training's random state",
        "eval/evaluate.py",
        "        set_random_state(before)\n",
        "        pass\n",
        "Looking changes what is looked at: with another --eval_every the same seed is another run, and every "
        "evaluation sets training back to the same draws.",
        (f"{EVAL}test_samples_follow_from_their_seed_and_leave_every_random_state_as_it_was",),
    ),
    Mutation(
        35,
        "samples given to the problems of another order",
        "eval/evaluate.py",
        "examples[rows[place]].answer",
        "examples[sorted(rows)[place]].answer",
        "Problems are asked by their length, and the answers are held against the golds in the order of the file: "
        "accuracy, pass@k and maj@k are those of guessing.",
        (f"{EVAL}test_samples_stay_with_their_problem_whatever_its_length",),
    ),
    Mutation(
        35,
        "pass@k from the share of right samples",
        "eval/statistics.py",
        "return 1 - math.comb(n - right, k) / math.comb(n, k)",
        "return 1 - (1 - right / n) ** k",
        "As if the samples were drawn with replacement: too low at every k above 1, most of all at k = n, where one "
        "right sample of eight is worth 0.66 instead of 1.",
        (f"{STATISTICS}test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer",),
    ),
    Mutation(
        35,
        "the right answer wins every tie",
        "eval/statistics.py",
        "Fraction(number * math.comb(right, r), ties + 1)",
        "Fraction(number * math.comb(right, r))",
        "Nobody who votes without the gold can break ties that way: maj@2 becomes pass@2, and a model that answers at "
        "random gains by voting.",
        (f"{STATISTICS}test_maj_at_k_is_the_mean_over_all_subsets_with_ties_shared",),
    ),
    Mutation(
        35,
        "what is no number votes",
        "eval/statistics.py",
        "        if answer is None or parse_number(answer) is None:\n",
        "        if answer is None:\n",
        "Words and empty answers tie with numbers that were given once, and take the majority from them.",
        (f"{STATISTICS}test_numbers_that_are_equal_are_one_vote_however_they_are_written",),
    ),
    Mutation(
        35,
        "McNemar's test on one side",
        "eval/statistics.py",
        "return min(1.0, 2 * sum(",
        "return min(1.0, sum(",
        "Which side to look at is chosen after the results are known, so p is half of what it should be: one change "
        "in ten that does nothing is reported at 5%.",
        (f"{STATISTICS}test_mcnemars_p_is_the_exact_binomial_test",),
    ),
]
