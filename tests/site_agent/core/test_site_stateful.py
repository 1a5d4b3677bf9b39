"""News in any order never deadlock a site whose versions arrive in the end, and never break its rules."""

from __future__ import annotations

from typing import Literal

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from site_agent.core.site import Align, Done, Settings, SiteCore, Snapshot, Step, Wait

TOKENS, BUDGET = 10, 10_000


class RandomNews(RuleBasedStateMachine):
    """A coordinator that answers each contribution when and how the test likes."""

    @initialize(
        overlap=st.sampled_from([0, 1, 2, 5, "auto", "unbounded"]),
        fragments=st.integers(1, 5),
        pace=st.sampled_from([0.5, 1.0, 2.5, 3.75, 6.0]),
    )
    def start(self, overlap: Literal["auto", "unbounded"] | int, fragments: int, pace: float) -> None:
        self.core = SiteCore.begin(Settings(overlap, BUDGET), [(0, 0)] * fragments, pace, peers=2)
        self.overlap, self.now = overlap, 0.0
        self.sent: dict[int, Snapshot] = {}
        self.sent_at: dict[int, int] = {}
        self.acknowledged: set[int] = set()
        self.delivered = [0] * fragments
        """tokens of this site that were accepted, by fragment"""
        self.versions = [0] * fragments
        self.furthest = 0.0

    def decide(self) -> object:
        """One decision, carried out, with every rule that must hold for it."""
        action = self.core.next_action()
        match action:
            case Step():
                self.core.stepped(TOKENS, 1.0)
                self.now += 1
            case Snapshot(p, base, tokens, steps):
                assert p not in self.sent, "two contributions of one fragment on their way"
                assert not self.core.fragments[p].complete
                assert base == self.versions[p]
                assert tokens == self.core.tokens - self.delivered[p], "tokens lost or counted twice"
                assert steps * TOKENS == tokens
                self.core.snapshot_taken(action, self.now)
                self.sent[p], self.sent_at[p] = action, self.core.steps
            case Align(p, version, _how):
                assert p in self.sent
                if isinstance(self.overlap, int) and p not in self.core.due:
                    assert self.core.steps == self.sent_at[p] + self.overlap
                self.core.aligned(p)
                assert self.core.fragments[p].version == version
                del self.sent[p], self.sent_at[p]
                self.acknowledged.discard(p)
                self.versions[p] = version
            case Wait(p):
                assert p in self.sent, "waits for what nobody will send"
                assert self.core.fragments[p].arrived is None
                if self.overlap == "unbounded":
                    assert self.core.due[0] == p
            case Done():
                assert all(view.complete for view in self.core.fragments)
        return action

    @rule(times=st.integers(1, 6))
    def go_on(self, times: int) -> None:
        for _ in range(times):
            self.decide()

    def open(self, data: st.DataObject, acknowledged: bool) -> int:
        """A fragment whose contribution the coordinator has yet to answer."""
        waiting = sorted(
            p for p in self.sent if self.core.fragments[p].arrived is None and (p in self.acknowledged) == acknowledged
        )
        assume(waiting)
        return data.draw(st.sampled_from(waiting))

    def accept(self, p: int) -> None:
        self.core.accepted(p, self.versions[p] + 1, self.now)
        self.acknowledged.add(p)
        self.delivered[p] += self.sent[p].tokens

    def publish(self, p: int, skipped: int = 0) -> None:
        version = self.versions[p] + 1 + skipped
        self.core.arrived(p, version, version * 7 * TOKENS, "align")

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data())
    def coordinator_accepts(self, data: st.DataObject) -> None:
        self.accept(self.open(data, acknowledged=False))

    @precondition(lambda self: bool(self.acknowledged))
    @rule(data=st.data(), skipped=st.integers(0, 3))
    def version_arrives(self, data: st.DataObject, skipped: int) -> None:
        self.publish(self.open(data, acknowledged=True), skipped)

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data(), newer=st.integers(1, 9))
    def coordinator_refuses(self, data: st.DataObject, newer: int) -> None:
        p = self.open(data, acknowledged=False)
        version = self.versions[p] + newer
        self.core.arrived(p, version, version * 7 * TOKENS, "rebase")

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data())
    def fragment_is_finished(self, data: st.DataObject) -> None:
        assume(data.draw(st.integers(0, 9)) == 0)
        p = self.open(data, acknowledged=False)
        self.core.arrived(p, self.versions[p] + 1, self.core.settings.budget, "overwrite")

    @rule(pace=st.sampled_from([1.0, 1.75, 4.0, 9.0]))
    def coordinator_changes_the_pace(self, pace: float) -> None:
        self.core.pace = pace

    @invariant()
    def budget_clock_never_falls(self) -> None:
        if hasattr(self, "core"):
            assert self.core.furthest >= self.furthest
            self.furthest = self.core.furthest

    def teardown(self) -> None:
        """Every contribution is answered now: then the site goes on training, through two more cycles and on."""
        if not hasattr(self, "core"):
            return
        goal, decisions = self.core.steps + 20, 0
        while self.core.steps < goal:
            action = self.decide()
            decisions += 1
            assert decisions < 2000, "goes round without training"
            if isinstance(action, Done):
                return
            if isinstance(action, Wait):
                p = action.fragment
                if p not in self.acknowledged:
                    self.accept(p)
                self.publish(p)


TestRandomNews = RandomNews.TestCase
TestRandomNews.settings = settings(max_examples=50, stateful_step_count=40)
