"""Pages that quote the atlas: `fill` puts in the tables and numbers that the records give now.

A table stands between `<!-- atlas: WHAT -->` and `<!-- end -->`, where WHAT is

    ways                the experiments of a task        ways, more        its other numbers
    ways / mu           those of one question of it      ways, verdicts    a sentence each
    ways / mu, asked    what is claimed of it, and what was expected
    checks, TRL         controls; this project beside TRL
    tasks, claims       what each task is; what papers claim, and what was found (claims.yaml)

A number in a sentence stands between `<!-- = WHICH -->` and `<!-- . -->`, where WHICH is

    ways/mu 4/difference               a task, an experiment of it, and what of it is wanted (`quantity` has the list)
    ways/mu 8/entropy against mu 4     against another experiment than the baseline
    experiments, runs, CPU hours       of the whole atlas (`whole` has the list)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial

from benchmarks.atlas import claims, tables, words
from benchmarks.atlas.estimate import SCALARS, Result, Study, agreement, difference, scalar
from benchmarks.atlas.records import BASELINE, Experiment

TABLE = re.compile(r"<!-- atlas: (.+?) -->\n.*?<!-- end -->", re.DOTALL)
NUMBER = re.compile(r"(<!-- = (.+?) -->).*?<!-- \. -->", re.DOTALL)
KINDS: dict[str, Callable[[Study, str, str | None], str]] = {
    "": tables.first,
    "more": tables.more,
    "verdicts": tables.verdicts,
    "asked": tables.asked,
}


def fill(text: str, found: Study) -> str:
    """The page with its tables and numbers as these records give them; what is between other marks stays.

    Raises:
        ValueError: a mark names what the records do not hold.
    """
    text = TABLE.sub(lambda match: f"<!-- atlas: {match[1]} -->\n\n{table(found, match[1])}\n\n<!-- end -->", text)
    numbers = whole(found)
    return NUMBER.sub(lambda match: f"{match[1]}{marked(found, numbers, match[2])}<!-- . -->", text)


def table(found: Study, what: str) -> str:
    """What a mark of a table asks for."""
    alone = {
        "tasks": tables.tasks,
        "checks": tables.checks,
        "TRL": tables.beside_trl,
        "claims": lambda study: claims.table(study, claims.claims()),
    }
    if what in alone:
        return alone[what](found)
    where, slash, rest = what.partition(" / ")
    question, comma, kind = rest.rpartition(", ")
    task = where
    if not slash:
        task, _, kind = what.partition(", ")
    _known(what, task, found.tasks)
    questions = {each.experiment.question for each in found.of(task)}
    if slash and (rest in questions or not comma):  # a question's name may have commas of its own
        question, kind = rest, ""
    _known(what, kind, KINDS)
    if slash:
        _known(what, question, questions)
    return KINDS[kind](found, task, question or None)


def marked(found: Study, numbers: Mapping[str, str], which: str) -> str:
    """What a mark of a number asks for. `numbers`: those of the whole atlas."""
    if "/" not in which:
        return numbers[_known(which, which, numbers)]
    task, _, rest = which.partition("/")
    name, _, wanted = rest.rpartition("/")
    _known(which, task, found.tasks)
    result = found.results[task, _known(which, name, [each.experiment.name for each in found.of(task)])]
    wanted, _, other = wanted.partition(" against ")
    if other:
        _known(which, other, [each.experiment.name for each in found.of(task)])
        return between(found, found.results[task, other], result, _known(which, wanted, ["difference", *SCALARS]))
    return quantity(found, result, wanted, which)


def quantity(found: Study, result: Result, wanted: str, which: str = "") -> str:
    """`accuracy`, `range` (its lowest and highest run), `gain`, `difference`, `q`, `verdict`, `control`, `curves`
    (whose mean lies in whose band); a scalar's mean over seeds (`entropy`), or its `difference` to the baseline
    (`entropy difference`)."""
    named: dict[str, Callable[[], str]] = {
        "accuracy": lambda: words.percent(result.accuracy),
        "range": lambda: _range(result.experiment),
        "gain": lambda: words.points(result.gain),
        "difference": lambda: words.points(result.difference) if result.difference else "-",
        "q": lambda: words.probability(result.q),
        "verdict": lambda: words.verdict(result),
        "control": lambda: words.control(result),
        "curves": lambda: _curves(found, result),
        "steps": lambda: tables.steps(found, result),
    }
    for name in SCALARS:
        named.setdefault(name, partial(_with_unit, found, result, name))
        named[f"{name} difference"] = partial(_to_baseline, found, result, name)
    return named[_known(which, wanted, named)]()


def between(found: Study, first: Result, second: Result, wanted: str) -> str:
    """`second` minus `first`, outside the multiple comparisons."""
    if wanted == "difference":
        return words.points(difference(first.experiment, second.experiment))
    estimate = found.between(first.experiment, second.experiment, wanted)
    return words.points(estimate, scalar(wanted).unit) if estimate else "-"


def _to_baseline(found: Study, result: Result, name: str) -> str:
    baseline = found.results.get((result.experiment.task, BASELINE))
    return between(found, baseline, result, name) if baseline and baseline is not result else "-"


def _range(experiment: Experiment) -> str:
    runs_S = experiment.after_SP.mean(axis=1)
    return f"{words.number(float(runs_S.min()), 'share')} to {words.number(float(runs_S.max()), 'share')}%"


def _curves(found: Study, result: Result) -> str:
    baseline = found.of_all_seeds(result.experiment.task)
    return words.bands(agreement(result.experiment, baseline), (result.experiment.name, BASELINE))


def _with_unit(found: Study, result: Result, name: str) -> str:
    text = tables.mean(found, result, name)
    unit = {"share": "%", "norm": "", "": ""}.get(scalar(name).unit, f" {scalar(name).unit}")
    return text if text == "-" else text + unit


def whole(found: Study) -> dict[str, str]:
    """Counts over the whole atlas, by name. `better`, `worse`, `unclear` and `none` count the compared experiments."""
    compared = [result for result in found.results.values() if result.q is not None]
    kinds = {kind: str(sum(result.verdict == kind for result in compared)) for kind in ("better", "worse", "unclear")}
    return {
        "experiments": str(len(found.results)),
        "compared": str(len(compared)),
        "tasks": str(len(found.tasks)),
        "runs": str(len(found.runs)),
        "seeds": _from_to(len(result.experiment.runs) for result in compared),
        "CPU hours": f"{sum(run.seconds for run in found.runs) / 3600:.1f}",
        **kinds,
        "none": str(sum(result.verdict == "none" for result in compared)),
        **claims.counts(found, claims.claims()),
    }


def _from_to(numbers: Iterable[int]) -> str:
    among = sorted(set(numbers)) or [0]
    return " to ".join(map(str, dict.fromkeys((among[0], among[-1]))))


def _known(which: str, name: str, names: Iterable[str]) -> str:
    """The name, if it is one of these."""
    among = sorted(names)
    if name not in among:
        near = get_close_matches(name, among, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"<!-- {which} -->: {name!r} is not recorded{hint}. Known: {', '.join(among)}")
    return name


REPORT = """# The atlas's numbers

Made by `python -m benchmarks.atlas` from `runs.jsonl` beside it. What the numbers mean is in docs/atlas.md.

- *right samples*: of held-out problems after training, with its 95% interval over seeds and problems; *difference*: to
  the task's baseline, from the same starts. Bold, with q <= 0.05: found after {compared} comparisons (Benjamini and
  Hochberg); a star at q: by Holm's rule, too
- *AUC*: the training accuracy's mean over all steps, less the baseline's; *steps*: until it first reaches a level
  half-way up the baseline's curve
- entropy, lengths and cut-off answers: the last fifth of training; flat groups (which teach nothing), clipped tokens:
  all of it. An arrow: the 95% interval of the difference to the baseline excludes 0, not corrected for their number

{runs} runs, {hours} CPU hours, {processors}; {versions}; commit {commits}.

## Checks

{checks}

## What papers claim

{claims}
"""


def report(found: Study) -> str:
    """benchmarks/results/atlas/README.md: every table, and what made the records."""
    counts = whole(found)
    made = {
        name: ", ".join(dict.fromkeys(getattr(run, name) for run in found.runs))
        for name in ("commit", "versions", "processor")
    }
    parts = [
        REPORT.format(
            claims=claims.table(found, claims.claims()),
            compared=counts["compared"],
            runs=counts["runs"],
            hours=counts["CPU hours"],
            processors=made["processor"],
            versions=made["versions"],
            commits=made["commit"],
            checks=tables.checks(found),
        )
    ]
    if any(name == "TRL" for _, name in found.results):
        parts.append(f"## Beside TRL\n\n{tables.beside_trl(found)}\n")
    for task in found.tasks:
        parts.append(f"## {task}\n\n{tables.first(found, task)}\n\n{tables.more(found, task)}\n")
    return "\n".join(parts)
