"""`python -m benchmarks.storm`: a run over eight sites behind emulated links, left alone and in a storm of faults.

Real processes. Sites and the coordinator are killed with SIGKILL, sites are stopped and continued, links are cut. Both
runs merge the same tokens. What is counted: contributions that were sent, and those of them that were merged; the
held-out loss at the end; and how long after a fault its site contributed again.
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.course import LINK, Course
from benchmarks.machine import arguments, copy_bytes_per_second, report
from coordinator.store.journal import Journal
from lab.corpus import shakespeare
from lab.fleet import Fleet

SITES = [f"site-{n}" for n in range(8)]
SPEEDS = (0.25, 0.25, 0.2, 0.2, 0.15, 0.15, 0.1, 0.1)
"""Shares of full speed: uneven sites, which leave two cores room."""
KINDS = {"kill-site": 8, "stop-site": 4, "cut": 5, "kill-coordinator": 3}


class Storm:
    """Faults at random times, one in each 1/`per_hour` of an hour, on the sites of `course` and its coordinator, in the
    proportions of `KINDS`; `scale` shortens how long they last. `seconds`: how long it has raged."""

    def __init__(self, course: Course, per_hour: float, seed: int, scale: float = 1.0) -> None:
        self.course, self.pause, self.scale = course, 3600 / per_hour, scale
        self.rng = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.kills: list[tuple[float, str]] = []
        self.seconds = 0.0
        self._deck: list[str] = []
        self._repairs: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()

    async def rage(self) -> None:
        """Until it is cancelled."""
        began, slot = time.monotonic(), 0
        try:
            while True:
                at = (slot + self.rng.random()) * self.pause
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                kind = self._next_kind()
                while not (well := self._well(kind)):
                    if not self._repairs:
                        return  # nobody is left: the run is over
                    await asyncio.wait(self._repairs, return_when=asyncio.FIRST_COMPLETED)
                self.strike(kind, self.rng.choice(well))
                slot += 1
        finally:
            self.seconds = time.monotonic() - began

    def _next_kind(self) -> str:
        """From a deck that is shuffled and dealt out again and again."""
        if not self._deck:
            self._deck = [kind for kind, count in KINDS.items() for _ in range(count)]
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _well(self, kind: str) -> list[str]:
        """Whom such a fault could strike."""
        whom = ["coordinator"] if kind == "kill-coordinator" else self.course.sites
        return [name for name in whom if name not in self._busy and self.course.runs(name)]

    async def calm_down(self) -> None:
        """Whatever is broken is mended."""
        while self._repairs:
            await asyncio.wait(self._repairs)

    def strike(self, kind: str, whom: str) -> None:
        """One fault; the repair follows by itself."""
        self.faults[kind] += 1
        self._busy.add(whom)
        task = asyncio.create_task(self._fault(kind, whom))
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _fault(self, kind: str, whom: str) -> None:
        course = self.course
        match kind:
            case "kill-site" | "kill-coordinator":
                self.kills.append((time.time(), whom))
                course.kill(whom)
                await self._while(0, 10 if kind == "kill-site" else 3)
                course.start(whom)
            case "stop-site":
                course.send(whom, signal.SIGSTOP)
                await self._while(2, 45)
                course.send(whom, signal.SIGCONT)
            case "cut":
                course.kill(f"link-{whom}")
                await self._while(1, 20)
                course.start(f"link-{whom}")
        self._busy.discard(whom)

    async def _while(self, least: float, most: float) -> None:
        """As long as a fault lasts, in seconds."""
        await asyncio.sleep(self.scale * self.rng.uniform(least, most))


def measure(tokens: int, per_hour: float, seed: int) -> dict[str, Any]:
    """One run; `per_hour` 0: left alone."""
    with tempfile.TemporaryDirectory(prefix="isthmus-storm-") as directory, Fleet(Path(directory)) as fleet:
        course = Course(fleet, _tables(tokens), SITES, dict.fromkeys(SITES, LINK))
        for site, speed in zip(SITES, SPEEDS, strict=True):
            config = fleet.directory / f"{site}.toml"
            text = config.read_text(encoding="utf-8").replace("threads = 1", f"threads = 1\nthrottle = {speed}")
            config.write_text(text.replace("[devices]", "checkpoint_seconds = 20\n[devices]"), encoding="utf-8")
        began = time.monotonic()
        status, storm = asyncio.run(_train(course, per_hour, seed))
        seconds = time.monotonic() - began
        merged, again = books(course.state, storm.kills if storm is not None else [])
        refused = refusals(course)
        return {
            "setting": "storm" if per_hour else "calm",
            "seed": seed,
            "tokens": status["tokens"],
            "faults": storm.faults.total() if storm is not None else 0,
            "faults_per_hour": 3600 * storm.faults.total() / storm.seconds if storm is not None else 0.0,
            "kinds": ", ".join(f"{n} {kind}" for kind, n in sorted(storm.faults.items())) if storm is not None else "",
            "sent": merged + refused,
            "merged": merged,
            "lost": refused,
            "merged_share": merged / (merged + refused),
            "eval_loss": status["eval_loss"],
            "again_seconds": statistics.median(again) if again else None,
            "seconds": seconds,
        }


async def _train(course: Course, per_hour: float, seed: int) -> tuple[dict[str, Any], Storm | None]:
    await course.start_all()
    await course.reaches("training", "finished")
    if not per_hour:
        return await course.finish(), None
    storm = Storm(course, per_hour, seed)
    raging = asyncio.create_task(storm.rage())
    finished = asyncio.create_task(course.reaches("finished"))
    await asyncio.wait({raging, finished}, return_when=asyncio.FIRST_COMPLETED)
    if raging.done():
        raging.result()
    raging.cancel()
    await asyncio.gather(raging, return_exceptions=True)
    await storm.calm_down()
    return await course.finish(), storm


def books(state: Path, kills: list[tuple[float, str]]) -> tuple[int, list[float]]:
    """(contributions that are merged, seconds from each kill of a site to its next accepted contribution)."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        accepted = journal.acceptances()
        merged = sum(len(round_.members) for p in range(2) for round_ in journal.rounds(p, after=0))
    finally:
        journal.close()
    again = []
    for at, whom in kills:
        later = [when - at for site, when in accepted if when > at and whom in (site, "coordinator")]
        if later:
            again.append(min(later))
    return merged, again


def refusals(course: Course) -> int:
    """Contributions that were sent and will not be merged."""
    return sum(course.log(site).count("is aligned anew") for site in course.sites)


def _tables(tokens: int) -> dict[str, dict[str, Any]]:
    text = str(shakespeare(Path(tempfile.gettempdir()) / "isthmus-corpus"))
    return {
        "run": {"name": "storm", "tokens": tokens, "min_sites": len(SITES)},
        "task": {"use": "byte-lm", "paths": text, "context": 32, "width": 48, "layers": 2, "heads": 2},
        "inner": {"lr": 3e-3, "steps": 30, "batch_size": 8, "warmup_tokens": tokens // 8},
        "rounds": {"fragments": 2},
        "store": {"keep_rounds": 1_000_000},
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--faults-per-hour", type=float, default=250.0)
    parser.add_argument("--tokens", type=int, help="of each run")
    options = parser.parse_args()
    tokens = options.tokens or (600_000 if options.quick else 20_000_000)
    rows = [measure(tokens, 0.0, 0), measure(tokens, options.faults_per_hour * (3 if options.quick else 1), 0)]
    report("a storm over eight sites", copy_bytes_per_second(), rows, options.json)
    calm, storm = rows
    print(f"eval loss {100 * (storm['eval_loss'] / calm['eval_loss'] - 1):+.2f}% against the calm run")


if __name__ == "__main__":
    main()
