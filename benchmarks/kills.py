"""`python -m benchmarks.kills`: real `kill -9` of the coordinator (or of its sites) at random instants under load.

A full-quorum run of real processes is trained twice: left alone, and with kills. What is counted: contributions that a
site was told were accepted, those that the journal holds and has merged, and whether the run ends in the same bits.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import arguments, copy_bytes_per_second, report
from benchmarks.processes import SITE, free_port, write_toml
from coordinator.store.journal import Journal
from lab.fleet import Child, Fleet, coordinator_status

SITES = ("a", "b")
TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))
UP_SECONDS = (0.0, 1.2)
"""A kill comes so long after the last one was recovered from, uniformly."""


@dataclass
class Course:
    """One run from its start to its end."""

    fleet: Fleet
    port: int
    children: dict[str, Child] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    kills: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str) -> None:
        if name == "coordinator":
            serve = ["coordinator", "serve", "run.toml", "--state", "state", "--port", str(self.port), "--insecure"]
            self.children[name] = self.fleet.start(name, ["isthmus", *serve])
        else:
            self.children[name] = self.fleet.start(name, ["isthmus", "site", "run", f"{name}.toml"])

    async def status(self) -> dict[str, Any]:
        """The coordinator's status, as soon as it answers."""
        while True:
            status = await asyncio.to_thread(coordinator_status, self.url)
            if status is not None:
                return status
            await asyncio.sleep(0.02)

    async def kill(self, name: str) -> None:
        """SIGKILL, a start, and how long until it serves (a coordinator) or trains (a site) again."""
        child, began = self.children[name], time.monotonic()
        if child.process.poll() is not None:
            return
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
        self.fleet.children.remove(child)
        self.start(name)
        status = await self.status()
        if name != "coordinator":
            steps = _steps(status, name)
            while status["state"] != "finished" and _steps(status, name) == steps:
                await asyncio.sleep(0.05)
                status = await self.status()
        self.kills += 1
        self.recoveries.append(time.monotonic() - began)


async def train(directory: Path, tokens: int, disturb: Callable[[Course], Any] | None) -> Course:
    """A run in `directory`, with `disturb` beside it until it is finished."""
    with Fleet(directory) as fleet:
        course = Course(fleet, free_port())
        (directory / "text.txt").write_text(TEXT, encoding="utf-8")
        write_toml(directory / "run.toml", _tables(directory, tokens))
        course.start("coordinator")
        await course.status()
        for name in SITES:
            (directory / f"{name}.toml").write_text(SITE.format(name=name, url=course.url), encoding="utf-8")
            course.start(name)
        trouble = asyncio.create_task(disturb(course)) if disturb is not None else None
        while (await course.status())["state"] != "finished":
            if trouble is not None and trouble.done():
                trouble.result()
            await asyncio.sleep(0.2)
        if trouble is not None:
            trouble.cancel()
            await asyncio.gather(trouble, return_exceptions=True)
        await course.status()
        for name in SITES:
            await fleet.wait(course.children[name])
    return course


def books(state: Path) -> tuple[list[tuple[int, str]], int, int]:
    """(the last version and digest of each fragment, accepted contributions, those of them that are merged once)."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        last, merged = [], []
        for p in range(2):
            rounds = journal.rounds(p, after=0)
            last.append((rounds[-1].version, str(rounds[-1].published_digest)))
            merged += [id_ for round_ in rounds for id_, _ in round_.members if round_.published_at is not None]
        accepted = journal.accepted()
    finally:
        journal.close()
    return last, accepted, len(set(merged)) if len(set(merged)) == len(merged) else -1


def measure(kills: int, whom: str, tokens: int, seed: int) -> dict[str, Any]:
    """One row: a calm run and a disturbed one."""
    rng = random.Random(seed)

    async def disturb(course: Course) -> None:
        while course.kills < kills:
            await asyncio.sleep(rng.uniform(*UP_SECONDS))
            await course.kill("coordinator" if whom == "coordinator" else rng.choice(SITES))

    with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as directory:
        calm, storm = Path(directory, "calm"), Path(directory, "kills")
        calm.mkdir()
        storm.mkdir()
        began = time.monotonic()
        asyncio.run(train(calm, tokens, None))
        calm_seconds = time.monotonic() - began
        course = asyncio.run(train(storm, tokens, disturb))
        undisturbed, _, _ = books(calm / "state")
        ended, accepted, merged = books(storm / "state")
        return {
            "setting": f"{whom}-kills",
            "seed": seed,
            "tokens": tokens,
            "faults": course.kills,
            "sent": accepted,
            "merged": merged,
            "lost": accepted - merged,
            "same_bits": ended == undisturbed,
            "recovery_seconds": statistics.median(course.recoveries),
            "longest_recovery_seconds": max(course.recoveries),
            "seconds": time.monotonic() - began - calm_seconds,
            "calm_seconds": calm_seconds,
        }


def _tables(directory: Path, tokens: int) -> dict[str, dict[str, Any]]:
    model = {"context": 16, "width": 32, "layers": 1, "heads": 2}
    return {
        "run": {"name": "kills", "tokens": tokens, "min_sites": len(SITES)},
        "task": {"use": "byte-lm", "paths": str(directory / "text.txt"), **model},
        "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 2, "pacing": "equal-steps"},
        "store": {"keep_rounds": 1_000_000},
    }


def _steps(status: dict[str, Any], name: str) -> int:
    return next((site["steps"] for site in status["sites"] if site["name"] == name), 0)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--kills", type=int, help="how many of the coordinator; an eighth as many of sites")
    options = parser.parse_args()
    kills = options.kills or (20 if options.quick else 200)
    tokens = 8 * 16 * 8 * len(SITES) * (4 * kills + 40)
    rows = [
        measure(kills, "coordinator", tokens, seed=0),
        measure(max(4, kills // 8), "site", tokens // 2, seed=1),
    ]
    report("kill -9 under load", copy_bytes_per_second(), rows, options.json)
    if any(row["lost"] or not row["same_bits"] for row in rows):
        raise SystemExit(json.dumps({"lost": [row["lost"] for row in rows]}))


if __name__ == "__main__":
    main()
