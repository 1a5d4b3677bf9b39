"""The shapes of failure that the field's own suites inject, each on whole runs of both cores in virtual time.

Where a failure is one of links, of disks or of processes, tests/e2e/test_outages.py (the coordinator down at join, at
upload, at publication), tests/coordinator/test_recovery.py (killed between any two writes),
tests/coordinator/api/test_uploads.py (full disks) and tests/e2e/test_processes.py (kill −9 under load) inject it for
real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.core.membership import Report
from coordinator.core.rounds import Contribution, Policy
from coordinator.core.run import CloseRound, Plan, Refusal, RunCore, SiteActive
from lab.virtual import VirtualRun, VirtualSite
from shared.protocol import Code
from site_agent.core.site import Settings, Snapshot

FULL = Policy(None, None, 60.0, max_staleness=8, weighting="tokens")
DECOUPLED = replace(FULL, quorum=1)
POLICIES = pytest.mark.parametrize("policy", [FULL, DECOUPLED], ids=["full", "decoupled"])


class Run(VirtualRun):
    """Remembers what was accepted and what was merged."""

    def __init__(self, sites: list[VirtualSite], policy: Policy, min_sites: int = 2) -> None:
        plan = Plan(policy, 2, 3000, 8, equal_time=True, min_sites=min_sites)
        everyone = policy.quorum is None
        super().__init__(RunCore(plan), sites, Settings("auto", plan.tokens, everyone))
        self.accepted: list[str] = []
        self.merged: list[str] = []

    def store(self, contribution: Contribution, sent: Any) -> None:
        self.accepted.append(contribution.id)

    def merge(self, close: CloseRound) -> None:
        self.merged += [contribution.id for contribution in close.contributions]

    def ends_with_everything_merged(self) -> None:
        self.run(limit=100_000)
        assert self.core.finished
        assert sorted(self.merged) == sorted(self.accepted), "each accepted contribution is merged, and once"


def two(**more: Any) -> list[VirtualSite]:
    return [VirtualSite("a", 1.0, 0.5, **more), VirtualSite("b", 2.0, 0.5)]


def at(run: VirtualRun, seconds: float, event: Callable[[], None]) -> None:
    run._at(seconds, event)


@POLICIES
def test_join_while_a_round_closes(policy: Policy) -> None:
    dry = Run(two(), policy)
    dry.run()
    # (Fragments close in turn: every third is one of each.)
    for when in [when for when, _ in dry.closed][5:15:3]:
        Run([*two(), VirtualSite("c", 1.5, 0.5, joins_at=when)], policy).ends_with_everything_merged()


@POLICIES
def test_leave_during_upload(policy: Policy) -> None:
    """The site is gone when its bytes are: they are refused, and the others go on without it."""

    class Leaving(Run):
        def _offer(self, site: VirtualSite, action: Snapshot, sent: Any) -> None:
            if site.name == "b" and site.sent == 5:
                self._carry_out(self.core.leave("b", "b", self.now))
                verdict = self.core.offer("b", "b", action.fragment, action.base_version, "late")
                assert isinstance(verdict, Refusal)
                assert verdict.code is Code.NOT_A_MEMBER
                site.dies_at = self.now
                return
            super()._offer(site, action, sent)

    run = Leaving(two(), policy)
    run.ends_with_everything_merged()
    assert run.sites[1].dies_at is not None, "it did leave"


@POLICIES
def test_commit_lost_after_it_was_accepted(policy: Policy) -> None:
    """The site asks again, much later: it is told the version that holds it, and nothing counts twice."""

    class Deaf(Run):
        def store(self, contribution: Contribution, sent: Any) -> None:
            super().store(contribution, sent)
            again = contribution, self.core.fragments[contribution.fragment].target
            at(self, self.now + 0.25, lambda: self.ask_again(*again))

        def ask_again(self, c: Contribution, version: int) -> None:
            verdict = self.core.offer(c.site, c.site, c.fragment, c.base_version, c.id)
            if self.core.last_base[c.site, c.fragment][1] == c.id and c.site in self.core.members.live:
                assert isinstance(verdict, int)
                assert verdict >= version
                self.asked += 1

        asked = 0

    run = Deaf(two(), policy)
    run.ends_with_everything_merged()
    assert run.asked > 20


def test_two_joins_with_one_name_and_split_brain() -> None:
    """The newer of two agents wins at once; whatever the older one says is refused by name, and it takes nothing
    along: not its membership, not its round."""
    core = RunCore(Plan(FULL, 1, 1000, 8, equal_time=True, min_sites=1))
    core.join("a", "old", 0.0)
    core.heartbeat("a", "old", Report("ready"), 0.0)
    core.accept(Contribution("1", "a", 0, 0, 10, 1), 1.0)
    core.join("a", "new", 2.0)
    for verdict in (
        core.heartbeat("a", "old", Report("training"), 2.0),
        core.offer("a", "old", 0, 1, "2"),
        core.leave("a", "old", 2.0),
    ):
        assert isinstance(verdict, Refusal)
        assert verdict.code is Code.SUPERSEDED
    assert not isinstance(core.heartbeat("a", "new", Report("ready"), 3.0), Refusal)
    assert core.offer("a", "new", 0, 0, "1") is not None, "and what the older one delivered is known"


def test_a_contribution_for_a_closed_round() -> None:
    """It is merged into the open one with its staleness, or refused past the bound."""
    core = RunCore(Plan(replace(DECOUPLED, grace_seconds=0.0), 1, 10**6, 8, equal_time=True, min_sites=2))
    for site in "ab":
        core.join(site, site, 0.0)
        core.heartbeat(site, site, Report("ready"), 0.0)
    for version in range(9):
        (close,) = core.accept(Contribution(str(version), "a", 0, version, 10, 1), 1.0)[1]
        assert isinstance(close, CloseRound)
        if version < 8:
            core.published(0, close.version, 10, 1.0)
    assert core.offer("b", "b", 0, 0, "late") is not None, "its base is 9 versions old"
    assert core.offer("b", "b", 0, 1, "late") is None
    held, _ = core.accept(Contribution("late", "b", 0, 1, 10, 1), 2.0)
    assert held == 10
    (close,) = core.published(0, 9, 10, 3.0)
    assert isinstance(close, CloseRound)
    assert [(c.site, close.version - 1 - c.base_version) for c in close.contributions] == [("b", 8)]


@POLICIES
def test_all_sites_gone_and_back(policy: Policy) -> None:
    """Every lease runs out; the sites join again, on the versions of then, and the run ends."""
    run = Run(two(), policy)
    gone: list[str] = []

    def partition() -> None:
        for site in run.sites:
            run.core.members.live[site.name].lease_until = run.now
        gone.extend(d.site for d in run.core.tick(run.now) if isinstance(d, SiteActive) and d.expired)
        for site in run.sites:
            run._carry_out(run.core.join(site.name, site.name, run.now))

    at(run, 100.0, partition)
    run.ends_with_everything_merged()
    assert gone == ["a", "b"]


@POLICIES
@pytest.mark.parametrize("jump", [-1e6, 45.0, 1e6])
def test_the_clock_jumps(policy: Policy, jump: float) -> None:
    """The coordinator's clock is monotonic, and a suspended machine's still jumps ahead: leases run out, the sites
    come back, nothing is lost. Backwards it only waits."""
    run = Run(two(), policy)

    def leap() -> None:
        run._carry_out(run.core.tick(run.now + jump))
        for site in run.sites:
            if site.name not in run.core.members.live:
                run._carry_out(run.core.join(site.name, site.name, run.now))

    at(run, 100.0, leap)
    run.ends_with_everything_merged()


@POLICIES
def test_one_site_ten_times_slower(policy: Policy) -> None:
    sites = [VirtualSite("a", 1.0, 0.5), VirtualSite("b", 1.0, 0.5), VirtualSite("slow", 10.0, 0.5)]
    run = Run(sites, policy, min_sites=3)
    run.ends_with_everything_merged()
    share = min(site.trained / (run.now - site.began) for site in sites[:2])
    if policy is DECOUPLED:
        assert share > 0.9, "the fast ones do not wait for it"
    assert any(contribution.startswith("slow") for contribution in run.merged)
