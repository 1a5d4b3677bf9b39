"""A site's decisions: step, take a snapshot, align, wait, or be done.

The agent asks `next_action` at every step boundary, does what it says, and reports back; news from the
network come in as events between steps. Versions, counts and times only: tensors are the agent's business.
A fragment has at most one contribution on its way, so a site waits in exactly two cases: τ steps have
passed since a snapshot whose version is late, or the fragment is due again before it. A site that waits
contributes early to the rounds that wait for it in turn.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from shared.config import RunConfig
from site_agent.core.alignment import How
from site_agent.core.budget import Progress
from site_agent.core.schedule import Cycle, next_cycle
from site_agent.core.tempo import Tempo


@dataclass(frozen=True)
class Step:
    """Train one inner step."""


@dataclass(frozen=True)
class Snapshot:
    """Take the fragment's pseudo-gradient and send it."""

    fragment: int
    base_version: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Align:
    """Take up the arrived version of the fragment."""

    fragment: int
    version: int
    how: How


@dataclass(frozen=True)
class Wait:
    """Nothing to do until news of this fragment come in."""

    fragment: int


@dataclass(frozen=True)
class Done:
    """Every fragment has merged the budget."""


UNDELIVERED = 2.0
"""Cycles: a site that gets on has less under way than one that has just been snapshot, and one that is on its way."""

Action = Step | Snapshot | Align | Wait | Done


@dataclass
class InFlight:
    """A contribution on its way: local counts at its snapshot, and the version that will hold it, once known.
    `followed`: it was not due yet, and went to join a round that was about to close."""

    base_version: int
    step: int
    local_tokens: int
    tokens: int
    steps: int
    taken_at: float
    holding: int | None = None
    followed: bool = False


@dataclass
class Arrived:
    """A version that is here and not yet aligned with."""

    version: int
    tokens: int
    how: How


@dataclass
class FragmentView:
    """A fragment at this site. `counted_*`: local steps and tokens that accepted contributions have covered."""

    version: int
    progress: Progress
    counted_tokens: int = 0
    counted_steps: int = 0
    in_flight: InFlight | None = None
    arrived: Arrived | None = None
    complete: bool = False


@dataclass(frozen=True)
class Settings:
    """`overlap` is τ as configured; `budget` the run's tokens; `everyone`: rounds wait for all sites, so the course of
    the run must not depend on when messages arrive."""

    overlap: Literal["auto", "unbounded"] | int
    budget: int
    everyone: bool = True
    outage_steps: int = 0
    """How many steps after a snapshot to go on training while the coordinator cannot be reached. A run that waits for
    everyone does not: its course must not depend on outages."""
    sharded: bool = False
    """The run has several coordinators."""

    @classmethod
    def of(cls, config: RunConfig, outage_steps: int = 0) -> Settings:
        everyone, sharded = config.rounds.quorum == "all", len(config.run.coordinators) > 1
        return cls(config.rounds.overlap_steps, config.run.tokens, everyone, outage_steps, sharded)


@dataclass
class SiteCore:
    """The state of one site; see the module's docstring."""

    settings: Settings
    fragments: list[FragmentView]
    cycle: Cycle
    pace: float
    tempo: Tempo = field(default_factory=Tempo)
    steps: int = 0
    tokens: int = 0
    due: list[int] = field(default_factory=list)
    furthest: float = 0.0
    run_finished: bool = False
    awaited: list[tuple[int, int]] = field(default_factory=list)
    """(fragment, version) of rounds that lack this site's contribution while it waits; see coordinator.core.run, and
    `_comes_before`."""
    closing: list[tuple[int, int]] = field(default_factory=list)
    """(fragment, version) of rounds that are about to close without this site."""
    reported: int | None = None
    """The run's merged tokens as the coordinator last reported them; unused in a full-quorum run."""
    peers: float = 1.0
    """Inner steps that the run takes for each one of this site."""
    out_of_touch: Collection[int] = ()
    """The fragments whose coordinators cannot be reached."""
    recorded: dict[int, int] = field(default_factory=dict)
    """Fragments whose next contribution was sent before a restart, and comes up again after so many steps since the
    one before: where it came then, wherever the cycle is now."""

    @classmethod
    def begin(cls, settings: Settings, versions: list[tuple[int, int]], pace: float, peers: float) -> SiteCore:
        """A site that starts training: (version, merged tokens) of each fragment, its pace, and the inner steps that
        the run takes for each of its own."""
        views = [FragmentView(version, Progress(tokens, 0, peers)) for version, tokens in versions]
        for view in views:
            view.complete = view.progress.merged >= settings.budget
        merged = max(tokens for _, tokens in versions)
        return cls(settings, views, next_cycle(0, pace), pace, furthest=float(merged))

    # -- the decision

    def next_action(self) -> Action:
        """What to do now; asked again until it says Step."""
        if all(view.complete or (self.run_finished and self._at_rest(view)) for view in self.fragments):
            return Done()
        for p in self._by_snapshot():
            view = self.fragments[p]
            if view.arrived is not None and self._may_align(view):
                return Align(p, view.arrived.version, view.arrived.how)
            if view.in_flight is not None and self._must_align(view.in_flight) and not self._bridges(p, view.in_flight):
                return self._wait(p)
        while self.due:
            p = self.due[0]
            view = self.fragments[p]
            if view.complete:
                self.due.pop(0)
                continue
            if view.arrived is not None:
                return Align(p, view.arrived.version, view.arrived.how)
            if view.in_flight is not None and (view.in_flight.followed or self._bridges(p, view.in_flight)):
                # It has had its contribution of this cycle (or cannot have it); what was trained since goes with the
                # next one.
                self.due.pop(0)
                continue
            if view.in_flight is not None:
                return self._wait(p)
            if not self._has_something(p):
                self.due.pop(0)
                continue
            return self._snapshot(p)
        for p, version in self.closing:
            view = self.fragments[p]
            fresh = self._at_rest(view) and view.version == version - 1 and not view.complete
            if fresh and p not in self.recorded and self._has_something(p):
                return self._snapshot(p)
        return Step()

    # -- what the agent has done

    def stepped(self, tokens: int, seconds: float) -> None:
        """An inner step over `tokens` tokens took `seconds`."""
        self.steps += 1
        self.tokens += tokens
        self.tempo.stepped(seconds)
        cycle = self.cycle.due(self.steps, len(self.fragments))
        for p in range(len(self.fragments)):
            due = self._comes_up_again(p) if p in self.recorded else p in cycle
            if due and p not in self.due:
                self.due.append(p)
        if self.steps >= self.cycle.end:
            self.cycle = next_cycle(self.steps, self.pace, self.cycle.carry)
        self._find_place()

    def snapshot_taken(self, action: Snapshot, now: float) -> None:
        due = action.fragment in self.due
        if due:
            self.due.remove(action.fragment)
        followed = not due and any(p == action.fragment for p, _ in self.closing)
        self.fragments[action.fragment].in_flight = InFlight(
            action.base_version, self.steps, self.tokens, action.tokens, action.steps, now, followed=followed
        )

    def aligned(self, fragment: int) -> None:
        """The arrived version has been taken up."""
        view = self.fragments[fragment]
        arrived, flight = view.arrived, view.in_flight
        if arrived is None:
            raise ValueError(f"fragment {fragment} has no version to align with")
        if flight is not None and arrived.how == "align":
            view.progress.advance(arrived.tokens, flight.local_tokens, flight.tokens)
        else:
            view.progress.advance(arrived.tokens, self.tokens, 0)
        if arrived.how == "overwrite":
            view.counted_tokens, view.counted_steps = self.tokens, self.steps
        view.version, view.arrived, view.in_flight = arrived.version, None, None
        view.complete = arrived.tokens >= self.settings.budget

    # -- news

    def accepted(self, fragment: int, version: int, now: float) -> None:
        """The contribution on its way was accepted; `version` will hold it."""
        view = self.fragments[fragment]
        if (flight := view.in_flight) is None or flight.holding is not None:
            return
        flight.holding = version
        view.counted_tokens += flight.tokens
        view.counted_steps += flight.steps
        self.tempo.synced(now - flight.taken_at)

    def arrived(self, fragment: int, version: int, tokens: int, how: How) -> None:
        """A version is here."""
        view = self.fragments[fragment]
        view.arrived = Arrived(version, tokens, how)

    def told(self, tokens: int, peers: float | None) -> None:
        """The coordinator has merged so many tokens, and the run takes `peers` inner steps for each one of this site
        (None: as many as before): where nobody waits, the learning rate follows these reports."""
        if self.settings.everyone:
            return
        self.reported, self.peers = tokens, peers or self.peers
        self._find_place()

    @property
    def overlap_seconds(self) -> float:
        """How long this site goes on without a version that it waits for: what τ steps take here, or a cycle where that
        is shorter, because then the fragment is due again; 0 before a step is measured."""
        overlap = self._overlap()
        return min(self.pace if overlap is None else overlap, self.pace) * self.tempo.step_seconds

    # -- rules

    def _find_place(self) -> None:
        """Where the run's budget stands, for the learning rate; see site_agent.core.budget."""
        if self.reported is None:
            self.furthest = max(self.furthest, *(view.progress.estimate(self.tokens) for view in self.fragments))
            return
        merged = sum(view.progress.merged for view in self.fragments) / len(self.fragments)
        cycle = self.pace * self.tokens / max(1, self.steps)
        # What nobody takes (an outage, refusals) piles up; the run does not wait for it.
        undelivered = min(sum(map(self._undelivered, self.fragments)) / len(self.fragments), UNDELIVERED * cycle)
        here = max(self.reported, merged) + self.peers * undelivered
        self.furthest = max(here, min(self.furthest, here + self.peers * cycle))

    def _undelivered(self, view: FragmentView) -> int:
        """Tokens of this site that no version of the fragment is known to hold."""
        flight = view.in_flight
        on_its_way = flight.tokens if flight is not None and flight.holding is not None else 0
        return 0 if view.complete else self.tokens - view.counted_tokens + on_its_way

    def _snapshot(self, p: int) -> Snapshot:
        view = self.fragments[p]
        tokens, steps = self.tokens - view.counted_tokens, self.steps - view.counted_steps
        return Snapshot(p, view.version, max(0, tokens), max(0, steps))

    def _has_something(self, p: int) -> bool:
        """Whether there is anything to contribute. A contribution from before a restart may hold more steps than have
        been trained again."""
        return p in self.recorded or self.steps > self.fragments[p].counted_steps

    def _comes_up_again(self, p: int) -> bool:
        view = self.fragments[p]
        flight = view.in_flight
        before = flight.steps if flight is not None and flight.holding is None else 0
        return self.steps >= view.counted_steps + before + self.recorded[p]

    def _wait(self, p: int) -> Action:
        """Waits for fragment `p`, unless somebody waits for this site: two sites that wait for each other would do so
        until a deadline. A round that this site has seen the version of is over, whatever older orders say of it."""
        for q, version in self.awaited:
            view = self.fragments[q]
            lacking = view.version < version and self._at_rest(view) and not view.complete
            if lacking and self._comes_before(q, version, p):
                # With nothing trained since its last contribution it has nothing to give: one step more than τ, then.
                return self._snapshot(q) if self._has_something(q) else Step()
        return Wait(p)

    def _comes_before(self, q: int, version: int, p: int) -> bool:
        """Whether the round of fragment `q` is served before the one of `p` that this site waits for. One coordinator
        names only such rounds; of several none knows what the site waits for at the others, and there is no clock that
        all go by. Any one order of all rounds will do, and by version, then fragment, is that of sites in step."""
        if not self.settings.sharded:
            return True
        flight = self.fragments[p].in_flight
        awaited = self.fragments[p].version + 1 if flight is None else flight.holding or flight.base_version + 1
        return (version, q) < (awaited, p)

    def _bridges(self, p: int, flight: InFlight) -> bool:
        """Whether to train on although the version of this contribution is late: its coordinator cannot be reached."""
        silent = p in self.out_of_touch and not self.settings.everyone
        return silent and self.steps < flight.step + self.settings.outage_steps

    def _by_snapshot(self) -> list[int]:
        """Fragments that have something on its way or here, oldest snapshot first."""
        busy = [p for p, v in enumerate(self.fragments) if not v.complete and (v.in_flight or v.arrived)]
        return sorted(busy, key=lambda p: (flight.step if (flight := self.fragments[p].in_flight) else -1, p))

    def _at_rest(self, view: FragmentView) -> bool:
        return view.in_flight is None and view.arrived is None

    def _may_align(self, view: FragmentView) -> bool:
        """A fixed τ is kept to the step, so that a run can be repeated; otherwise sooner is better."""
        fixed = isinstance(self.settings.overlap, int)
        return not fixed or view.in_flight is None or self._must_align(view.in_flight)

    def _overlap(self) -> int | None:
        """τ in inner steps; None: until the fragment is due again. So it is with "auto" where rounds do not wait
        for everyone: there is nothing to be gained by getting in step."""
        if self.settings.overlap == "auto" and not self.settings.everyone:
            return None
        return self.tempo.overlap(self.settings.overlap)

    def _must_align(self, flight: InFlight) -> bool:
        overlap = self._overlap()
        return overlap is not None and self.steps >= flight.step + overlap
