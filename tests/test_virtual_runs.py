"""Whole runs of the two pure cores against each other, in virtual time."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.rounds import Policy
from coordinator.core.run import Plan, RunCore
from site_agent.core.site import Settings
from tests.support.virtual import HEARTBEAT_SECONDS, VirtualRun, VirtualSite

BUDGET = 3000
DEADLINE = 600.0


def run_of(
    sites: list[VirtualSite],
    overlap: Literal["auto", "unbounded"] | int,
    fragments: int = 2,
    steps: int = 8,
    equal_time: bool = False,
    quorum: int | None = None,
) -> VirtualRun:
    policy = Policy(quorum, 0.0, DEADLINE, max_staleness=2, weighting="tokens")
    first = sum(site.joins_at == 0 for site in sites)
    plan = Plan(policy, fragments, BUDGET, steps, equal_time, min_sites=first)
    return VirtualRun(RunCore(plan), sites, Settings(overlap, BUDGET))


@given(
    speeds=st.lists(st.sampled_from([0.05, 0.1, 0.25, 1.0]), min_size=2, max_size=4),
    joins=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=3),
    links=st.lists(st.sampled_from([0.0, 0.04, 0.6]), min_size=4, max_size=4),
    overlap=st.one_of(st.integers(0, 10), st.sampled_from(["auto", "unbounded"])),
    fragments=st.integers(1, 4),
    steps=st.sampled_from([4, 8, 9]),
    equal_time=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_sites_that_join_at_any_time_never_wait_in_a_circle(
    speeds: list[float],
    joins: list[float],
    links: list[float],
    overlap: Literal["auto", "unbounded"] | int,
    fragments: int,
    steps: int,
    equal_time: bool,
) -> None:
    """Full quorum: every round is closed by all of its sites, and none by its deadline."""
    starts = [0.0, *joins, *joins][: len(speeds)]
    sites = [
        VirtualSite(f"s{n}", speed, link, start)
        for n, (speed, link, start) in enumerate(zip(speeds, links, starts, strict=False))
    ]
    run = run_of(sites, overlap, fragments, steps, equal_time)
    run.run(limit=100_000)
    assert {close.reason for close in run.closed} == {"complete"}


def test_two_sites_half_a_cycle_apart_lose_a_heartbeat_once_and_are_then_in_step() -> None:
    """The one that comes second is due for the other fragment first, and both may train 2 steps beyond a snapshot."""
    sites = [VirtualSite("a", 1.0, 0.0), VirtualSite("b", 1.0, 0.0, joins_at=4.0)]
    run = run_of(sites, overlap=2, steps=8)
    run.run(limit=10_000)
    shared = [close for close in run.closed if len(close.contributions) == 2]
    assert len(shared) > 5
    # Two extra steps at most stand between their phases once they have met.
    assert all(site.waited <= 2 * HEARTBEAT_SECONDS + 8 for site in sites)


@pytest.mark.parametrize("overlap", [0, 2, 4, 12])
def test_sites_in_step_never_contribute_early(overlap: int) -> None:
    """What a full-quorum run merges does not depend on how long messages took."""
    courses = []
    for links in ((0.0, 0.7), (0.7, 0.0), (0.1, 2.5)):
        sites = [VirtualSite("a", 0.5, links[0]), VirtualSite("b", 1.1, links[1])]
        run = run_of(sites, overlap, fragments=4, steps=8)
        run.run(limit=10_000)
        courses.append(
            sorted(
                (close.fragment, close.version, c.site, c.base_version, c.tokens, c.steps)
                for close in run.closed
                for c in close.contributions
            )
        )
    assert courses[0] == courses[1] == courses[2]
