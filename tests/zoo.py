"""The bug zoo: every known way to get GRPO wrong, put into a copy of this project, and the tests that notice.

    python -m tests.zoo             put in every bug, run the tests that must fail, print the table
    python -m tests.zoo 3 10b       only the bugs of pitfall 3, and bug b of pitfall 10
    python -m tests.zoo 3 --show    with what pytest says: how a test notices
    python -m tests.zoo --list      the exercise sheet, docs/bug-zoo.md; runs nothing

Exit code 0: all were caught. 1: at least one was not. 2: the zoo itself is broken, for instance because a test that is
named for a bug fails without it.

Importing torch and transformers takes longer than most tests, so this process imports them once and forks for each bug;
it imports nothing of the project itself. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bugs import MUTATIONS, Mutation
from tests.sheet import exercise_sheet, labels

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 120.0  # seconds for the tests of one bug
TIME_LIMIT_OF_ALL = 1200.0  # for all tests that are named, without a bug
# What the tests import, of other people's: imported before the forks, where it is installed.
PRELOADED: tuple[str, ...] = (
    "pytest",
    "hypothesis",
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.generation",
)
PRELOADED += ("transformers.models.qwen2.modeling_qwen2", "transformers.models.gpt2.modeling_gpt2", "peft")
WORTH_PRELOADING = 4  # for fewer bugs each fork imports what it needs


@dataclass(frozen=True)
class Result:
    """What pytest said of the named tests."""

    exit_code: int | None  # None: no end within the time limit
    seconds: float
    output: str

    @property
    def first_failed(self) -> str:
        """The test that failed, without its parameters: pytest stops at the first."""
        for line in self.output.splitlines():
            kind, _, rest = line.partition(" ")
            if kind in ("FAILED", "ERROR") and "::" in rest:
                return rest.split(" - ")[0].split("[")[0]
        return ""


@dataclass(frozen=True)
class Job:
    """Tests to run on a copy of the tree, with one bug in it or, to see that they pass, with none."""

    label: str
    bug: Mutation | None
    tests: tuple[str, ...]

    @property
    def limit(self) -> float:
        if self.bug is None:
            return TIME_LIMIT_OF_ALL
        return self.bug.hangs_after or TIME_LIMIT

    def verdict(self, result: Result) -> str:
        """caught, NOT CAUGHT, or broken: pytest did not get as far as a failing test."""
        if self.bug is None:
            return "pass" if result.exit_code == 0 else "broken"
        if result.exit_code is None:
            return "caught" if self.bug.hangs_after else "broken"
        return {1: "caught", 0: "NOT CAUGHT"}.get(result.exit_code, "broken")


def copy_tree(target: Path) -> None:
    """The packages and the files beside them: not runs, data or a virtual environment that may lie there too."""
    target.mkdir()
    for path in ROOT.iterdir():
        if (path / "__init__.py").is_file():
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, target)


class DoesNotFit(ValueError):
    """A bug's patch is for another version of the source."""


@contextmanager
def planted(bug: Mutation | None, tree: Path) -> Iterator[None]:
    """The bug is in the tree while the block runs."""
    if bug is None:
        yield
        return
    file = tree / bug.file
    source = file.read_text(encoding="utf-8")
    if source.count(bug.old) != 1:
        raise DoesNotFit(f"{bug.file}: the text that {bug.name!r} replaces occurs {source.count(bug.old)} times")
    file.write_text(source.replace(bug.old, bug.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


def run_pytest(tree: Path, tests: Sequence[str], output: Path) -> int:
    """Fork a process that runs these tests on the tree and writes to `output`; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70  # of a child that fails before pytest has an answer
    try:
        os.setsid()  # a group of its own, to be ended with whatever the tests start
        to = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ROOT).resolve() != ROOT)]
        packages = {path.name for path in tree.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]  # `tests`, which this file belongs to: to be found again in the copy
        import pytest

        # No workers: this is a process of its own already. And pytest would like to have been there when its plugins
        # were imported.
        quiet = ["-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main(["-x", "-q", *quiet, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Worker:
    """One copy of the tree, in which one job runs at a time."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.output = folder / "tree", folder / "output.txt"
        folder.mkdir()
        copy_tree(self.tree)

    def run(self, job: Job) -> Generator[Result | None, None, None]:
        """None until the job has ended, then its result."""
        start = time.perf_counter()
        try:
            with planted(job.bug, self.tree):
                code = yield from self._pytest(job.tests, start + job.limit)
            output = self.output.read_text(encoding="utf-8", errors="replace")
        except DoesNotFit as error:
            code, output = 70, str(error)
        yield Result(code, time.perf_counter() - start, output)

    def _pytest(self, tests: Sequence[str], deadline: float) -> Generator[None, None, int | None]:
        """Return pytest's exit code, or None where it had not ended by the deadline."""
        pid, ended = run_pytest(self.tree, tests, self.output), 0
        try:
            while time.perf_counter() < deadline:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                yield None
            return None
        finally:
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def run_all(queue: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, in the order of the queue."""
    done: dict[int, Result] = {}
    waiting, told = list(enumerate(queue)), 0
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        idle = [Worker(Path(folder).resolve() / str(i)) for i in range(workers)]
        running: list[tuple[int, Worker, Generator[Result | None, None, None]]] = []
        try:
            while told < len(queue):
                while waiting and idle:
                    place, job = waiting.pop(0)
                    worker = idle.pop()
                    running.append((place, worker, worker.run(job)))
                for entry in list(running):
                    place, worker, steps = entry
                    if result := next(steps):
                        done[place] = result
                        running.remove(entry)
                        idle.append(worker)
                while told in done:
                    yield queue[told], done.pop(told)
                    told += 1
                time.sleep(0.02)
        finally:
            for *_, steps in running:
                steps.close()  # ends its processes, before their folder goes


def settle_in(bugs: int) -> None:
    """One thread for each process, since they share the processors; and the imports that most tests need."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A bug may be put in and taken out within a second and leave the file's size alone, which is all that a stale
    # .pyc is told by.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in PRELOADED if bugs >= WORTH_PRELOADING else ():
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an extra, or another release's name


def is_here(test: str) -> bool:
    """Whether a pytest node id names a function in its file. That of a doctest ends in package.module.function."""
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file():
        return False
    return f"\ndef {name.rpartition('.')[2]}(" in (ROOT / file).read_text(encoding="utf-8")


def jobs_for(bugs: Sequence[tuple[str, Mutation]]) -> list[Job]:
    """First all the tests without any bug, then each bug with its own."""
    jobs = [Job(label, bug, bug.tests) for label, bug in bugs]
    union = tuple(dict.fromkeys(test for job in jobs for test in job.tests))
    return [Job("", None, union), *jobs]


def row(label: str, name: str, verdict: str, by: str, seconds: float) -> str:
    return f"{label:7}  {name:54.54}  {verdict:10}  {seconds:5.1f}  {by}"


def visit(bugs: Sequence[tuple[str, Mutation]], workers: int, show: bool) -> int:
    """Run the zoo and print its table; return the exit code."""
    settle_in(len(bugs))
    start, verdicts = time.perf_counter(), []
    print(f"{'pitfall':7}  {'bug':54}  {'':10}  {'s':>5}  first test that failed")
    for job, result in run_all([job for job in jobs_for(bugs) if job.tests], workers):
        verdict = job.verdict(result)
        verdicts.append(verdict)
        by = "" if verdict == "NOT CAUGHT" else result.first_failed
        if result.exit_code is None:
            by = f"(no end within {job.limit:.0f} s)"
        print(row(job.label, job.bug.name if job.bug else "none", verdict, by, result.seconds), flush=True)
        if verdict == "broken" or (show and job.bug):
            print(result.output)
    for job in jobs_for(bugs):
        if job.bug and not job.tests:  # every test named for it is still to be written
            verdicts.append("NOT CAUGHT")
            print(row(job.label, job.bug.name, "NOT CAUGHT", f"(no {', '.join(job.bug.tests)} yet)", 0.0))
    print(f"\n{verdicts.count('caught')} of {len(bugs)} caught, in {time.perf_counter() - start:.0f} s")
    return exit_code(verdicts)


def exit_code(verdicts: Sequence[str]) -> int:
    return 2 if "broken" in verdicts else int("NOT CAUGHT" in verdicts)


def main(argv: Sequence[str] | None = None, mutations: Sequence[Mutation] = tuple(MUTATIONS)) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Put known bugs in and see tests fail.")
    parser.add_argument("bugs", nargs="*", help="pitfalls (3) or single bugs (3b); none: all")
    parser.add_argument("--list", action="store_true", help="print the exercise sheet and run nothing")
    parser.add_argument("--show", action="store_true", help="print what pytest says of each bug")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="bugs at a time (%(default)s)")
    options = parser.parse_args(argv)
    if options.list:
        print(exercise_sheet(mutations))
        return 0
    chosen = [(label, bug) for label, bug in labels(mutations) if {label, str(bug.pitfall)} & {*options.bugs}]
    known = {name for label, bug in labels(mutations) for name in (label, str(bug.pitfall))}
    if unknown := set(options.bugs) - known:
        parser.error(f"{', '.join(sorted(unknown))}: no such bug; --list names them")
    return visit(chosen or labels(mutations), max(1, options.jobs), options.show)


if __name__ == "__main__":
    sys.exit(main())
