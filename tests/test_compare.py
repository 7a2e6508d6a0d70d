"""Comparing evaluations pair by pair: which problems go together, what is counted, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import eval.compare
from eval.compare import Named, comparison_cells, in_order, sampled
from eval.evaluate import Answered, Reply
from eval.statistics import Paired, mcnemar


def answer(question: str, strict: bool, steps: int | None = None, lenient: bool | None = None) -> Answered:
    text = f"#### {7 if strict else 8}"
    return Answered(question, "7", text, text[5:], strict, strict if lenient is None else lenient, 3, False, steps)


def saved(path: Path, answers: Sequence[Answered]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    return path


def message(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that is said about what cannot be compared."""
    with pytest.raises(SystemExit) as caught:
        eval.compare.main([str(argument) for argument in argv])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_answers_are_paired_by_problem_in_any_order_and_repeated_problems_in_theirs() -> None:
    first = Named("A", Path("a"), [answer("p", True), answer("twin", True), answer("q", False), answer("twin", False)])
    second = Named("B", Path("b"), [answer("twin", False), answer("twin", True), answer("q", True), answer("p", False)])
    ordered = in_order(second, first)
    assert [(a.question, a.strict) for a in ordered] == [("p", False), ("twin", False), ("q", True), ("twin", True)]


def test_other_problems_are_refused_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.jsonl", [answer(q, True) for q in "pqr"])
    b = saved(tmp_path / "b.jsonl", [answer(q, True) for q in "qrst"])
    said = message(capsys, a, b)
    assert f"{a} and {b}: expected the same problems; of 3 and 4, 2 are in both, 1 in the first alone, 2 in the" in said


def test_wins_losses_and_p_are_counted_over_all_problems_and_for_each_number_of_steps() -> None:
    old = [answer(str(i), strict, steps) for i, (strict, steps) in enumerate([(0, 2), (0, 2), (1, 2), (0, 3), (1, 3)])]
    new = [answer(str(i), strict, steps) for i, (strict, steps) in enumerate([(1, 2), (1, 2), (1, 2), (1, 3), (0, 3)])]
    head, *rows = comparison_cells(old, new, ("before", "after"))
    assert head == ["", "problems", "before", "after", "difference", "won", "lost", "p"]
    by_name = {row[0]: row[1:] for row in rows}
    assert list(by_name) == ["accuracy", "lenient accuracy", "accuracy, 2 steps", "accuracy, 3 steps"]
    low, high = Paired(both=1, won=3, lost=1, neither=0).interval
    points = f"+40.0 points [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert by_name["accuracy"] == ["5", "40.0%", "80.0%", points, "3", "1", f"{mcnemar(3, 1):.2g}"]
    assert by_name["accuracy, 2 steps"][:3] == ["3", "33.3%", "100.0%"]
    assert by_name["accuracy, 3 steps"][4:] == ["1", "1", "1"]


@pytest.fixture
def grpo(tmp_path: Path) -> Path:
    """A GRPO run of three evaluations."""
    run = tmp_path / "grpo"
    for step, right in ((0, "ap"), (10, "pq"), (200, "aqr")):
        saved(run / "heldout" / f"step-{step:06d}.jsonl", [answer(q, q in right) for q in "zapqrs"])
    return run


def test_a_grpo_run_is_compared_before_and_after_by_itself(grpo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval.compare.main([str(grpo), "--show", "1"])
    out = capsys.readouterr().out
    assert "step-000000.jsonl" in out and "step-000200.jsonl" in out and "step-000010" not in out
    assert "after against before" in out and "lenient accuracy" in out
    [won, lost] = out.split("--- ")[1:]
    assert won.startswith("won\nQuestion:  q\nExpected:  7\nbefore:    #### 8\nafter:     #### 7\n")
    assert lost.startswith("lost\nQuestion:  p\n")


def test_among_others_a_run_stands_for_its_last_answers_and_the_first_is_what_all_are_compared_with(
    grpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero_shot = saved(tmp_path / "eval" / "answers.jsonl", [answer(q, False) for q in "srqpaz"]).parent
    middle, table = grpo / "heldout" / "step-000010.jsonl", tmp_path / "table.md"
    eval.compare.main([str(run) for run in (zero_shot, grpo, middle)] + ["--markdown", str(table), "--show", "0"])
    out = capsys.readouterr().out
    assert "B against A" in out and "C against A" in out and "--- won" not in out
    text = table.read_text()
    assert f"- A: {zero_shot}\n- B: {grpo}\n- C: {middle}\n" in text
    assert text.count("| accuracy | 6 | 0.0% | 33.3% | +33.3 points") == 1
    assert text.count("| accuracy | 6 | 0.0% | 50.0% | +50.0 points") == 1


def test_what_is_no_evaluation_is_refused(grpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = saved(tmp_path / "one.jsonl", [answer("p", True)])
    (tmp_path / "empty.jsonl").touch()
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"kind": "eval", "step": 0, "samples": 4}) + "\n")
    assert "expected two RUNs, or a GRPO run folder with evaluations before and after" in message(capsys, one)
    assert f"{tmp_path / 'none'}: expected an evaluation's run folder" in message(capsys, one, tmp_path / "none")
    assert f"{tmp_path}: expected an evaluation's run folder" in message(capsys, tmp_path, one)
    assert "empty.jsonl: holds no answers" in message(capsys, one, tmp_path / "empty.jsonl")
    assert "log.jsonl, line 1: expected an answer of an evaluation" in message(capsys, log, one)
    assert f"--markdown {tmp_path}: expected a file" in message(capsys, grpo, "--markdown", tmp_path)
    assert "--shw: no such flag; did you mean --show?" in message(capsys, grpo, "--shw", "1")
    (tmp_path / "pipeline.yaml").touch()
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/config.yaml").touch()
    assert f"{tmp_path}: expected" in message(capsys, tmp_path)
    assert message(capsys, tmp_path).endswith("; it is a pipeline's, with the runs sft\n")
    assert "--show -1: expected 0 or more" in message(capsys, grpo, "--show", "-1")


def test_gains_of_samples_are_means_over_problems_with_the_interval_of_their_differences() -> None:
    def drawn(*right: bool) -> Answered:
        return replace(answer("q", True), samples=[Reply("", None, each, each, 1, False) for each in right])

    before = [drawn(False, False), drawn(True, False)] * 50
    after = [drawn(True, False), drawn(True, True)] * 50
    found = sampled(before, after)
    assert found["pass_at_1_gain"] == found["pass_at_1_gain_low"] == found["pass_at_1_gain_high"] == 0.5
    assert found["pass_at_2_gain"] == 0.5  # half of the problems went from never to once, the others stayed at once
    half = 1.959964 * math.sqrt(0.25 * 100 / 99 / 100)
    assert found["pass_at_2_gain_low"] == pytest.approx(0.5 - half) and found["pass_at_2_gain_high"] > 0.59
    assert sampled([answer("q", True)], [drawn(True)]) == {}
