"""Estimates as text: the same words in tables, in the prose of the pages and in pictures."""

from __future__ import annotations

import math

from benchmarks.atlas.estimate import Agreement, Result
from benchmarks.atlas.intervals import Estimate

DIGITS = {"nats": 3, "norm": 3, "tokens": 1, "steps": 0, "seconds": 1}


def number(value: float, unit: str, sign: str = "") -> str:
    """A value without its unit, `share`s in percent.

    >>> number(0.0614, "share", "+"), number(21.04, "tokens"), number(-0.00001, "share", "+"), number(math.nan, "nats")
    ('+6.1', '21.0', '+0.0', '-')
    """
    if math.isnan(value):
        return "-"
    scale, digits = (100, 1) if unit == "share" else (1, DIGITS.get(unit, 3))
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus before a zero


def interval(found: Estimate, unit: str, sign: str = "") -> str:
    """A share itself, which has no sign, lies between 0 and 1, and so does what is said of its interval.

    >>> interval(Estimate(0.0614, 0.02, 0.1, 0.01), "share", "+"), interval(Estimate(0.276, -0.03, 0.58, 0.1), "share")
    ('+6.1 [+2.0, +10.0]', '27.6 [0.0, 58.0]')
    """
    ends = (found.low, found.high)
    if unit == "share" and not sign:
        ends = (max(found.low, 0.0), min(found.high, 1.0))
    value, low, high = (number(each, unit, sign) for each in (found.value, *ends))
    return f"{value} [{low}, {high}]"


def percent(found: Estimate) -> str:
    """
    >>> percent(Estimate(0.623, 0.581, 0.665, 0.0))
    '62.3% [58.1, 66.5]'
    """
    return interval(found, "share").replace(" ", "% ", 1)


def points(found: Estimate, unit: str = "share") -> str:
    """A difference with its unit.

    >>> points(Estimate(0.0614, 0.02, 0.1, 0.01)), points(Estimate(-1.0, -2.0, 0.0, 0.05), "tokens")
    ('+6.1 points [+2.0, +10.0]', '-1.0 tokens [-2.0, +0.0]')
    """
    name = {"share": " points", "norm": "", "": ""}.get(unit, f" {unit}")
    return interval(found, unit, "+").replace(" ", f"{name} ", 1)


def probability(value: float | None) -> str:
    """
    >>> probability(0.00004), probability(0.0312), probability(0.4), probability(None)
    ('<0.001', '0.031', '0.40', '-')
    """
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def verdict(result: Result) -> str:
    """What to remember of an experiment, in a sentence without a full stop."""
    found = result.difference
    if found is None:
        return "this is what the others are compared with"
    q = f", q = {probability(result.q)}".replace("= <", "< ") if result.q is not None else ""
    if result.verdict == "none":
        high, low = (number(each, "share", "+") for each in (found.high, found.low))
        return f"no difference found; more than {high} and less than {low} points are excluded{q}"
    if result.verdict == "unclear":
        return f"not clear: {points(found)}{q}, one of many comparisons"
    strict = ", by Holm's rule too" if result.holm is not None and result.holm <= 0.05 else ""
    return f"{result.verdict}: {points(found)}{q}{strict}"


def control(result: Result) -> str:
    """What a control has learned, which should be nothing."""
    return f"{'not flat' if result.gain.clear else 'flat'}: {points(result.gain)} from before to after"


def bands(found: Agreement | None, names: tuple[str, str]) -> str:
    """
    >>> bands(Agreement(1.0, 0.75), ("TRL", "this project"))
    "100% of TRL's mean curve lies in this project's band, 75% of this project's in TRL's"
    """
    if found is None:
        return "not logged by both"
    first, second = names
    forth, back = found.first_in_second, found.second_in_first
    return f"{forth:.0%} of {first}'s mean curve lies in {second}'s band, {back:.0%} of {second}'s in {first}'s"
