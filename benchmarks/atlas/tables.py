"""The atlas as Markdown tables. Every cell is made from the records."""

from __future__ import annotations

from benchmarks.atlas import experiments, words
from benchmarks.atlas.estimate import Result, Study, agreement, scalar
from benchmarks.atlas.intervals import crossed
from benchmarks.atlas.records import AGAIN, BASELINE, SHUFFLED, TRL
from rewards.tables import markdown

# The columns of the second table: the head of each, and the scalar.
MORE = {
    "entropy, nats": "entropy",
    "right answers, tokens": "right length",
    "wrong answers, tokens": "wrong length",
    "cut off, %": "truncated",
    "flat groups, %": "flat",
    "clipped, %": "clipped",
    "CPU s": "seconds",
}


def first(study: Study, task: str, question: str | None = None) -> str:
    """What each experiment reached, and its difference to the baseline."""
    reach = f"steps to {study.levels[task]:.0%}" if task in study.levels else "steps"
    rows = [["experiment", "flags", "right samples, %", "difference, points", "q", "greedy, %", "AUC, points", reach]]
    for result in study.of(task, question):
        rows.append(
            [
                result.experiment.name,
                f"`{' '.join(result.experiment.change)}`" if result.experiment.change else "",
                words.interval(result.accuracy, "share"),
                _difference(result),
                words.probability(result.q) + ("*" if result.holm is not None and result.holm <= 0.05 else ""),
                mean(study, result, "greedy", arrow=True),
                against(study, result, "AUC"),
                steps(study, result),
            ]
        )
    return markdown(rows)


def _difference(result: Result) -> str:
    """In bold where it is found after all comparisons."""
    if result.difference is None:
        return "-"
    text = words.interval(result.difference, "share", "+")
    return f"**{text}**" if result.q is not None and result.verdict in ("better", "worse") else text


def more(study: Study, task: str, question: str | None = None) -> str:
    """The other numbers of the runs."""
    rows = [["experiment", *MORE]]
    for result in study.of(task, question):
        rows.append([result.experiment.name, *(mean(study, result, name, arrow=True) for name in MORE.values())])
    return markdown(rows)


def mean(study: Study, result: Result, name: str, arrow: bool = False) -> str:
    """A scalar's mean over the seeds that have one. The arrow: up or down against the baseline, where the 95% interval
    of the difference excludes 0."""
    values_S = study.values(result.experiment, name)
    known_S = values_S[values_S == values_S]
    if not len(known_S):
        return "-"
    text = words.number(float(known_S.mean()), scalar(name).unit)
    baseline = study.results.get((result.experiment.task, BASELINE))
    if not arrow or baseline is None or baseline is result:
        return text
    found = study.between(baseline.experiment, result.experiment, name)
    return text + (" ↑" if found and found.low > 0 else " ↓" if found and found.high < 0 else "")


def against(study: Study, result: Result, name: str) -> str:
    """A scalar's difference to the baseline."""
    baseline = study.results.get((result.experiment.task, BASELINE))
    if baseline is None or baseline is result:
        return "-"
    found = study.between(baseline.experiment, result.experiment, name)
    return words.interval(found, scalar(name).unit, "+") if found else "-"


def steps(study: Study, result: Result) -> str:
    """How soon the training accuracy reached the task's level, of the seeds where it did."""
    values_S = study.values(result.experiment, "steps")
    known_S = values_S[values_S == values_S]
    if not len(known_S):
        return "never"
    some = f" ({len(known_S)} of {len(values_S)})" if len(known_S) < len(values_S) else ""
    return f"{known_S.mean():.0f}{some}"


def tasks(study: Study) -> str:
    """What each task is, its baseline's command, and how much that learns."""
    rows = [["task", "what it is", "the baseline: `python -m grpo_core.train`", "right samples before and after, %"]]
    for task in experiments.tasks():
        if (base := study.results.get((task.name, BASELINE))) is not None:
            before = words.number(float(base.experiment.before_SP.mean()), "share")
            reached = f"{before} to {words.interval(base.accuracy, 'share')}"
            rows.append([f"`{task.name}`", task.about, f"`{' '.join(task.flags.split())}`", reached])
    return markdown(rows)


def checks(study: Study) -> str:
    """What must hold before a difference is believed: controls learn nothing, the baseline repeats itself."""
    rows = [
        ["task", "the baseline's gain, points", "rewards shuffled: change, points", "the baseline with other seeds"]
    ]
    for task in study.tasks:
        named = {result.experiment.name: result for result in study.of(task)}
        gain = words.interval(named[BASELINE].gain, "share", "+") if BASELINE in named else "-"
        control = _control(named[SHUFFLED]) if SHUFFLED in named else "-"
        again = "-"
        if BASELINE in named and AGAIN in named:
            base, found = named[BASELINE].accuracy, named[AGAIN]
            inside = base.low <= found.accuracy.value <= base.high
            where = "inside" if inside else "outside"
            again = f"{words.number(found.accuracy.value, 'share')}%, {where} {words.percent(base).partition(' ')[2]}"
            again += f"; difference {_difference(found)}"
        rows.append([task, gain, control, again])
    return markdown(rows)


def _control(result: Result) -> str:
    return f"{words.interval(result.gain, 'share', '+')}: {'not flat' if result.gain.clear else 'flat'}"


def beside_trl(study: Study) -> str:
    """Each task that was also run in TRL: final accuracy, and the two mean curves in each other's bands."""
    rows = [["task", "seeds", "here, %", "TRL, %", "TRL minus here, points", "width, points", "curves of accuracy"]]
    for task in study.tasks:
        named = {result.experiment.name: result for result in study.of(task)}
        if TRL in named and BASELINE in named and (found := named[TRL].difference):
            here = study.of_all_seeds(task)
            curves = agreement(named[TRL].experiment, here)
            rows.append(
                [
                    task,
                    str(len({*here.starts} & {*named[TRL].experiment.starts})),
                    words.interval(crossed(here.after_SP), "share"),
                    words.interval(named[TRL].accuracy, "share"),
                    words.interval(found, "share", "+"),
                    words.number(found.high - found.low, "share"),
                    words.bands(curves, ("TRL", "this project")),
                ]
            )
    return markdown(rows)


def asked(study: Study, task: str, question: str | None = None) -> str:
    """What papers claim and what was expected, as experiments.yaml had it before the runs."""
    about = [each for each in experiments.questions() if each.task == task and question in (None, each.name)]
    return "\n\n".join(f"*Claimed.* {each.paper}.\n\n*Expected, before the runs.* {each.predicted}." for each in about)


def verdicts(study: Study, task: str, question: str | None = None) -> str:
    """A sentence for each experiment that is compared, as a list."""
    compared = [result for result in study.of(task, question) if result.q is not None]
    return "\n".join(f"- **{result.experiment.name}**: {words.verdict(result)}" for result in compared)
