"""Everything at once, on real processes: each kind of fault, and nothing that was sent is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.course import LINK, Course
from benchmarks.storm import KINDS, Storm, books, refusals
from lab.fleet import Fleet

SITES = ["a", "b", "c"]
TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))


def tables(text: Path) -> dict[str, dict[str, Any]]:
    return {
        "run": {"name": "storm", "tokens": 200_000, "min_sites": 3},
        "task": {"use": "byte-lm", "paths": str(text), "context": 16, "width": 32, "layers": 1, "heads": 2},
        "inner": {"lr": 3e-3, "steps": 20, "batch_size": 8},
        "rounds": {"fragments": 2, "max_staleness": 1000},
        "store": {"keep_rounds": 1_000_000},
    }


def test_a_storm_of_every_kind_of_fault_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with Fleet(tmp_path) as fleet:
        course = Course(fleet, tables(tmp_path / "text.txt"), SITES, dict.fromkeys(SITES, LINK))
        asyncio.run(disturbed(course))
        merged, _ = books(course.state, [])
        assert merged > 50
        assert refusals(course) == 0


async def disturbed(course: Course) -> None:
    await course.start_all()
    await course.reaches("training")
    storm = Storm(course, 1.0, seed=0, scale=0.1)
    for n, kind in enumerate(KINDS):
        tokens = (await course.status())["tokens"]
        whom = "coordinator" if kind == "kill-coordinator" else SITES[n % 3]
        storm.strike(kind, whom)
        await storm.calm_down()
        while (await course.status())["tokens"] < tokens + 10_000:
            course.fleet.check()
            await asyncio.sleep(0.05)
    await course.finish()
