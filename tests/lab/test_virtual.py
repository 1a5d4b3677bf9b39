"""Whole runs of the two pure cores against each other, in virtual time."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordinator.core.rounds import SPARED, Contribution, Policy
from coordinator.core.run import CloseRound, Plan, RunCore
from lab.virtual import HEARTBEAT_SECONDS, VirtualRun, VirtualSite
from shared.protocol import Code
from site_agent.core.site import Settings

BUDGET = 300
DEADLINE = 600.0


def run_of(
    sites: list[VirtualSite],
    overlap: Literal["auto", "unbounded"] | int,
    fragments: int = 2,
    steps: int = 8,
    equal_time: bool = False,
    quorum: int | None = None,
    sharded: bool = False,
) -> VirtualRun:
    """`sharded`: the core names rounds as several coordinators would, each for its own."""
    policy = Policy(quorum, 0.0, DEADLINE, max_staleness=2, weighting="tokens")
    first = sum(site.joins_at == 0 for site in sites)
    plan = Plan(policy, fragments, BUDGET, steps, equal_time, min_sites=first, alone=not sharded)
    return VirtualRun(RunCore(plan), sites, Settings(overlap, BUDGET, sharded=sharded))


@given(
    speeds=st.lists(st.sampled_from([0.05, 0.1, 0.25, 1.0]), min_size=2, max_size=4),
    joins=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=3),
    links=st.lists(st.sampled_from([0.0, 0.04, 0.6]), min_size=4, max_size=4),
    overlap=st.one_of(st.integers(0, 10), st.sampled_from(["auto", "unbounded"])),
    fragments=st.integers(1, 4),
    steps=st.sampled_from([4, 8, 9]),
    equal_time=st.booleans(),
    sharded=st.booleans(),
)
@example(
    [0.05, 0.05, 0.25], [4.0], [0.6, 0.6, 0.0, 0.0], 0, 3, 4, True, False
)  # the one waited for had given all it had
@settings(max_examples=50)
def test_sites_that_join_at_any_time_never_wait_in_a_circle(
    speeds: list[float],
    joins: list[float],
    links: list[float],
    overlap: Literal["auto", "unbounded"] | int,
    fragments: int,
    steps: int,
    equal_time: bool,
    sharded: bool,
) -> None:
    """Full quorum: every round is closed by all of its sites, and none by its deadline."""
    starts = [0.0, *joins, *joins][: len(speeds)]
    sites = [
        VirtualSite(f"s{n}", speed, link, start)
        for n, (speed, link, start) in enumerate(zip(speeds, links, starts, strict=False))
    ]
    run = run_of(sites, overlap, fragments, steps, equal_time, sharded=sharded)
    run.run(limit=100_000)
    assert {close.reason for _, close in run.closed} == {"complete"}


def test_two_sites_half_a_cycle_apart_lose_a_heartbeat_once_and_are_then_in_step() -> None:
    """The one that comes second is due for the other fragment first, and both may train 2 steps beyond a snapshot."""
    sites = [VirtualSite("a", 1.0, 0.0), VirtualSite("b", 1.0, 0.0, joins_at=4.0)]
    run = run_of(sites, overlap=2, steps=8)
    run.run(limit=10_000)
    shared = [close for _, close in run.closed if len(close.contributions) == 2]
    assert len(shared) > 5
    # Two extra steps at most stand between their phases once they have met.
    assert all(site.waited <= 2 * HEARTBEAT_SECONDS + 8 for site in sites)


def test_a_wait_is_as_long_as_it_is_whatever_is_heard_meanwhile() -> None:
    """Heartbeats come every ten seconds; a full quorum at equal steps waits 8 - 4 steps of 10 s for the slow site."""
    sites = [VirtualSite("a", 10.0, 0.0), VirtualSite("b", 20.0, 0.0)]
    run = run_of(sites, overlap=0, fragments=1, steps=8)
    run.run(limit=10_000)
    assert sites[0].longest_wait == 80.0


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("overlap", [0, 2, 4, 12])
def test_sites_in_step_never_contribute_early(overlap: int, sharded: bool) -> None:
    """What a full-quorum run merges does not depend on how long messages took."""
    courses = []
    for links in ((0.0, 0.7), (0.7, 0.0), (0.1, 2.5)):
        sites = [VirtualSite("a", 0.5, links[0]), VirtualSite("b", 1.1, links[1])]
        run = run_of(sites, overlap, fragments=4, steps=8, sharded=sharded)
        run.run(limit=10_000)
        courses.append(
            sorted(
                (close.fragment, close.version, c.site, c.base_version, c.tokens, c.steps)
                for _, close in run.closed
                for c in close.contributions
            )
        )
    assert courses[0] == courses[1] == courses[2]


# ---- nobody waits


class Watched(VirtualRun):
    """Remembers how long each round went on collecting after its first contribution."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first: dict[int, float] = {}
        self.collected: list[tuple[float, float]] = []

    def store(self, contribution: Contribution, sent: Any) -> None:
        self.first.setdefault(contribution.fragment, self.now)

    def merge(self, close: CloseRound) -> None:
        self.collected.append((self.now, self.now - self.first.pop(close.fragment)))


def decoupled(
    sites: list[VirtualSite], grace: float | None = None, equal_time: bool = True, tokens: int = 2000, **plan: Any
) -> Watched:
    policy = Policy(1, grace, DEADLINE, max_staleness=None, weighting="tokens")
    core = RunCore(Plan(policy, 4, tokens, 32, equal_time, min_sites=len(sites), **plan))
    return Watched(core, sites, Settings("auto", core.plan.tokens, everyone=False))


def test_with_one_of_four_sites_dead_nothing_stalls_for_longer_than_the_grace_window() -> None:
    sites = [VirtualSite(f"s{n}", step, 4.0) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
    sites[1].dies_at = 400.0
    run = decoupled(sites)
    run.run(limit=10_000)
    living = [site for site in sites if site.dies_at is None]
    window = SPARED * max(site.running.overlap_seconds - site.running.tempo.sync_seconds for site in living)
    after = [(seconds, close) for (at, seconds), (_, close) in zip(run.collected, run.closed, strict=True) if at > 400]
    assert len(after) > 50
    assert all(seconds <= window for seconds, _ in after)
    assert max(site.longest_wait for site in living) <= window
    assert statistics.mean(len(close.contributions) for _, close in after) > 2, "the window is there to be used"


def test_pure_async_waits_for_nobody() -> None:
    sites = [VirtualSite(f"s{n}", step, 4.0) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
    run = decoupled(sites, grace=0.0)
    run.run(limit=10_000)
    assert {seconds for _, seconds in run.collected} == {0.0}
    assert all(close.share < 1 for at, close in run.closed if at > 200 and len(close.contributions) == 1)


@pytest.mark.parametrize(("grace", "equal_time"), [(0.0, True), (None, True), (0.0, False)])
def test_many_sites_of_very_different_speed_are_never_too_stale(grace: float | None, equal_time: bool) -> None:
    """A cycle of two dozen sites has two dozen versions where each arrival is a round."""
    sites = [VirtualSite(f"s{n:02}", (1.0, 1.5, 2.0, 8.0)[n % 4], 1.0 + n % 5, mood=0.2) for n in range(24)]
    run = decoupled(sites, grace, equal_time, tokens=4000)
    run.run(limit=100_000)
    assert run.refused.keys() <= {Code.RUN_FINISHED}
    staleness = [close.version - 1 - c.base_version for _, close in run.closed for c in close.contributions]
    assert max(staleness) > 8, "which is a cycle of everybody where rounds wait for them"


@pytest.mark.parametrize(("steps", "equal_time"), [((1.0, 20.0), False), ((1.0, 1.0, 100.0), True)])
def test_a_slow_site_is_never_too_stale(steps: tuple[float, ...], equal_time: bool) -> None:
    """At equal steps the fast one has twenty cycles in one of the slow one; in equal time nobody takes less than a step
    a cycle, however slow."""
    sites = [VirtualSite(f"s{n}", each, 1.0) for n, each in enumerate(steps)]
    run = decoupled(sites, equal_time=equal_time, tokens=8000)
    run.run(limit=100_000)
    assert run.refused.keys() <= {Code.RUN_FINISHED}
    slowest = sites[-1]
    merged = sum(c.steps for _, close in run.closed for c in close.contributions if c.site == slowest.name) / 4
    assert merged > 0.8 * slowest.running.steps > 0


def test_one_site_that_is_far_faster_than_the_others_is_not_cut_short() -> None:
    """What it claims is measured by what it can be believed to be, and not by the others."""
    sites = [VirtualSite(f"s{n}", step, 1.0) for n, step in enumerate((1.0, 70.0, 70.0))]
    run = decoupled(sites, tokens=3000, batch_size=1, sequence_tokens=1)
    run.run(limit=4000.0)
    assert run.core.tokens >= 3000


def test_paced_sites_arrive_together_and_a_grace_window_merges_them() -> None:
    sites = [VirtualSite(f"s{n}", step, 4.0) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
    run = decoupled(sites)
    run.run(limit=10_000)
    late = [len(close.contributions) for at, close in run.closed if at > 200]
    assert sum(late) / len(late) > 3
    assert all(site.trained / (run.now - site.began) > 0.9 for site in sites)
    assert max(site.longest_wait for site in sites) == 0


def test_sites_whose_speed_wanders_hardly_wait_and_still_meet() -> None:
    """Where every round waits for everyone they lose a tenth of their time."""
    shares = {}
    for quorum in (1, None):
        sites = [VirtualSite(f"s{n}", step, 4.0, mood=0.2) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
        policy = Policy(quorum, None, DEADLINE, max_staleness=8, weighting="tokens")
        core = RunCore(Plan(policy, 4, 10_000, 32, True, min_sites=4))
        run = VirtualRun(core, sites, Settings("auto", 10_000, everyone=quorum is None))
        run.run(limit=100_000)
        shares[quorum] = min(site.trained / (run.now - site.began) for site in sites)
        if quorum == 1:
            assert statistics.mean(len(close.contributions) for _, close in run.closed) > 2
    assert shares[1] > 0.97
    assert shares[None] < 0.95


def test_sites_that_follow_meet_more_often_and_wait_no_longer() -> None:
    runs = {}
    for follow in (False, True):
        sites = [VirtualSite(f"s{n}", step, 4.0, mood=0.3) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
        runs[follow] = decoupled(sites, grace=10.0, tokens=4000, follow=follow)
        runs[follow].run(limit=100_000)
    met = {follow: [len(close.contributions) for _, close in run.closed] for follow, run in runs.items()}
    assert statistics.mean(met[True]) > statistics.mean(met[False]) + 0.2
    assert runs[True].now < 1.01 * runs[False].now
    steps = {
        follow: {c.steps for _, r in run.closed for c in r.contributions if c.site == "s0"}
        for follow, run in runs.items()
    }
    assert steps[False] == {8, 16, 24, 32}, "its first cycle, which fragments share, and whole ones"
    assert steps[True] - steps[False], "with the steps that it had"


def test_a_site_that_joins_late_is_at_the_right_point_of_the_schedule() -> None:
    sites = [VirtualSite("a", 1.0, 1.0), VirtualSite("late", 1.0, 1.0, joins_at=500.0)]
    policy = Policy(1, None, DEADLINE, max_staleness=8, weighting="tokens")
    run = Watched(RunCore(Plan(policy, 4, 2000, 32, True, min_sites=1)), sites, Settings("auto", 2000, everyone=False))
    seen: list[tuple[float, float]] = []

    def step(site: VirtualSite) -> int:
        if site.name == "late":
            seen.append((site.running.furthest, float(run.core.tokens)))
        return 1

    run.step = step  # type: ignore[method-assign]
    run.run(limit=10_000)
    first_furthest, first_merged = seen[0]
    assert first_merged > 400
    assert first_furthest == pytest.approx(first_merged, rel=0.1)
    assert seen[-1][0] == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("grace", [None, 0.0])
def test_where_nobody_waits_every_site_knows_what_the_run_has_trained(grace: float | None) -> None:
    """Merged and not yet merged, to a part of a cycle: 30 tokens here, of a budget of 2000."""
    sites = [VirtualSite(f"s{n}", step, 4.0) for n, step in enumerate((1.0, 2.0, 4.0, 8.0))]
    run = decoupled(sites, grace=grace)
    trained, off = 0, []

    def step(site: VirtualSite) -> int:
        nonlocal trained
        if trained < 1900:  # (at the end what is on its way is beyond the budget)
            off.append(site.running.furthest - trained)
        trained += 1
        return 1

    run.step = step  # type: ignore[method-assign]
    run.run(limit=10_000)
    assert abs(statistics.mean(off)) < 6
    assert max(map(abs, off)) < 30


def test_follow_takes_a_slow_site_into_rounds_that_would_close_without_it() -> None:
    """The slow site is half a cycle out of step, and the window is short: it follows with the steps that it has."""
    merged = {}
    for follow in (False, True):
        sites = [VirtualSite("fast", 1.0, 1.0), VirtualSite("slow", 4.0, 1.0, joins_at=19.0)]
        run = decoupled(sites, grace=6.0, follow=follow, tokens=1500)
        run.core.plan = replace(run.core.plan, min_sites=1)
        run.run(limit=10_000)
        merged[follow] = sum(len(close.contributions) == 2 for _, close in run.closed) / len(run.closed)
    assert merged[True] > merged[False]
