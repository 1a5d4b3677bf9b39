"""`isthmus simulate`: many schedules, on all cores, and what was found."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from coordinator.outer import step
from lab.simulator.audit import Violation
from lab.simulator.network import Weather
from lab.simulator.schedules import schedule_of
from lab.simulator.world import Schedule, World
from shared import codecs

BATCH = 20
MEMORY = Path("/dev/shm")
"""Where files are memory, on Linux."""


@dataclass(frozen=True)
class Result:
    """What became of one schedule. `violation`: the sentence, where an invariant broke."""

    seed: int
    checks: int
    faults: int
    virtual_seconds: float
    violation: str | None = None


@dataclass
class Summary:
    """What became of all of them."""

    schedules: int = 0
    checks: int = 0
    faults: int = 0
    virtual_seconds: float = 0.0
    seconds: float = 0.0
    violations: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.schedules += 1
        self.checks += result.checks
        self.faults += result.faults
        self.virtual_seconds += result.virtual_seconds
        if result.violation is not None:
            self.violations.append(result)

    def __str__(self) -> str:
        found = f"{len(self.violations)} violations" if self.violations else "no violation"
        return (
            f"{self.schedules:,} schedules, {self.faults:,} faults, {self.checks:,} checks, "
            f"{self.virtual_seconds / 3600:,.0f} virtual hours in {self.seconds:.1f} s: {found}"
        )


def run_simulation(seeds: range, jobs: int, trace: bool) -> None:
    """The command. Exits with 1 where an invariant broke; its last line is the summary."""

    def found(result: Result) -> None:
        print(f"schedule {result.seed}: {result.violation}")
        print(f"  again: isthmus simulate --schedules 1 --seed {result.seed} --trace")

    summary = _traced(seeds, found) if trace else simulate(seeds, jobs or os.cpu_count() or 1, found)
    print(summary)
    if summary.violations:
        raise SystemExit(1)


def _traced(seeds: range, found: Callable[[Result], None]) -> Summary:
    """In this process, one after the other, and every line of what happens."""
    summary, began = Summary(), time.monotonic()
    prepare()
    for seed in seeds:
        schedule = schedule_of(seed)
        print(f"schedule {seed}: {schedule.config.model_dump_json()}")
        for line in (*schedule.weather.items(), *schedule.faults):
            print(f"  {line}")
        summary.add(result := run_schedule(seed, print))
        if result.violation is not None:
            found(result)
    summary.seconds = time.monotonic() - began
    return summary


def simulate(seeds: range, jobs: int, found: Callable[[Result], None]) -> Summary:
    """Runs the schedules of `seeds` in `jobs` processes; `found` is called with each violation as it comes."""
    summary, began = Summary(), time.monotonic()
    for result in _results(seeds, jobs):
        summary.add(result)
        summary.seconds = time.monotonic() - began
        if result.violation is not None:
            found(result)
    return summary


def run_schedule(seed: int, say: Callable[[str], None] = lambda line: None) -> Result:
    """One schedule; `say` gets a line for everything that happens in it."""
    schedule = schedule_of(seed)
    base = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="isthmus-simulate-", dir=base))
    world = World(schedule, directory / "world", say)
    violation = None
    try:
        ended = world.run()
        if schedule.repeats and (undisturbed := _undisturbed(schedule, directory)) != ended:
            raise Violation("a full-quorum run ends in the same bits", f"{ended}, and undisturbed {undisturbed}")
    except Violation as error:
        violation = str(error)
    except Exception as error:
        violation = f"nothing fails that has no name: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    kinds = Counter(fault.kind for fault in schedule.faults)
    return Result(seed, world.checks, kinds.total(), world.loop.time(), violation)


_calm: dict[str, list[tuple[int, str]]] = {}


def _undisturbed(schedule: Schedule, directory: Path) -> list[tuple[int, str]]:
    """How the run ends without faults. It depends on nothing but what is in the key: neither on how the coordinator
    stores its history, nor on speeds."""
    config = schedule.config.model_dump_json(exclude={"store": True, "wire": {"zstd_level"}})
    key = f"{schedule.sites} {config}"
    if key not in _calm:
        calm = replace(schedule, faults=(), weather=dict.fromkeys(schedule.sites, Weather()))
        _calm[key] = World(calm, directory / "calm").run()
    return _calm[key]


def _results(seeds: range, jobs: int) -> Iterator[Result]:
    batches = [seeds[at : at + BATCH] for at in range(0, len(seeds), BATCH)]
    if jobs == 1 or len(batches) == 1:
        prepare()
        for batch in batches:
            yield from _run_batch(batch)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare) as pool:
        for results in pool.map(_run_batch, batches):
            yield from results


def prepare() -> None:
    """Once in each process: kernels, and quiet. Thousands of imagined faults would fill a log."""
    codecs.warm_up()
    step.warm_up()
    logging.disable(logging.CRITICAL)
    run_schedule(0)  # loads what is loaded when it is needed, so that no collection looks at it again
    gc.collect()
    gc.freeze()


def _run_batch(seeds: range) -> list[Result]:
    results = []
    for seed in seeds:
        # Collected between schedules, because a collection in the middle of one walks all of its loop.
        gc.disable()
        results.append(run_schedule(seed))
        gc.enable()
    gc.collect()
    return results
