"""The runs of the atlas on several processes, one thread each: in turn, with what is done kept at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.atlas.experiments import Cell, experiments, seeds_of
from benchmarks.atlas.records import AGAIN, BASELINE
from benchmarks.atlas.runs import Record, append_record, record_of
from benchmarks.atlas.starts import start_of
from sft_core.run.provenance import provenance

START_SECONDS, RUN_SECONDS = 70.0, 30.0  # of a CPU core, where nothing is recorded yet

Start = tuple[str, int]  # its kind and seed


@dataclass(frozen=True)
class Plan:
    """What is left to do: models to start from, and runs; both in the order in which they are wanted."""

    starts: list[Start]
    cells: list[Cell]
    seconds: dict[str, float]  # of a run, by task and by experiment, as recorded

    @staticmethod
    def of(wanted: Iterable[Cell], records: Sequence[Record], work: Path) -> Plan:
        """The wanted runs that are not recorded with the same flags, and the baselines that those are compared with."""
        done = {(r["task"], r["experiment"], r["seed"], tuple(r["flags"])) for r in records}
        wanted = list(wanted)
        left = list(with_baselines(wanted, [cell for cell in wanted if cell.key not in done], records))
        starts = dict.fromkeys((cell.experiment.start, cell.seed) for cell in left)
        missing = [start for start in starts if not (work / "starts" / f"{start[0]}-{start[1]}" / "final").is_dir()]
        seconds: dict[str, list[float]] = {}
        for record in records:
            names = {f"{record['task']}/{record['experiment']}"}
            names |= {record["task"]} if record["experiment"] == BASELINE else set()
            for name in names:
                seconds.setdefault(name, []).append(record["seconds"])
        return Plan(missing, left, {name: sum(each) / len(each) for name, each in seconds.items()})

    def cost(self, cell: Cell) -> float:
        """Its seconds on one core: as those of other seeds, else of the task's baseline, else a guess."""
        known = self.seconds
        return known.get(cell.experiment.label, known.get(cell.experiment.task, RUN_SECONDS))

    @property
    def core_seconds(self) -> float:
        return START_SECONDS * len(self.starts) + sum(map(self.cost, self.cells))

    def lines(self, processes: int) -> str:
        """What the plan says before it begins."""
        if not self.cells:
            return "every run is recorded"
        minutes = self.core_seconds / processes / 60
        guessed = sum(cell.experiment.task not in self.seconds for cell in self.cells)
        return (
            f"{len(self.cells)} runs and {len(self.starts)} models to start them from: about {minutes:.0f} minutes on "
            f"{processes} {'processes' if processes > 1 else 'process'}"
            + (f" (of {guessed} runs the time is a guess: none of their task is recorded)" if guessed else "")
        )


def with_baselines(wanted: Sequence[Cell], left: Sequence[Cell], records: Sequence[Record]) -> Iterator[Cell]:
    """The runs that are left, and before the first of a task and seed its baseline, unless it is recorded on this
    processor: SFT leaves other weights on another, and only runs from the same weights are compared in pairs."""
    here = provenance(None)["hardware"][0].partition(",")[0]
    bases = {
        (each.task, seed): each
        for each in experiments()
        if each.name in (BASELINE, AGAIN)
        for seed in seeds_of(each)[0]
    }
    ran = [r for r in records if r["processor"].partition(",")[0] == here]
    known = {(r["task"], r["seed"]) for r in ran if r["experiment"] in (BASELINE, AGAIN)}
    known |= {(cell.experiment.task, cell.seed) for cell in left if cell.experiment.name in (BASELINE, AGAIN)}
    tasks = {cell.experiment.task for cell in wanted}
    lone = [((r["task"], r["seed"]), None) for r in ran if r["task"] in tasks]
    for at, cell in [*lone, *(((cell.experiment.task, cell.seed), cell) for cell in left)]:
        if at not in known and at in bases:
            known.add(at)
            yield Cell(bases[at], at[1])
        if cell:
            yield cell


def _alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends the others
    torch.set_num_threads(1)


def take(plan: Plan, records: Path, work: Path, processes: int, minutes: float | None) -> list[str]:
    """Take the runs, in the plan's order, each as soon as its start is there; none begins after `minutes`. What went
    wrong, a line for each."""
    failed: list[str] = []
    starts, cells, made = list(plan.starts), list(plan.cells), set[Start]()
    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    running: dict[Future[Any], Start | Cell] = {}
    shown = "{percentage:3.0f}% |{bar}| {remaining} left, {desc}"
    bar = tqdm(total=round(plan.core_seconds), desc=f"{len(cells)} runs to go", bar_format=shown)
    with bar, ProcessPoolExecutor(processes, get_context("spawn"), _alone) as pool:
        try:
            while (starts or cells or running) and (running or time.monotonic() < ends):
                while len(running) < processes and time.monotonic() < ends:
                    job = _next(starts, cells, made, plan)
                    if job is None:
                        break
                    running[_submitted(pool, job, work)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    failed += _keep(job, future, records, made)
                    bar.update(round(START_SECONDS if isinstance(job, tuple) else plan.cost(job)))
                    bar.set_description(f"{len(cells) + len(running)} runs to go")
        except KeyboardInterrupt:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _submitted(pool: ProcessPoolExecutor, job: Start | Cell, work: Path) -> Future[Any]:
    if isinstance(job, tuple):
        return pool.submit(start_of, *job, work / "starts")
    return pool.submit(record_of, job, work)


def _next(starts: list[Start], cells: list[Cell], made: set[Start], plan: Plan) -> Start | Cell | None:
    """The first run whose start is there, or the first start that is missing."""
    waiting = {*plan.starts} - made
    if starts and (not cells or (cells[0].experiment.start, cells[0].seed) in waiting):
        return starts.pop(0)
    for place, cell in enumerate(cells):
        if (cell.experiment.start, cell.seed) not in waiting:
            return cells.pop(place)
    return None


def _keep(job: Start | Cell, future: Future[Any], records: Path, made: set[Start]) -> list[str]:
    error = future.exception()
    if isinstance(job, tuple):
        if error:
            raise error  # no run can begin without it
        made.add(job)
        return []
    if error:
        return [f"{job.experiment.label}, seed {job.seed}: {type(error).__name__}: {error}"]
    append_record(records, future.result())
    return []
