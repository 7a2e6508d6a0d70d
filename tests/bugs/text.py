"""Bugs in what is read from the model's text: pitfalls 1, 2, 17 and 23."""

from __future__ import annotations

from tests.bugs.mutation import Mutation

REWARDS = "tests/test_rewards.py::"

ANSWERS = "tests/test_answers.py::"

BUGS = [
    Mutation(
        1,
        "soft format by a regex without DOTALL",
        "rewards/functions.py",
        """    bridge = _REASONING_THEN_ANSWER.search(text)
    return bridge is not None and text.find(ANSWER_CLOSE, bridge.end()) != -1
""",
        """    return re.match(r"<reasoning>.*?</reasoning>\\s*<answer>.*?</answer>", text) is not None
""",
        "`.` stops at a newline, so reasoning of more than one line scores 0: the reward never fires, or teaches the "
        "model to think in one line.",
        (f"{REWARDS}test_multiline_reasoning_earns_the_format_rewards",),
    ),
    Mutation(
        1,
        "strict format by a regex without DOTALL",
        "rewards/functions.py",
        """    return (
        bridge != ""
        and reasoning.startswith(f"{REASONING_OPEN}\\n")
        and answer.endswith(f"\\n{ANSWER_CLOSE}\\n")
        and all(_occurs_once(text, tag) for tag in TAGS)
    )
""",
        """    return re.match(r"^<reasoning>\\n.*?\\n</reasoning>\\n<answer>\\n.*?\\n</answer>\\n$", text) is not None
""",
        "The customary pattern. It pays for one line of reasoning and never for two.",
        (f"{REWARDS}test_multiline_reasoning_earns_the_format_rewards",),
    ),
    Mutation(
        2,
        "an answer without its tags is an answer",
        "rewards/extract.py",
        """    opened = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    if opened == -1:
        return ""
    start = opened + len(ANSWER_OPEN)
    return text[start : text.find(ANSWER_CLOSE, start)].strip()
""",
        """    return text.split(ANSWER_OPEN)[-1].split(ANSWER_CLOSE)[0].strip()
""",
        "The customary version. Without tags it returns the whole text, so a bare number earns full correctness and "
        "the model learns to leave the format out.",
        (f"{REWARDS}test_an_answer_without_its_format_earns_nothing",),
    ),
    Mutation(
        2,
        "the last #### instead of the first",
        "rewards/extract.py",
        "_, mark, rest = text.partition(HASH_MARK)",
        "_, mark, rest = text.rpartition(HASH_MARK)",
        "A model that does not stop invents further problems; the answer to the last of those is judged, and right "
        "answers earn nothing.",
        (f"{ANSWERS}test_the_hash_answer_is_the_first_mark_to_the_end_of_its_line",),
    ),
    Mutation(
        2,
        "the sign is lost",
        "rewards/extract.py",
        """Decimal(("-" if "-" in prefix else "") + digits""",
        """Decimal(digits""",
        "3 is paid where -3 is right.",
        (f"{ANSWERS}test_commas_sign_dollar_percent_and_final_dot_do_not_change_a_number",),
    ),
    Mutation(
        2,
        "commas may stand anywhere",
        "rewards/extract.py",
        """if text[0] in ",0" or commas.strip(",") or len(commas) != text.count(","):""",
        """if text[0] == "," or text[-1] == "," and commas:""",
        "'1,07' is read as 107 and '10,72' as 1072: decimal commas and lists of numbers become answers.",
        (f"{ANSWERS}test_what_is_not_one_ascii_number_is_not_read_as_one",),
    ),
    Mutation(
        2,
        "a trailing percent makes an answer wrong",
        "rewards/extract.py",
        """unended = text.rstrip("%.")""",
        """unended = text.rstrip(".")""",
        "Right answers to percentage problems earn nothing when they are written as such.",
        (f"{ANSWERS}test_commas_sign_dollar_percent_and_final_dot_do_not_change_a_number",),
    ),
    Mutation(
        2,
        "isdigit alone",
        "rewards/extract.py",
        "return text.isascii() and text.isdigit()",
        "return text.isdigit()",
        "True for '²' too, which no number constructor takes: one such completion ends the run hours in. Other "
        "scripts' digits are read as ours.",
        (f"{ANSWERS}test_what_is_not_one_ascii_number_is_not_read_as_one",),
    ),
    Mutation(
        2,
        "numbers compared as floats",
        "rewards/extract.py",
        "return _EXACT.subtract(x, y).copy_abs() <= Decimal(str(tolerance))",
        "return abs(float(x) - float(y)) <= tolerance or float(x) == float(y)",
        "Every integer of more than 308 digits is the same inf: a model that repeats digits hits any such gold.",
        (f"{ANSWERS}test_numbers_beyond_every_limit_of_int_float_and_decimal_are_compared_exactly",),
    ),
    Mutation(
        17,
        "completions tokenized again from their text",
        "eval/samples.py",
        """        return Samples(rows, self.texts, sent(self.truncated_N, self.policy.device), logp_NT)""",
        """        ids = [self.policy.tokenizer(text).input_ids + [self.policy.eos_ids[0]] for text in self.texts]
        completion_NT = pad(ids, self.policy.pad_id, "right")
        lengths = torch.tensor([len(each) for each in ids])
        rows = Rows(torch.cat([prompt_NP, completion_NT], dim=1), prompt_len_N, lengths, prompt_NP.shape[1])
        return Samples(rows, self.texts, self.truncated_N, torch.zeros(rows.mask_NT.shape))""",
        "Decoding and encoding does not give the same ids back, so the learner trains tokens that the policy never "
        "drew, and a cut-off completion gets an end that it did not have. Loops that pass strings around do this.",
        ("tests/test_sampling.py::test_the_rows_hold_the_very_ids_that_were_drawn",),
    ),
    Mutation(
        23,
        "the soft format by a regex that backtracks",
        "rewards/functions.py",
        """    bridge = _REASONING_THEN_ANSWER.search(text)
    return bridge is not None and text.find(ANSWER_CLOSE, bridge.end()) != -1
""",
        """    return re.match(r"<reasoning>.*?</reasoning>\\s*<answer>.*?</answer>", text, re.DOTALL) is not None
""",
        "Quadratic in the length of hostile text, and a model under training writes hostile text: the reward takes "
        "minutes for a completion of repeated tags.",
        ("tests/test_hostile_text.py::test_a_hostile_megabyte_stalls_no_function",),
    ),
    Mutation(
        23,
        "eval reads the number",
        "rewards/extract.py",
        """    text = text.strip()
    unended""",
        """    text = text.strip()
    try:
        return Decimal(str(eval(text)))
    except Exception:
        pass
    unended""",
        "The model's text runs as a program: '2+2' is an answer, `9**9**9` is a hang, and worse is possible.",
        (f"{ANSWERS}test_what_is_not_one_ascii_number_is_not_read_as_one",),
    ),
]
