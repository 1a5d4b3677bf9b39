"""Schedules from seeds, and what becomes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from coordinator.core.membership import LEASE_SECONDS
from lab.simulator.network import Weather
from lab.simulator.world import Fault, Schedule
from shared.config import RunConfig, parse

COUNTING = Path(__file__).with_name("model.py")
STEPS = 3
"""H"""
TOKENS_PER_STEP = 8
FOR_EVER = 1e6
"""Seconds: a run in which nobody is given up depends on nothing but its seed."""


def schedule_of(seed: int) -> Schedule:
    """A run and its faults, all from `seed`."""
    rng = random.Random(f"schedule {seed}")
    sites = tuple("abc"[: rng.choices((1, 2, 3), (2, 5, 1))[0]])
    config = _config(rng, len(sites), mapped=seed % 4 == 0)
    pace = {site: rng.choice((0.2, 0.5, 1.0, 2.0)) for site in sites}
    weather = {site: _weather(rng) for site in sites}
    length = 5 + 4 * STEPS * max(pace.values())
    faults = sorted((_fault(rng, sites, length) for _ in range(rng.randrange(1, 5))), key=lambda f: f.at)
    repeats = config.rounds.quorum == "all" and config.rounds.deadline_seconds == FOR_EVER
    changes = random.Random(f"changes {seed}")  # apart, so that the rest of a schedule does not depend on it
    if not repeats and changes.random() < 0.15:
        at, away, codec = changes.uniform(0, length), changes.uniform(0.5, 5.0), changes.randrange(60)
        faults = sorted([*faults, Fault(at, "other-codec", "coordinator", away, codec)], key=lambda f: f.at)
    if repeats:
        # A site whose own disk fails may forget what it sent.
        faults = [fault for fault in faults if fault.whom == "coordinator" or fault.kind not in ("full", "broken")]
    return Schedule(
        seed=seed,
        config=config,
        sites=sites,
        step_seconds=pace,
        weather=weather,
        faults=tuple(faults),
        repeats=repeats,
        lease_seconds=FOR_EVER if repeats else LEASE_SECONDS,
        checkpoint_seconds=rng.choice((4.0, 15.0, 1000.0)),
        in_parts=rng.random() < 0.2,
        leased=rng.random() < 0.2,
    )


def _config(rng: random.Random, sites: int, mapped: bool) -> RunConfig:
    fragments, cycles = rng.choices((1, 2), (7, 1))[0], rng.choices((1, 2, 3), (7, 3, 1))[0]
    quorum: str | int = rng.choice(("all", "all", 1, 1, min(2, sites)))
    overlap: str | int = rng.choice((0, 1, 2, "auto", "unbounded"))
    rounds: dict[str, Any] = {
        "fragments": fragments,
        "quorum": quorum,
        "overlap_steps": overlap,
        "align": "carry",
        "pacing": rng.choice(("equal-steps", "equal-time")),
        "max_staleness": rng.choice((2, 8)) if quorum != "all" else "auto",
    }
    if quorum != "all":
        rounds["grace_seconds"] = rng.choice(("auto", 0.0, 3.0))
    if quorum == "all" or rounds["grace_seconds"] != 0.0:
        rounds["deadline_seconds"] = rng.choice((20.0, 20.0, 20.0, 600.0))
    if quorum == "all" and isinstance(overlap, int) and rng.random() < 0.5:
        rounds |= {"deadline_seconds": FOR_EVER, "pacing": "equal-steps"}
    outer: dict[str, Any] = {"momentum": rng.choice((0.0, 0.5)), "partial": rng.choice(("share", "full"))}
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "simulated", "tokens": sites * cycles * STEPS * TOKENS_PER_STEP, "min_sites": sites},
        "task": {"use": f"{COUNTING}:Counting", "fragments": fragments},
        "inner": {"steps": STEPS, "batch_size": 1, "schedule": "constant"},
        "outer": outer,
        "rounds": rounds,
        "wire": {
            "upload": rng.choice(("fp32", "int8", "int4", "e3m0", "topk2")),
            "feedback_decay": 1.0,  # what fades could not be found again
            "publish": rng.choice(("fp32", "int8")),
            "zstd_level": rng.choice((0, 1)),
        },
        "store": {
            "checkpoint_versions": rng.choice((1, 16, 16)),
            "keep_versions": rng.choice((1, 32)),
            "resting": "mapped" if mapped else "memory",
        },
    }
    return parse(RunConfig, tables, "run.toml")


def _weather(rng: random.Random) -> Weather:
    if rng.random() < 0.4:
        return Weather()
    return Weather(
        latency=rng.choice((0.01, 0.1, 0.5)),
        rate=rng.choice((1e6, 1e3, 100.0)),
        lost=rng.choice((0.0, 0.05, 0.2)),
        unanswered=rng.choice((0.0, 0.05, 0.2)),
        held_up=rng.choice((0.0, 0.05)),
        repeated=rng.choice((0.0, 0.1)),
        garbled=rng.choice((0.0, 0.1)),
        damaged=rng.choice((0.0, 0.1)),
        starves_control=rng.random() < 0.5,
    )


def _fault(rng: random.Random, sites: tuple[str, ...], length: float) -> Fault:
    whom = rng.choice(("coordinator",) * len(sites) + sites)
    kinds = ["kill"] * 3 + ["kill-at-write"] * 3 + ["pause", "full", "broken", "slow", "clock"]
    kinds += ["kill-in-recovery"] if whom == "coordinator" else ["cut"] * 2
    kind = rng.choice(kinds)
    seconds = rng.choice((0.5, 0.5, 3.0, 3.0, 40.0)) * rng.uniform(0.5, 1.5)
    if kind == "clock":
        seconds = rng.choice((-1e6, -100.0, 100.0, 1e6))
    return Fault(rng.uniform(0, length), kind, whom, seconds, rng.randrange(1, 30))
