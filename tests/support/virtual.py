"""Both pure cores in virtual time: a coordinator's decisions and its sites', with links between, and no tensors.

Every site trains at its own speed; what it sends and what it is sent takes its link's time; heartbeats come at
the agent's pace. Events happen in order of time, then in order of their making, so a course is repeatable.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.core.membership import Report
from coordinator.core.rounds import Contribution
from coordinator.core.run import CloseRound, Decision, Refusal, RunCore
from shared.protocol import Code
from site_agent.core.site import Align, Done, Settings, SiteCore, Snapshot, Step, Wait

HEARTBEAT_SECONDS = 2.0


@dataclass
class VirtualSite:
    """One site: seconds of an inner step and of one way over its link, and when it joins."""

    name: str
    step_seconds: float
    link_seconds: float
    joins_at: float = 0.0
    core: SiteCore | None = None
    waiting_since: float | None = None
    waited: float = 0.0
    done: bool = False
    sent: int = 0


class VirtualRun:
    """Runs until every site is done; `closed` holds every round that was closed."""

    def __init__(self, core: RunCore, sites: list[VirtualSite], settings: Settings, tokens_per_step: int = 10) -> None:
        self.core, self.sites, self.settings = core, sites, settings
        self._tokens_per_step = tokens_per_step
        self.now = 0.0
        self.closed: list[CloseRound] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._followers: list[tuple[VirtualSite, int, int]] = []
        for site in sites:
            self._at(site.joins_at, lambda site=site: self._join(site))  # type: ignore[misc]

    def run(self, limit: float) -> None:
        """Up to `limit` seconds of virtual time."""
        while self._events and not all(site.done for site in self.sites):
            self.now, _, event = heapq.heappop(self._events)
            if self.now > limit:
                raise AssertionError(f"not finished after {limit} s: {[(s.name, s.core) for s in self.sites]}")
            self._carry_out(self.core.tick(self.now))
            event()

    # -- the coordinator's side

    def _carry_out(self, decisions: list[Decision] | Refusal) -> None:
        assert not isinstance(decisions, Refusal), decisions
        for decision in decisions:
            if isinstance(decision, CloseRound):
                self.closed.append(decision)
                tokens = sum(contribution.tokens for contribution in decision.contributions)
                self._at(self.now, lambda d=decision, t=tokens: self._published(d, t))  # type: ignore[misc]

    def _published(self, close: CloseRound, tokens: int) -> None:
        self._carry_out(self.core.published(close.fragment, close.version, tokens, self.now))
        self._serve_followers()

    def _serve_followers(self) -> None:
        left = []
        for site, fragment, version in self._followers:
            state = self.core.fragments[fragment]
            if state.version >= version:
                self._send_version(site, fragment, state.version, state.tokens)
            else:
                left.append((site, fragment, version))
        self._followers = left

    def _send_version(self, site: VirtualSite, fragment: int, version: int, tokens: int, how: str = "align") -> None:
        def arrive() -> None:
            assert site.core is not None
            site.core.arrived(fragment, version, tokens, how)  # type: ignore[arg-type]
            self._resume(site)

        self._at(self.now + site.link_seconds, arrive)

    # -- a site's side

    def _join(self, site: VirtualSite) -> None:
        self._carry_out(self.core.join(site.name, site.name, self.now))
        self._heartbeat(site)

    def _heartbeat(self, site: VirtualSite) -> None:
        if site.done:
            return
        state = "training" if site.core is not None else "ready"
        report = Report(state, step_seconds=site.step_seconds)  # type: ignore[arg-type]
        self._carry_out(self.core.heartbeat(site.name, site.name, report, self.now))
        if site.core is None and self.core.started:
            versions = [(f.version, f.tokens) for f in self.core.fragments]
            pace = self.core.pace(site.name) or self.core.plan.steps
            site.core = SiteCore.begin(self.settings, versions, pace, len(self.core.members.live))
            self._at(self.now, lambda: self._act(site))
        elif site.core is not None:
            site.core.pace = self.core.pace(site.name) or site.core.pace
            site.core.run_finished = self.core.finished
            site.core.awaited = self.core.awaited(site.name)
            self._resume(site)
        self._at(self.now + (0.25 if site.core is None else HEARTBEAT_SECONDS), lambda: self._heartbeat(site))

    def _resume(self, site: VirtualSite) -> None:
        if site.waiting_since is not None:
            site.waited += self.now - site.waiting_since
            site.waiting_since = None
            self._act(site)

    def _act(self, site: VirtualSite) -> None:
        core = site.core
        assert core is not None
        while True:
            match core.next_action():
                case Step():
                    self._at(self.now + site.step_seconds, lambda: self._stepped(site))
                    return
                case Snapshot() as action:
                    core.snapshot_taken(action, self.now)
                    self._at(self.now + site.link_seconds, lambda a=action: self._offer(site, a))  # type: ignore[misc]
                case Align(fragment):
                    core.aligned(fragment)
                case Wait():
                    site.waiting_since = self.now
                    return
                case Done():
                    site.done = True
                    self._carry_out(self.core.leave(site.name, site.name, self.now))
                    return

    def _stepped(self, site: VirtualSite) -> None:
        assert site.core is not None
        site.core.stepped(self._tokens_per_step, site.step_seconds)
        self._act(site)

    def _offer(self, site: VirtualSite, action: Snapshot) -> None:
        assert site.core is not None
        p, state = action.fragment, self.core.fragments[action.fragment]
        site.sent += 1
        id_ = f"{site.name}-{site.sent}"
        verdict = self.core.offer(site.name, site.name, p, action.base_version, id_)
        if isinstance(verdict, Refusal):
            assert verdict.code in (Code.RUN_FINISHED, Code.TOO_STALE), verdict
            how = "overwrite" if verdict.code is Code.RUN_FINISHED else "rebase"
            self._send_version(site, p, state.version, state.tokens, how)
            return
        sent = Contribution(id_, site.name, p, action.base_version, action.tokens, action.steps)
        version, decisions = self.core.accept(sent, self.now)

        def accepted() -> None:
            assert site.core is not None
            site.core.accepted(p, version, self.now)

        self._at(self.now + site.link_seconds, accepted)
        self._followers.append((site, p, version))
        self._carry_out(decisions)
        self._serve_followers()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))
