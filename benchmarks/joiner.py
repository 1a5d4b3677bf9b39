"""`python -m benchmarks.joiner`: a site that joins over 10 Mbit/s while the model moves on without it.

Two sites train on the coordinator's own network. A third one starts when the run is under way, behind an emulated link,
and has to fetch every fragment while new versions of it come out. What is counted: how long the bytes of one snapshot
of everything take at the link's rate, how long it took until the joiner trained and until its first contribution was
merged, how many versions came out meanwhile, and how stale its contributions are afterwards.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.course import Course, reported_steps
from benchmarks.machine import arguments, copy_bytes_per_second, report
from coordinator.store.journal import Journal
from lab.corpus import shakespeare
from lab.fleet import Fleet

JOINER = "joiner"
MBIT = 10


def measure(tokens: int, width: int, layers: int, *, slow: bool) -> dict[str, Any]:
    """One run; the joiner comes at a tenth of it, over the slow link or on the coordinator's own network."""
    with tempfile.TemporaryDirectory(prefix="isthmus-joiner-") as directory, Fleet(Path(directory)) as fleet:
        link = ("--rate", f"{MBIT}mbit", "--rtt", "80ms")
        links = {JOINER: link} if slow else {}
        course = Course(fleet, tables(tokens, width, layers), ["a", "b", JOINER], links)
        row = asyncio.run(join(course, tokens))
        return {"setting": f"{MBIT} Mbit/s, 80 ms" if slow else "the same network", **row}


async def join(course: Course, tokens: int) -> dict[str, Any]:
    """Trains the run, and starts the joiner while it is under way."""
    course.start("coordinator")
    await course.status()
    for site in ("a", "b"):
        course.start_site(site)
    await _until(course, lambda status: status["tokens"] >= tokens // 10)
    began, before = time.monotonic(), _versions(await course.status())
    at = time.time()
    course.start_site(JOINER)
    status = await _until(course, lambda status: reported_steps(status, JOINER) > 0)
    training, meanwhile = time.monotonic() - began, _versions(status) - before
    finished = await course.finish()
    parameters = sum(fragment["parameters"] for fragment in finished["fragments"])
    merged, staleness = _merged(course.state, len(finished["fragments"]))
    accepted = [when - at for site, when in _acceptances(course.state) if site == JOINER]
    return {
        "params": parameters,
        "link_seconds": 4 * parameters * 8 / (MBIT * 1e6),
        "training_after_seconds": training,
        "versions_meanwhile": meanwhile,
        "contributed_after_seconds": min(accepted) if accepted else None,
        "sent": len(accepted),
        "merged": merged,
        "staleness": staleness,
        "tokens": finished["tokens"],
        "eval_loss": finished["eval_loss"],
    }


async def _until(course: Course, true: Any) -> dict[str, Any]:
    while True:
        status = await course.status()
        if true(status) or status["state"] == "finished":
            return status
        course.fleet.check()
        await asyncio.sleep(0.1)


def _versions(status: dict[str, Any]) -> int:
    return sum(fragment["version"] for fragment in status["fragments"])


def _acceptances(state: Path) -> list[tuple[str, float]]:
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        return journal.acceptances()
    finally:
        journal.close()


def _merged(state: Path, fragments: int) -> tuple[int, float | None]:
    """How many contributions of the joiner were merged, and their mean staleness in versions."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        ages = []
        for p in range(fragments):
            for round_ in journal.rounds(p, after=0):
                for id_, _ in round_.members:
                    stored = journal.contribution(id_)
                    if stored is not None and stored.contribution.site == JOINER:
                        ages.append(round_.version - 1 - stored.contribution.base_version)
    finally:
        journal.close()
    return len(ages), sum(ages) / len(ages) if ages else None


def tables(tokens: int, width: int, layers: int) -> dict[str, dict[str, Any]]:
    """The run's config."""
    text = str(shakespeare(Path(tempfile.gettempdir()) / "isthmus-corpus"))
    return {
        "run": {"name": "joiner", "tokens": tokens, "min_sites": 2},
        "task": {"use": "byte-lm", "paths": text, "context": 64, "width": width, "layers": layers, "heads": 4},
        "inner": {"lr": 1e-3, "steps": 40, "batch_size": 4, "warmup_tokens": tokens // 8},
        "store": {"keep_rounds": 1_000_000},
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    tokens, width, layers = (150_000, 128, 4) if options.quick else (400_000, 256, 4)
    rows = [measure(tokens, width, layers, slow=slow) for slow in (False, True)]
    report("a joiner over a slow link", copy_bytes_per_second(), rows, options.json)


if __name__ == "__main__":
    main()
