"""Both pure cores in virtual time: a coordinator's decisions and its sites', with links between them.

The cores are the very objects that run in production; what is imagined is time. Every site trains at its own
speed, what it sends and is sent takes its link's time, heartbeats come at the agent's pace, and a site may die.
Events happen in order of time, then in order of their making, so a course can be repeated. What a step, a
contribution, a merge and an alignment *are* is left to a subclass: with none, only counts and times move, and
thousands of courses a minute can be tried; `lab.trained` puts real tensors in.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.core.membership import Report
from coordinator.core.rounds import Contribution
from coordinator.core.run import CloseRound, Decision, Refusal, RunCore
from shared.errors import FaultError
from shared.protocol import Code
from site_agent.core.alignment import How
from site_agent.core.site import Align, Done, Settings, SiteCore, Snapshot, Step, Wait

HEARTBEAT_SECONDS, READY_HEARTBEAT_SECONDS = 2.0, 0.25
"""As the agent's."""
MOOD_STEPS = 16
"""A mood lasts about so many inner steps."""


@dataclass
class VirtualSite:
    """One site: seconds of an inner step, of one way over its link, when it joins, and when it dies (if ever).
    `mood`: by how much its speed wanders, as the standard
    deviation of the logarithm of a step's time (0.2: most steps within a factor of 1.5 of each other).
    """

    name: str
    step_seconds: float
    link_seconds: float
    joins_at: float = 0.0
    dies_at: float | None = None
    mood: float = 0.0
    core: SiteCore | None = None
    waiting_since: float | None = None
    trained: float = 0.0
    waited: float = 0.0
    longest_wait: float = 0.0
    began: float = 0.0
    ended: float | None = None
    sent: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.name)
        self._wandered = self._random.gauss(0.0, 1.0)

    def next_step_seconds(self) -> float:
        """What the next inner step takes, as the site's mood is."""
        if self.mood == 0:
            return self.step_seconds
        keeps = 1 - 1 / MOOD_STEPS
        self._wandered = keeps * self._wandered + math.sqrt(1 - keeps**2) * self._random.gauss(0.0, 1.0)
        return self.step_seconds * math.exp(self.mood * self._wandered)

    @property
    def running(self) -> SiteCore:
        """The core of a site that has begun."""
        if self.core is None:
            raise ValueError(f"site {self.name} has not begun to train")
        return self.core

    def dead(self, now: float) -> bool:
        return self.dies_at is not None and now >= self.dies_at


@dataclass(frozen=True)
class _Orders:
    """What the coordinator answers to a heartbeat; see shared.protocol.Orders."""

    started: bool
    finished: bool
    pace: float | None
    peers: float | None
    tokens: int
    awaited: list[tuple[int, int]]
    closing: list[tuple[int, int]]


class VirtualRun:
    """`run` goes on until every living site is done. `closed` holds every round that was closed, with its time, and
    `refused` counts refusals by their code."""

    def __init__(self, core: RunCore, sites: list[VirtualSite], settings: Settings) -> None:
        self.core, self.sites, self.settings = core, sites, settings
        self.now = 0.0
        self.closed: list[tuple[float, CloseRound]] = []
        self.refused: Counter[Code] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: list[tuple[VirtualSite, int, int, How]] = []
        self._tick: float | None = None
        for site in sites:
            self._at(site.joins_at, _bound(self._join, site))

    def run(self, limit: float = float("inf")) -> None:
        """Raises FaultError where the run does not end within `limit` seconds of virtual time, or cannot go on."""
        while any(site.ended is None and not site.dead(self.now) for site in self.sites):
            if not self._events:
                raise FaultError(f"nothing happens any more after {self.now:g} s, and the run is not finished")
            self.now, _, event = heapq.heappop(self._events)
            if self.now > limit:
                raise FaultError(f"not finished after {limit:g} s")
            event()
            self._keep_time()

    # -- what a subclass puts in

    def step(self, site: VirtualSite) -> int:
        """One inner step; its tokens."""
        return 1

    def take(self, site: VirtualSite, action: Snapshot) -> Any:
        """A contribution as it is sent."""

    def store(self, contribution: Contribution, sent: Any) -> None:
        """The contribution was accepted."""

    def feed_back(self, site: VirtualSite, fragment: int, sent: Any) -> None:
        """The site learns that it was accepted."""

    def merge(self, close: CloseRound) -> None:
        """The round becomes a version."""

    def take_up(self, site: VirtualSite, fragment: int, how: How) -> None:
        """The site aligns with the version that has arrived."""

    def arrive(self, site: VirtualSite, fragment: int, version: int) -> None:
        """A version is at the site."""

    def begin(self, site: VirtualSite) -> None:
        """The site starts to train, from the versions that are out now."""

    # -- the coordinator's side

    def _keep_time(self) -> None:
        """What is due now is done now; a tick is set for what is due next."""
        self._carry_out(self.core.tick(self.now))
        due = self.core.next_wakeup()
        if due is not None and (self._tick is None or due < self._tick or self._tick <= self.now):
            self._tick = max(due, self.now)
            self._at(self._tick, lambda: None)

    def _carry_out(self, decisions: list[Decision] | Refusal) -> None:
        if isinstance(decisions, Refusal):
            raise FaultError(f"refused: {decisions.detail}")
        for decision in decisions:
            if isinstance(decision, CloseRound):
                self.closed.append((self.now, decision))
                self.merge(decision)
                self._at(self.now, _bound(self._published, decision))

    def _published(self, close: CloseRound) -> None:
        tokens = sum(contribution.tokens for contribution in close.contributions)
        self._carry_out(self.core.published(close.fragment, close.version, tokens, self.now))
        waiting, self._waiting = self._waiting, []
        for site, fragment, version, how in waiting:
            self._bring(site, fragment, version, how)

    def _bring(self, site: VirtualSite, fragment: int, version: int, how: How) -> None:
        """Sends `version` (or the newer one that is out) as soon as it is out."""
        state = self.core.fragments[fragment]
        if state.version < version:
            self._waiting.append((site, fragment, version, how))
            return
        newest, tokens = state.version, state.tokens
        self.arrive(site, fragment, newest)

        def arrived() -> None:
            if not site.dead(self.now):
                site.running.arrived(fragment, newest, tokens, how)
                self._resume(site)

        self._at(self.now + site.link_seconds, arrived)

    # -- a site's side

    def _join(self, site: VirtualSite) -> None:
        self._carry_out(self.core.join(site.name, site.name, self.now))
        self._heartbeat(site)

    def _heartbeat(self, site: VirtualSite) -> None:
        if site.ended is not None or site.dead(self.now):
            return
        core = site.core
        report = Report("ready", step_seconds=site.step_seconds)
        if core is not None:
            report = Report(
                "training",
                core.steps,
                core.tokens,
                core.tempo.step_seconds,
                core.overlap_seconds,
                core.tempo.sync_seconds,
            )
        self._at(self.now + site.link_seconds, _bound(self._heard, site, report))

    def _heard(self, site: VirtualSite, report: Report) -> None:
        """The report is at the coordinator; its orders are at the site another way later."""
        if site.ended is not None or site.dead(self.now):
            return
        name = site.name
        self._carry_out(self.core.heartbeat(name, name, report, self.now))
        core = self.core
        orders = _Orders(
            core.started,
            core.finished,
            core.pacer.pace(name),
            core.pacer.peers(name),
            core.tokens,
            core.awaited(name),
            core.closing(name),
        )
        self._at(self.now + site.link_seconds, _bound(self._obey, site, orders))

    def _obey(self, site: VirtualSite, orders: _Orders) -> None:
        if site.ended is not None or site.dead(self.now):
            return
        core = site.core
        if core is None and orders.started:
            self._start(site, orders)
        elif core is not None:
            core.pace = orders.pace or core.pace
            core.run_finished = orders.finished
            core.awaited, core.closing = orders.awaited, orders.closing
            core.told(orders.tokens, orders.peers)
            self._resume(site)
        often = site.core is None or self.core.plan.follow
        pause = READY_HEARTBEAT_SECONDS if often else HEARTBEAT_SECONDS
        self._at(self.now + pause, _bound(self._heartbeat, site))

    def _start(self, site: VirtualSite, orders: _Orders) -> None:
        versions = [(fragment.version, fragment.tokens) for fragment in self.core.fragments]
        pace = orders.pace or float(self.core.plan.steps)
        site.core = SiteCore.begin(self.settings, versions, pace, orders.peers or 1.0)
        site.core.tempo.stepped(site.step_seconds)
        site.core.told(orders.tokens, orders.peers)
        site.began = self.now
        self.begin(site)
        self._at(self.now, _bound(self._act, site))

    def _resume(self, site: VirtualSite) -> None:
        if site.waiting_since is not None:
            self._act(site)

    def _act(self, site: VirtualSite) -> None:
        core = site.running
        while not site.dead(self.now):
            action = core.next_action()
            if site.waiting_since is not None and not isinstance(action, Wait):
                # (News that change nothing, heartbeats' for one, end no wait.)
                wait = self.now - site.waiting_since
                site.waited, site.longest_wait = site.waited + wait, max(site.longest_wait, wait)
                site.waiting_since = None
            match action:
                case Step():
                    seconds = site.next_step_seconds()
                    self._at(self.now + seconds, _bound(self._stepped, site, seconds))
                    return
                case Snapshot():
                    core.snapshot_taken(action, self.now)
                    sent = self.take(site, action)
                    self._at(self.now + site.link_seconds, _bound(self._offer, site, action, sent))
                case Align(fragment, _, how):
                    self.take_up(site, fragment, how)
                    core.aligned(fragment)
                case Wait():
                    site.waiting_since = self.now if site.waiting_since is None else site.waiting_since
                    return
                case Done():
                    site.ended = self.now
                    self._carry_out(self.core.leave(site.name, site.name, self.now))
                    return

    def _stepped(self, site: VirtualSite, seconds: float) -> None:
        if site.dead(self.now):
            return
        site.trained += seconds
        site.running.stepped(self.step(site), seconds)
        self._act(site)

    def _offer(self, site: VirtualSite, action: Snapshot, sent: Any) -> None:
        if site.dead(self.now):
            return
        p, state = action.fragment, self.core.fragments[action.fragment]
        site.sent += 1
        id_ = f"{site.name}-{site.sent}"
        verdict = self.core.offer(site.name, site.name, p, action.base_version, id_)
        if isinstance(verdict, Refusal):
            self.refused[verdict.code] += 1
            if verdict.code not in (Code.RUN_FINISHED, Code.TOO_STALE):
                raise FaultError(f"site {site.name} was refused: {verdict.detail}")
            finished = verdict.code is Code.RUN_FINISHED
            self._bring(site, p, state.merging or state.version, "overwrite" if finished else "rebase")
            return
        claimed = Contribution(id_, site.name, p, action.base_version, action.tokens, action.steps)
        contribution = self.core.credible(claimed, self.now)
        self.store(contribution, sent)
        version, decisions = self.core.accept(contribution, self.now)

        def accepted() -> None:
            if not site.dead(self.now):
                self.feed_back(site, p, sent)
                site.running.accepted(p, version, self.now)

        self._at(self.now + site.link_seconds, accepted)
        self._bring(site, p, version, "align")
        self._carry_out(decisions)

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))


def _bound(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)
