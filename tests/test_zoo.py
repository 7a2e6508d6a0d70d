"""What the bug zoo claims: each bug fits the source, names tests that exist, and is judged by what pytest says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bugs import MUTATIONS, PITFALLS, Mutation
from tests.sheet import exercise_sheet, labels
from tests.zoo import Job, Result, exit_code, is_here, planted

ROOT = Path(__file__).parent.parent
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the zoo forks")
every_bug = pytest.mark.parametrize("bug", [pytest.param(bug, id=label) for label, bug in labels(MUTATIONS)])

SIGN = "tests/test_answers.py::test_commas_sign_dollar_percent_and_final_dot_do_not_change_a_number"
HARMLESS = Mutation(
    pitfall=2,
    name="the same in other words",
    file="rewards/extract.py",
    old="_, mark, rest = text.partition(HASH_MARK)",
    new="_, mark, rest = text.split(HASH_MARK)[0], HASH_MARK in text, HASH_MARK.join(text.split(HASH_MARK)[1:])",
    why="",
    tests=("tests/test_answers.py::test_the_hash_answer_is_the_first_mark_to_the_end_of_its_line",),
)


@every_bug
def test_a_bug_changes_one_place_of_one_file_which_still_compiles(bug: Mutation) -> None:
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    assert source.count(bug.old) == 1
    changed = source.replace(bug.old, bug.new)
    assert changed != source
    compile(changed, bug.file, "exec")


@every_bug
def test_every_test_named_for_a_bug_exists(bug: Mutation) -> None:
    assert bug.tests
    assert [test for test in bug.tests if not is_here(test)] == []


def test_a_test_that_is_nowhere_is_not_taken_for_one() -> None:
    assert is_here("tests/test_zoo.py::test_a_test_that_is_nowhere_is_not_taken_for_one")
    assert is_here("grpo_core/objective.py::grpo_core.objective.k3_kl")
    for test in ("tests/test_zoo.py::test_a_test_that", "tests/test_nothing.py::test_a", "tests/test_zoo.py"):
        assert not is_here(test)


def test_every_pitfall_has_a_bug() -> None:
    assert set(range(1, 27)) <= {bug.pitfall for bug in MUTATIONS} == set(PITFALLS)


def test_no_two_bugs_are_the_same_patch_or_share_a_name() -> None:
    assert len({(bug.pitfall, bug.file, bug.old, bug.new) for bug in MUTATIONS}) == len(MUTATIONS)
    assert len({bug.name for bug in MUTATIONS}) == len(MUTATIONS)
    assert all(bug.why.endswith(".") for bug in MUTATIONS)


def test_the_exercise_sheet_on_file_is_the_one_that_the_zoo_prints() -> None:
    on_file = (ROOT / "docs" / "bug-zoo.md").read_text(encoding="utf-8")
    assert on_file == exercise_sheet(MUTATIONS) + "\n", "python -m tests.zoo --list > docs/bug-zoo.md"


@pytest.mark.parametrize(
    "exit_code, hangs_after, verdict",
    [(1, None, "caught"), (0, None, "NOT CAUGHT")]
    + [(code, None, "broken") for code in (2, 3, 4, 5, 70, -9, None)]
    + [(None, 15.0, "caught"), (4, 15.0, "broken")],
)
def test_only_a_failing_test_catches_a_bug(exit_code: int | None, hangs_after: float | None, verdict: str) -> None:
    bug = Mutation(1, "a bug", "file.py", "old", "new", "", ("tests/test_x.py",), hangs_after)
    assert Job("1a", bug, bug.tests).verdict(Result(exit_code, 1.0, "")) == verdict
    without = Job("", None, bug.tests)
    assert without.verdict(Result(exit_code, 1.0, "")) == ("pass" if exit_code == 0 else "broken")


def test_the_first_failed_test_is_read_from_pytests_summary() -> None:
    output = "FAILED\nFAILED tests/test_x.py::test_y[a - b] - assert 1 == 2\nFAILED tests/test_x.py::test_z - no"
    assert Result(1, 1.0, output).first_failed == "tests/test_x.py::test_y"
    assert Result(0, 1.0, "1 passed").first_failed == ""


def zoo(tmp_path: Path, *arguments: str, bugs: str = "MUTATIONS") -> subprocess.CompletedProcess[str]:
    """The zoo in a process of its own: this one has imported the project."""
    call = "from tests.bugs import *; from tests.test_zoo import HARMLESS; from tests import zoo; import sys; "
    call += f"sys.exit(zoo.main({list(arguments)!r}, {bugs}))"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment, capture_output=True, text=True)


@forks
@pytest.mark.slow
def test_a_bug_is_caught_and_a_harmless_change_is_not_and_neither_stays(tmp_path: Path) -> None:
    before = (ROOT / HARMLESS.file).read_bytes()
    ran = zoo(tmp_path, bugs="[bug for bug in MUTATIONS if bug.name == 'the sign is lost'] + [HARMLESS]")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    header, without, caught, harmless, _, summary = ran.stdout.splitlines()
    assert " pass " in without
    assert caught.startswith("2a ") and " caught " in caught and caught.endswith(SIGN)
    assert harmless.startswith("2b ") and " NOT CAUGHT " in harmless
    assert summary.startswith("1 of 2 caught")
    assert (ROOT / HARMLESS.file).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("zoo-")]


@pytest.mark.parametrize(
    "verdicts, code",
    [(["pass", "caught"], 0), (["pass", "caught", "NOT CAUGHT"], 1), (["broken", "NOT CAUGHT", "caught"], 2)],
)
def test_only_a_zoo_that_caught_everything_exits_with_0(verdicts: list[str], code: int) -> None:
    assert exit_code(verdicts) == code


def test_a_patch_that_does_not_fit_is_refused_and_a_tree_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("a = 1\nb = 1\n")
    fits, twice = (Mutation(1, "a bug", "file.py", old, "c = 2", "", ()) for old in ("a = 1", " = 1"))
    with planted(fits, tmp_path):
        assert (tmp_path / "file.py").read_text() == "c = 2\nb = 1\n"
    with pytest.raises(ValueError, match="occurs 2 times"), planted(twice, tmp_path):
        pass
    assert (tmp_path / "file.py").read_text() == "a = 1\nb = 1\n"


def test_an_unknown_bug_is_refused(tmp_path: Path) -> None:
    ran = zoo(tmp_path, "99")
    assert ran.returncode == 2 and "99: no such bug" in ran.stderr
