"""`python -m benchmarks.kills`: real `kill -9` of the coordinator (or of its sites) at random instants under load.

A full-quorum run of real processes is trained twice: left alone, and with kills. What is counted: contributions that a
site was told were accepted, those that the journal holds and has merged, and whether the run ends in the same bits.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.course import Course, until_trains
from benchmarks.machine import arguments, copy_bytes_per_second, report
from coordinator.store.journal import Journal
from lab.fleet import Fleet

SITES = ("a", "b")
TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))
UP_SECONDS = (0.0, 1.2)
"""A kill comes so long after the last one was recovered from, uniformly."""


async def kill(course: Course, name: str) -> float:
    """SIGKILL, a start, and how many seconds until it serves (a coordinator) or trains (a site) again."""
    began = time.monotonic()
    course.kill(name)
    course.start(name)
    if name == "coordinator":
        await course.status()
    else:
        await until_trains(course, name)
    return time.monotonic() - began


async def train(directory: Path, tokens: int, whom: Sequence[str], kills: int, rng: random.Random) -> list[float]:
    """A run in `directory`, in which one of `whom` is killed so often; the seconds of each recovery."""
    with Fleet(directory) as fleet:
        (directory / "text.txt").write_text(TEXT, encoding="utf-8")
        course, recoveries = Course(fleet, _tables(directory, tokens), SITES), list[float]()
        await course.start_all()
        while len(recoveries) < kills and (await course.status())["state"] != "finished":
            await asyncio.sleep(rng.uniform(*UP_SECONDS))
            name = rng.choice(whom)
            if course.runs(name):
                recoveries.append(await kill(course, name))
        await course.finish()
    return recoveries


def books(state: Path) -> tuple[list[tuple[int, str]], int, int]:
    """(the last version and digest of each fragment, accepted contributions, those of them that are merged once)."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        last, merged = [], []
        for p in range(2):
            rounds = journal.rounds(p, after=0)
            last.append((rounds[-1].version, str(rounds[-1].published_digest)))
            merged += [id_ for round_ in rounds for id_, _ in round_.members if round_.published_at is not None]
        accepted = len(journal.acceptances())
    finally:
        journal.close()
    return last, accepted, len(set(merged)) if len(set(merged)) == len(merged) else -1


def measure(kills: int, whom: str, tokens: int, seed: int) -> dict[str, Any]:
    """One row: a calm run and a disturbed one."""
    rng, killed = random.Random(seed), ("coordinator",) if whom == "coordinator" else SITES
    with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as directory:
        calm, storm = Path(directory, "calm"), Path(directory, "kills")
        calm.mkdir()
        storm.mkdir()
        began = time.monotonic()
        asyncio.run(train(calm, tokens, killed, 0, rng))
        calm_seconds = time.monotonic() - began
        recoveries = asyncio.run(train(storm, tokens, killed, kills, rng))
        undisturbed, _, _ = books(calm / "state")
        ended, accepted, merged = books(storm / "state")
        return {
            "setting": f"{whom}-kills",
            "seed": seed,
            "tokens": tokens,
            "faults": len(recoveries),
            "sent": accepted,
            "merged": merged,
            "lost": accepted - merged,
            "same_bits": ended == undisturbed,
            "recovery_seconds": statistics.median(recoveries),
            "longest_recovery_seconds": max(recoveries),
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
