"""RunCore under any schedule: sites that come, go, lie and die, restarts, and merges that take their time."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.core.membership import Report
from coordinator.core.rounds import Contribution, Policy
from coordinator.core.run import CloseRound, Decision, FinishRun, Plan, Refusal, RunCore, SiteActive, StartRun

SITES = ("asia", "eu", "us")
FRAGMENTS = 2
sites, fragments = st.sampled_from(SITES), st.integers(0, FRAGMENTS - 1)


class Schedule(RuleBasedStateMachine):
    """Drives the core as the daemon does, and keeps by itself what the journal would hold."""

    @initialize(
        quorum=st.sampled_from([None, 1, 2]),
        grace=st.sampled_from([None, 0.0, 7.0]),
        min_sites=st.integers(1, 2),
        tokens=st.sampled_from([25, 10**6]),
    )
    def begin(self, quorum: int | None, grace: float | None, min_sites: int, tokens: int) -> None:
        policy = Policy(quorum, grace, deadline_seconds=50.0, max_staleness=2, weighting="tokens")
        self.plan = Plan(policy, FRAGMENTS, tokens, steps=10, equal_time=True, min_sites=min_sites)
        self.core = RunCore(self.plan)
        self.now, self.count = 0.0, 0
        self.sessions: dict[str, str] = {}
        self.accepted: dict[str, Contribution] = {}
        self.merged: set[str] = set()
        self.merging: list[CloseRound] = []
        self.closed, self.published, self.merged_tokens = [0] * FRAGMENTS, [0] * FRAGMENTS, [0] * FRAGMENTS
        self.active: dict[str, str] = {}
        self.roster: set[str] = set()
        self.started = self.finished = False

    def carry_out(self, decisions: list[Decision] | Refusal) -> None:
        assert not isinstance(decisions, Refusal)
        for decision in decisions:
            match decision:
                case StartRun(sites):
                    assert not self.started, "a run starts once"
                    assert len(sites) >= self.plan.min_sites
                    self.started = True
                    self.active.update({site: self.sessions[site] for site in sites})
                case FinishRun():
                    assert not self.finished, "a run finishes once"
                    self.finished = True
                case SiteActive(site, True):
                    self.active[site] = self.sessions[site]
                case SiteActive(site, False):
                    self.active.pop(site, None)
                case CloseRound():
                    self.check_round(decision)
                    self.merging.append(decision)

    def check_round(self, close: CloseRound) -> None:
        assert self.started
        assert all(other.fragment != close.fragment for other in self.merging), "one merge of a fragment at a time"
        assert close.version == self.closed[close.fragment] + 1
        self.closed[close.fragment] = close.version
        ids = [contribution.id for contribution in close.contributions]
        assert ids, "no round is empty"
        assert not self.merged & set(ids), "no contribution is in two rounds"
        assert len(ids) == len(set(ids))
        self.merged.update(ids)
        order = [(contribution.site, contribution.base_version) for contribution in close.contributions]
        assert order == sorted(order)
        assert math.isclose(math.fsum(close.weights), 1.0)
        assert len(close.weights) == len(ids)
        assert {contribution.fragment for contribution in close.contributions} == {close.fragment}
        if self.plan.policy.quorum is not None:
            assert len({site for site, _ in order}) >= self.plan.policy.quorum

    def step(self, seconds: float) -> None:
        self.now += seconds

    # -- what may happen

    @rule(site=sites)
    def join(self, site: str) -> None:
        self.count += 1
        self.sessions[site] = f"{site}-{self.count}"
        self.roster.add(site)
        if site in self.active:
            self.active[site] = self.sessions[site]  # as the journal's row of it has it
        self.carry_out(self.core.join(site, self.sessions[site], self.now))

    @rule(site=sites, ready=st.booleans(), sync=st.sampled_from([0.0, 1.0]))
    def heartbeat(self, site: str, ready: bool, sync: float) -> None:
        """As an honest agent does it: it trains once it has been told that the run has started."""
        state = "training" if self.started and ready else "ready" if ready else "preparing"
        report = Report(state, step_seconds=0.1, overlap_seconds=9.0, sync_seconds=sync)
        answer = self.core.heartbeat(site, self.sessions.get(site, ""), report, self.now)
        assert isinstance(answer, Refusal) == (site not in self.core.members.live)
        if not isinstance(answer, Refusal):
            self.carry_out(answer)

    @rule(site=sites)
    def leave(self, site: str) -> None:
        answer = self.core.leave(site, self.sessions.get(site, ""), self.now)
        if not isinstance(answer, Refusal):
            self.carry_out(answer)
            assert site not in self.core.members.live

    @rule(site=sites, fragment=fragments, behind=st.integers(-1, 3))
    def contribute(self, site: str, fragment: int, behind: int) -> None:
        base = max(0, self.published[fragment] - behind)
        self.count += 1
        sent = Contribution(f"c{self.count}", site, fragment, base, tokens=10, steps=1)
        verdict = self.core.offer(site, self.sessions.get(site, ""), fragment, base, sent.id)
        if verdict is not None:
            assert isinstance(verdict, Refusal)
            return
        earlier = [c for c in self.accepted.values() if (c.site, c.fragment) == (site, fragment)]
        assert all(base > c.base_version for c in earlier), "one contribution from each base"
        assert base <= self.published[fragment]
        self.accepted[sent.id] = sent
        target, decisions = self.core.accept(sent, self.now)
        assert target == self.closed[fragment] + 1
        self.carry_out(decisions)
        assert self.core.offer(site, self.sessions[site], fragment, base, sent.id) == target

    @precondition(lambda self: self.merging)
    @rule(which=st.integers(0, FRAGMENTS - 1))
    def publish(self, which: int) -> None:
        close = self.merging.pop(which % len(self.merging))
        self.published[close.fragment] = close.version
        tokens = sum(contribution.tokens for contribution in close.contributions)
        self.merged_tokens[close.fragment] += tokens
        self.carry_out(self.core.published(close.fragment, close.version, tokens, self.now))

    @rule(seconds=st.sampled_from([0.5, 3.0, 29.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.step(seconds)
        self.carry_out(self.core.tick(self.now))

    @rule()
    def wake_up(self) -> None:
        """Ticking at `next_wakeup` makes progress: a decision, or a later wake-up. The daemon never spins or stalls."""
        wakeup = self.core.next_wakeup()
        if wakeup is None:
            return
        self.now = max(self.now, wakeup)
        decisions = self.core.tick(self.now)
        self.carry_out(decisions)
        later = self.core.next_wakeup()
        assert decisions or later is None or later > wakeup

    @rule()
    def restart(self) -> None:
        """A new core from what the journal holds; recovery publishes what was closed."""
        while self.merging:
            close = self.merging.pop(0)
            self.published[close.fragment] = close.version
            self.merged_tokens[close.fragment] += sum(contribution.tokens for contribution in close.contributions)
        self.core = RunCore(self.plan)
        decisions = self.core.restore(
            list(zip(self.published, self.merged_tokens, strict=True)),
            [(contribution, contribution.id in self.merged) for contribution in self.accepted.values()],
            self.roster,
            list(self.active.items()),
            self.started,
            -1,
            self.now,
        )
        self.finished = self.core.finished
        self.carry_out(decisions)

    # -- what always holds

    @invariant()
    def no_accepted_contribution_is_lost(self) -> None:
        waiting = {id_ for state in self.core.fragments for id_ in state.open.contributions}
        assert waiting | self.merged == set(self.accepted)
        assert not waiting & self.merged

    @invariant()
    def versions_are_what_was_published(self) -> None:
        assert [state.version for state in self.core.fragments] == self.published
        assert [state.tokens for state in self.core.fragments] == self.merged_tokens
        assert self.core.finished == all(tokens >= self.plan.tokens for tokens in self.merged_tokens)

    @invariant()
    def the_live_sites_that_train_are_the_active_ones(self) -> None:
        assert {member.site for member in self.core.members.in_state("training")} == set(self.active)

    @invariant()
    def a_round_that_can_close_has_a_time_to_wake_up(self) -> None:
        for p, state in enumerate(self.core.fragments):
            enough = len(state.open.sites) >= (self.plan.policy.quorum or 1)
            if enough and state.merging is None and not self.core.complete(p):
                assert self.core.next_wakeup() is not None

    def teardown(self) -> None:
        """Left alone, the run comes to rest, and then no round with enough contributions is open."""
        if not hasattr(self, "core"):
            return
        for _ in range(100):
            while self.merging:
                self.publish(0)
            if self.core.next_wakeup() is None:
                break
            self.wake_up()
        else:
            raise AssertionError("the core does not come to rest")
        for p, state in enumerate(self.core.fragments):
            assert self.core.complete(p) or len(state.open.sites) < (self.plan.policy.quorum or 1)


Schedule.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestAnySchedule = Schedule.TestCase
