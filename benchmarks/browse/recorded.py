"""A GRPO run's completions.jsonl, tokens.jsonl and heldout/, read and cut to what one page can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_core.doctor.readlog import read_config
from rewards import same_number
from rewards.jsonl import each_jsonl

MOST_TOKENS = 2_000_000  # about 10 bytes each in the page

Number = (int, float)
COMPLETION = {
    **{name: int for name in ("step", "row", "group", "tokens")},
    **{name: str for name in ("question", "expected", "response")},
    **{"rewards": dict, "truncated": bool},
}
TOKENS = {"step": int, "row": int, "ids": list, "pieces": list, "logps": list, "kept": str}
ANSWER = {"question": str, "expected": str, "response": str, "tokens": int, "truncated": bool}


def read_recorded(run: Path, most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
    """What the page shows, as JSON has it.

    run         the folder's name
    about       lines on the run and on what of it is left out
    functions   names of the reward functions
    pieces      [id, text] of every token that occurs; a row's tokens are [place in `pieces`, log-probability in
                hundredths of a nat, 1 where the advantage acted on it else 0]
    problems    question and expected answer of each training problem
    groups      each group of the steps shown: its step, its problem (place in `problems`), its rows
    heldout     each held-out problem, with its answer in each evaluation shown

    Raises:
        ValueError: the folder holds no GRPO run, or a file in it not what a run writes there.
    """
    config = read_config(run)
    if "group_size" not in config:
        raise ValueError(f"{run}: expected a run of grpo_core.train; that of another program has no groups")
    paths = evaluations(run)
    if not (run / "completions.jsonl").is_file() and not paths:
        raise ValueError(f"{run}: holds neither completions.jsonl nor heldout/, so there is nothing to show yet")
    training, said = _training(run, most_tokens)
    heldout, also_said = _heldout(paths, most_tokens)
    about = [_about(config), *said, *also_said]
    return {"run": run.resolve().name, "about": about, **training, "heldout": heldout}


def _about(config: dict[str, Any]) -> str:
    wanted = ("model", "task", "loss", "rewards", "prompts_per_step", "group_size", "temperature", "mu", "seed")
    shown = {name: config[name] for name in wanted if name in config}
    values = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in shown.items()}
    text = ", ".join(f"{name} {value}" for name, value in values.items()) + "."
    if config.get("mu", 1) != 1:  # as the first of the step's updates applies it
        text += " Advantages are shown as before the clipping of ratios, which acts from a step's second update on."
    return text


def spaced(tokens: dict[int, int], most: int) -> tuple[int, list[int]]:
    """The smallest k for which every k-th step and the last hold at most so many tokens (0: any number), and those
    steps; the first and the last where no k is large enough.

    >>> spaced({1: 10, 2: 10, 3: 10, 4: 10, 5: 10}, most=30)
    (2, [1, 3, 5])
    """
    steps = sorted(tokens)
    for k in range(1, len(steps) + 1):
        chosen = sorted({*steps[::k], *steps[-1:]})
        if not most or sum(tokens[step] for step in chosen) <= most:
            return k, chosen
    return max(1, len(steps) - 1), sorted({*steps[:1], *steps[-1:]})


def _checked(path: Path, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a file that a run may still write to, each with fields of these types."""
    for number, record in enumerate(each_jsonl(path, torn_end=True), 1):
        for name, kind in fields.items():
            # A bool is an int to Python.
            if not isinstance(record.get(name), kind) or (isinstance(record[name], bool) and kind is not bool):
                found = f"it is {record[name]!r:.40}" if name in record else "there is none"
                raise ValueError(f"{path}, line {number}: expected {name} to be of type {kind.__name__}; {found}")
        yield record


# --- training


def _training(run: Path, most_tokens: int) -> tuple[dict[str, Any], list[str]]:
    path = run / "completions.jsonl"
    tokens: dict[int, int] = {}
    for record in _checked(path, COMPLETION) if path.is_file() else ():
        tokens[record["step"]] = tokens.get(record["step"], 0) + record["tokens"]
    k, chosen = spaced(tokens, most_tokens)
    said = []
    if k > 1:
        said.append(
            f"Shown: one step in {k}, and the last, {len(chosen)} of {len(tokens)}, so that the page has at most "
            f"{most_tokens:,} tokens (--max_tokens)."
        )
    functions: list[str] = []
    problems: dict[tuple[str, str], int] = {}
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    wanted = set(chosen)
    for record in _checked(path, COMPLETION) if tokens else ():
        step, number, row = record["step"], record["group"], record["row"]
        if step not in wanted:
            continue
        functions += [name for name in record["rewards"] if name not in functions]
        problem = problems.setdefault((record["question"], record["expected"]), len(problems))
        group = groups.setdefault((step, number), {"step": step, "group": number, "problem": problem, "rows": []})
        rows[step, row] = _row(record, functions)
        group["rows"].append(rows[step, row])
    for row_ in rows.values():  # functions that a later record brought
        row_["rewards"] += [None] * (len(functions) - len(row_["rewards"]))
    pieces = _with_tokens(rows, run / "tokens.jsonl")
    if rows and not pieces:
        said.append("There is no tokens.jsonl (--record_tokens), so completions are shown as text.")
    pairs = [{"question": question, "expected": expected} for question, expected in problems]
    training = {"functions": functions, "pieces": pieces, "problems": pairs, "groups": list(groups.values())}
    return training, said


def _row(record: dict[str, Any], functions: list[str]) -> dict[str, Any]:
    return {
        "row": record["row"],
        "text": record["response"],
        "reward": _finite(record.get("reward")),
        "rewards": [_finite(record["rewards"].get(name)) for name in functions],
        "advantage": _finite(record.get("advantage")),
        **_answer(record),
    }


def _answer(record: dict[str, Any]) -> dict[str, Any]:
    """What training and evaluation record of an answer alike."""
    extracted = record.get("extracted")
    extracted = extracted if isinstance(extracted, str) else ""
    right = same_number(extracted, record["expected"])
    return {"extracted": extracted, "right": right, "length": record["tokens"], "truncated": record["truncated"]}


def _with_tokens(rows: dict[tuple[int, int], dict[str, Any]], path: Path) -> list[tuple[int, str]]:
    """Give each row its tokens in place of its text; the table of the pieces."""
    places: dict[tuple[int, str], int] = {}
    for number, record in enumerate(_checked(path, TOKENS) if path.is_file() else (), 1):
        row = rows.get((record["step"], record["row"]))
        if row is None:
            continue
        parts = (record["ids"], record["pieces"], record["logps"], record["kept"])
        if {len(part) for part in parts} != {row["length"]}:
            counts = ", ".join(str(len(part)) for part in parts)
            expected = f"expected ids, pieces, logps and kept of {row['length']} tokens"
            raise ValueError(f"{path}, line {number}: {expected}; there are {counts}")
        row["tokens"] = [
            (places.setdefault((id_, str(piece)), len(places)), _hundredths(logp), int(kept == "1"))
            for id_, piece, logp, kept in zip(*parts, strict=True)
        ]
        row.pop("text", None)
    return list(places)


def _finite(value: Any) -> float | None:
    """A number to six digits; None for anything else."""
    known = isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)
    return float(f"{value:.6g}") if known else None


def _hundredths(logp: Any) -> int | None:
    value = _finite(logp)
    return None if value is None else round(100 * value)


# --- held-out problems


def evaluations(run: Path) -> dict[int, Path]:
    """The answers of each evaluation, by step."""
    paths = sorted((run / "heldout").glob("step-*.jsonl"))
    return {int(path.stem.removeprefix("step-")): path for path in paths if path.stem.removeprefix("step-").isdigit()}


def _heldout(paths: dict[int, Path], most_tokens: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Each held-out problem once, with its answers in the order of the evaluations."""
    answers = {step: list(_checked(path, ANSWER)) for step, path in paths.items()}
    k, chosen = spaced({step: sum(a["tokens"] for a in of_step) for step, of_step in answers.items()}, most_tokens)
    problems: dict[tuple[str, str, int], dict[str, Any]] = {}
    for step in chosen:
        asked: dict[tuple[str, str], int] = {}  # how often: a file may hold a problem twice
        for answer in answers[step]:
            question, expected = answer["question"], answer["expected"]
            again = asked[question, expected] = asked.get((question, expected), -1) + 1
            empty: dict[str, Any] = {"question": question, "expected": expected, "answers": []}
            problem = problems.setdefault((question, expected, again), empty)
            problem["answers"].append({"step": step, "text": answer["response"], **_answer(answer)})
    said = [f"Held-out: one evaluation in {k}, and the last, {len(chosen)} of {len(answers)}."] if k > 1 else []
    return list(problems.values()), said
