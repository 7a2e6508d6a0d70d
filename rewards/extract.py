"""From text to the answer in it, and from the answer to a number.

Every function here reads text that a language model wrote, so it may be anything: a megabyte of digits, a thousand
opening tags, numerals of another script. Nothing raises, and every scan is linear in the length of the text. Numbers
are `Decimal`, because `float` turns every large integer into the same `inf` and `int()` refuses more than 4,300 digits.
"""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
HASH_MARK = "####"

# What may stand around the digits of one number: a sign and a dollar in either order, a percent and a final dot.
_PREFIXES = ("", "+", "-", "$", "+$", "-$", "$+", "$-")
_SUFFIXES = ("", ".", "%", ".%", "%.")

# As SQuAD's evaluation (arXiv 1606.05250) compares words: without case, punctuation and articles.
_NO_WORD = re.compile(r"[^\w\s]|_")
_ARTICLES = {"a", "an", "the"}
# B, (B), B., B: the river
_CHOICE = re.compile(r"\(?([A-Z])(?:[).:](?:\s.*)?)?", re.DOTALL)

# Only these: `\d` and `isdigit` take every script's.
_DIGITS = "0123456789"

# What stands before the last number's digits. A '-' right after a digit, a letter, ')' or '%' is a subtraction or a
# hyphen: 10-7 ends in 7, not in -7.
_SIGN_BEFORE = re.compile(r"(?: (?<![\w)%])[-+]\$? | \$[-+]? ) \Z", re.VERBOSE)

# Groups of exactly three digits and their commas, read backwards from the last comma.
_GROUPS_BACKWARDS = re.compile(r"(?: ,[0-9]{3}(?![0-9]) )*", re.VERBOSE)

# The default context keeps 28 digits and overflows past 10**999999; this one subtracts any two numbers exactly.
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


def extract_xml_answer(text: str) -> str:
    """The text inside the last complete `<answer>...</answer>`, stripped; '' where there is no complete pair.

    The customary version returns the whole text when the tags are missing, which pays full correctness to a completion
    that ignores the format as long as it says nothing but the answer. Here that completion earns nothing.

    >>> extract_xml_answer("<answer>3</answer> no, wait: <answer> 4 </answer>")
    '4'
    >>> extract_xml_answer("4"), extract_xml_answer("<answer>4"), extract_xml_answer("4</answer>")
    ('', '', '')
    """
    opened = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    if opened == -1:
        return ""
    start = opened + len(ANSWER_OPEN)
    return text[start : text.find(ANSWER_CLOSE, start)].strip()


def extract_hash_answer(text: str) -> str | None:
    """What follows the first `####`, up to the end of that line, stripped; None where there is no `####`.

    The first, because a model that does not stop continues with a problem of its own and answers that one, too.

    >>> extract_hash_answer("2 + 2 = 4\\n#### 4\\nQuestion: what is 3 + 3?\\n#### 6")
    '4'
    >>> extract_hash_answer("the answer is 4") is None
    True
    """
    _, mark, rest = text.partition(HASH_MARK)
    return rest.partition("\n")[0].strip() if mark else None


def gold_answer(answer: str) -> str:
    """The final answer in a dataset's `answer` column: what follows `####` where there is one, else all of it.

    >>> gold_answer("2 + 2 = 4\\n#### 4"), gold_answer(" 4 ")
    ('4', '4')
    """
    final = extract_hash_answer(answer)
    return answer.strip() if final is None else final


def last_number(text: str) -> str | None:
    """The last number in the text as it is written there, for lenient scoring; None where there is none.

    Whatever it returns, `parse_number` can read. Numbers are separated from the left: '1,2345' is 1 and 2345 rather
    than 1,234 and 5, and '1.2.3' is 1.2 and 3. A scan would list them all to return one, and a megabyte holds half a
    million; so the last one is read from its end, and what the ones before it have used up is found by counting.

    >>> last_number("16-3-4 = 9, so she makes 9 * 2 = $18."), last_number("it costs -$1,200.50 (about)")
    ('$18', '-$1,200.50')
    >>> last_number("none at all") is None
    True
    """
    end = 1 + max(map(text.rfind, _DIGITS))
    if not end:
        return None
    run_start = len(text[:end].rstrip(_DIGITS + ",."))
    number = _last_in_run(text[run_start:end])
    start = end - len(number)
    sign = _SIGN_BEFORE.search(text[max(0, start - 3) : start])  # two characters, and what stands before them
    return sign.group() + number if sign else number


def _last_in_run(run: str) -> str:
    """The last number of digits, commas and dots that end in a digit."""
    after_comma = run[run.rfind(",") + 1 :]
    number = _last_decimal(after_comma)
    is_group = number == after_comma != run and len(number.partition(".")[0]) == 3
    return _groups_before(run[: -len(number)]) + number if is_group else number


def _last_decimal(digits: str) -> str:
    """The last number of digits and dots: numbers take the dots in turns, so it has one where their count is odd."""
    digits = digits[digits.rfind("..") + 1 :]
    dot = digits.rfind(".")
    if digits.count(".") % 2:
        dot = digits.rfind(".", 0, dot)
    return digits[dot + 1 :]


def _groups_before(run: str) -> str:
    """Of this run, which ends in a comma, the part that belongs to the next number: '1,072,' or '72,' or nothing."""
    backwards = _GROUPS_BACKWARDS.match(run[::-1])
    split = len(run) - (backwards.end() if backwards else 0)
    before, groups = run[:split], run[split:]
    if before.endswith(","):
        first = _last_decimal(before[:-1].rpartition(",")[2])
        if first.isdigit() and len(first) < 3 and first[0] != "0":
            return f"{first},{groups}"
    elif "." in _last_decimal((before + groups[:3]).rpartition(",")[2]):
        groups = groups[4:]  # the first three digits are decimals of another number
    first_digits = groups[::4]
    zeros = len(first_digits) - len(first_digits.lstrip("0"))  # a number does not start with '000,'
    return groups[4 * zeros :]


def is_integer(text: str) -> bool:
    """Whether the whole string is an integer: ASCII digits, an optional sign, commas only between groups of three.

    >>> [is_integer(text) for text in ("72", "-1,072", "72.0", "10,72", "²", "")]
    [True, True, False, False, False, False]
    """
    return _is_unsigned_integer(text[1:] if text.startswith(("+", "-")) else text)


def parse_number(text: str) -> Decimal | None:
    """The value of a string that is one number and nothing else, or None.

    Around the digits it allows white space, a sign, one `$` before or after the sign, one `%` and one final `.`. The
    `%` is dropped and not divided by: where a dataset asks for a percentage its gold is the bare number.

    >>> [str(parse_number(text)) for text in ("72", " -$1,072.50 ", "72%.", ".5", "5.")]
    ['72', '-1072.50', '72', '0.5', '5']
    >>> [parse_number(text) for text in ("10,72", "1e3", "nan", "inf", "²", "72 apples", "")]
    [None, None, None, None, None, None, None]
    """
    text = text.strip()
    unended = text.rstrip("%.")
    digits = unended.lstrip("+-$")
    prefix, suffix = unended[: len(unended) - len(digits)], text[len(unended) :]
    whole, point, fraction = digits.partition(".")
    if not (
        prefix in _PREFIXES
        and suffix in _SUFFIXES
        and (_is_unsigned_integer(whole) or (point and not whole))  # the second: '.5'
        and (_is_digits(fraction) or not point)
    ):
        return None
    return Decimal(("-" if "-" in prefix else "") + digits.replace(",", ""))


def _is_digits(text: str) -> bool:
    # `isdigit` alone is True for '²' and for every other script's digits, `isdecimal` still for the latter.
    return text.isascii() and text.isdigit()


def _is_unsigned_integer(text: str) -> bool:
    """Well-formed commas are every fourth character from the right, and nowhere else.

    A grouped number starts with 1-9: '0,500' is more likely a decimal comma than five hundred, so it is not read.
    """
    if "," in text:
        commas = text[-4::-4]
        if text[0] in ",0" or commas.strip(",") or len(commas) != text.count(","):
            return False
    return _is_digits(text.replace(",", ""))


def same_number(a: str, b: str, tolerance: float = 1e-6) -> bool:
    """Whether both strings are numbers and they differ by at most `tolerance`.

    >>> same_number("1,072", "$1072.00"), same_number("1072", "1073"), same_number("nan", "nan")
    (True, False, False)
    >>> same_number("9" * 400, "8" * 400)  # as floats, both are inf
    False
    """
    x, y = parse_number(a), parse_number(b)
    if x is None or y is None:
        return False
    # Through str, because the float nearest to 1e-6 is a little below it and would refuse a difference of 0.000001.
    return _EXACT.subtract(x, y).copy_abs() <= Decimal(str(tolerance))


def same_answer(found: str, gold: str) -> bool:
    """Whether an answer is the gold one: by value where the gold is a number; its letter where the gold is that of a
    choice; otherwise by its words, without case, punctuation and articles.

    >>> same_answer("$72.0", "72"), same_answer("-72", "72"), same_answer("the  Blue whale.", "blue whale")
    (True, False, True)
    >>> same_answer("(B) the river", "B"), same_answer("B", "C"), same_answer("", "")
    (True, False, False)
    """
    if parse_number(gold) is not None:
        return same_number(found, gold)
    if choice_letter(gold) == gold != "":
        return choice_letter(found) == gold
    return words(found) == words(gold) != []


def words(text: str) -> list[str]:
    """Of a text, its words in lower case, without punctuation and articles.

    >>> words("The pear, an APPLE; it's 3.5")
    ['pear', 'apple', 'it', 's', '3', '5']
    """
    return [word for word in _NO_WORD.sub(" ", text.casefold()).split() if word not in _ARTICLES]


def choice_letter(text: str) -> str:
    """The letter of a choice that an answer begins with; '' where it is none.

    >>> choice_letter(" (B) the river"), choice_letter("B."), choice_letter("Blue"), choice_letter("b")
    ('B', 'B', '', '')
    """
    found = _CHOICE.fullmatch(text.strip())
    return found.group(1) if found else ""
