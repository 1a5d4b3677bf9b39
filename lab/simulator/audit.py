"""The auditor: what must be true of a run at every moment, whatever happens to it (DESIGN.md section 2).

It looks at what is durable (each transaction as it is committed, blobs, the journal after each recovery) and at what
sites hold, and believes nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.core.run import SiteActive
from coordinator.service import Coordinator
from coordinator.verify import verify
from lab.simulator.counting import Stride
from lab.simulator.model import PLACES
from shared.config import RunConfig
from shared.fragments import F32
from shared.wire import open_container
from site_agent.learner import Learner
from site_agent.news import Accepted, ArrivedAnchor, Event
from site_agent.training.replica import Replica

ROUNDING = 2e-3
"""Of sums of a few dozen fp32 values of about 1, through int4 and back."""


class Violation(Exception):
    """An invariant does not hold: which one, and what was found."""

    def __init__(self, invariant: str, found: str) -> None:
        super().__init__(f"{invariant}: {found}")
        self.invariant = invariant


@dataclass(frozen=True)
class Seen:
    """A contribution that the journal has accepted."""

    id: str
    site: str
    fragment: int
    base: int


class Auditor:
    """`failed` is called with the first Violation that is found where it cannot be raised."""

    def __init__(
        self,
        config: RunConfig,
        sites: Sequence[str],
        clock: Callable[[], float],
        failed: Callable[[Violation], None],
    ) -> None:
        self._config, self._clock, self._failed = config, clock, failed
        self._coordinator: Coordinator | None = None
        self._heard = dict.fromkeys(sites, 0.0)
        self._strides = {site: Stride(site) for site in sites}
        self._contributions: list[Seen] = []
        self._newest: dict[tuple[str, int], Seen] = {}
        self._by_base: dict[tuple[str, int, int], Seen] = {}
        self._delivered: dict[tuple[str, int], F32] = {}
        self._versions: dict[tuple[int, int], str] = {}
        self._last_seq = 0
        self._published = [0] * config.rounds.fragments
        self._promised: list[tuple[Seen, int]] = []
        self._data: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {}
        self._came_back: set[tuple[int, int]] = set()
        self._trained: dict[tuple[int, int, int], set[tuple[str, int]]] = {}
        self.checks = 0
        self.forgetful: set[str] = set()
        """Sites whose disk refused: what they do not know any more they cannot account for."""

    # -- the coordinator

    def opened(self, coordinator: Coordinator) -> None:
        """A coordinator has recovered."""
        self._coordinator = coordinator
        self._watch_leases(coordinator)
        self._published = [0] * len(self._published)
        for p in range(len(self._published)):
            self._version(p, 0, coordinator.store.initial_digest(p))
        known = coordinator.reader._db.execute("SELECT COUNT(*) FROM contributions WHERE seq <= ?", (self._last_seq,))
        if (found := known.fetchone()[0]) != len(self._contributions):
            self._violated("no acknowledged contribution is lost", f"{len(self._contributions)} were, {found} are here")
        self._look(coordinator)

    def closed(self) -> None:
        """That coordinator is dead."""
        self._coordinator = None

    def committed(self, what: str) -> None:
        """A transaction of the coordinator's journal is durable."""
        if self._coordinator is None:
            return
        if what in ("accept", "publish"):
            self._look(self._coordinator)
        if what == "lease":
            rows = self._coordinator.reader._db.execute("SELECT epoch, shard FROM leases WHERE site IS NULL")
            self._came_back.update((row["epoch"], row["shard"]) for row in rows)

    def heard(self, site: str) -> None:
        """Bytes of a site's request have reached the coordinator."""
        self._heard[site] = self._clock()

    def _look(self, coordinator: Coordinator) -> None:
        """What is new in the journal."""
        self.checks += 1
        db = coordinator.reader._db
        rows = db.execute("SELECT * FROM contributions WHERE seq > ? ORDER BY seq", (self._last_seq,)).fetchall()
        for row in rows:
            self._last_seq = row["seq"]
            seen = Seen(row["id"], row["site"], row["fragment"], row["base_version"])
            before = self._newest.get((seen.site, seen.fragment))
            if before is not None and before.base >= seen.base:
                self._violated("a base takes one contribution of a site", f"{seen} after {before}")
            self._contributions.append(seen)
            self._newest[seen.site, seen.fragment] = seen
            self._by_base[seen.site, seen.fragment, seen.base] = seen
            with open_container(
                coordinator.store.blobs.path(row["blob"]), coordinator.layout.fragments[seen.fragment]
            ) as container:
                total = self._delivered.setdefault((seen.site, seen.fragment), np.zeros(PLACES, np.float32))
                container.add_to(total)
        for p, newest in enumerate(self._published):
            rounds = (
                "SELECT version, published_digest FROM rounds WHERE fragment = ? AND version > ? AND published_at > 0"
            )
            for row in db.execute(rounds, (p, newest)):
                self._version(p, row["version"], row["published_digest"])
                self._published[p] = row["version"]

    def _version(self, fragment: int, version: int, digest: str) -> None:
        known = self._versions.setdefault((fragment, version), digest)
        if known != digest:
            self._violated("a version is one set of bits", f"version {version} of fragment {fragment} has two digests")

    def _watch_leases(self, coordinator: Coordinator) -> None:
        core, began = coordinator.core, self._clock()
        tick = core.tick

        def watched(now: float) -> list[object]:
            decisions = tick(now)
            for decision in decisions:
                if isinstance(decision, SiteActive) and decision.expired:
                    silent = now - max(began, self._heard[decision.site])
                    if silent < core.members.lease_seconds - 1e-6:
                        self._violated(
                            "arriving bytes renew a lease",
                            f"site {decision.site} lost its lease {silent:.1f} s after it was heard",
                        )
            return list(decisions)

        core.tick = watched  # type: ignore[method-assign,assignment]

    # -- the sites

    def site_heard(self, site: str, events: Sequence[Event], learner: Learner) -> None:
        """News are about to reach a site's learner."""
        for event in events:
            match event:
                case Accepted(fragment, version, _):
                    flight = learner.core.fragments[fragment].in_flight if learner.training else None
                    base = -1 if flight is None else flight.base_version
                    seen = self._by_base.get((site, fragment, base))
                    if flight is None:
                        continue
                    if seen is None:
                        self._violated(
                            "no acknowledged contribution is lost",
                            f"{site} was told so, and fragment {fragment} has none",
                        )
                    else:
                        self._promised.append((seen, version))
                case ArrivedAnchor(fragment, anchor, _):
                    known = self._versions.get((fragment, anchor.version))
                    if known != anchor.digest:
                        self._violated(
                            "anchors are bit-identical",
                            f"{site} holds {anchor.digest} as version {anchor.version} of fragment {fragment}, "
                            f"published was {known}",
                        )
                case _:
                    pass

    def site_went_on(self, site: str, learner: Learner) -> None:
        """A site has done what its news led to: what it delivered and what it holds must be what it has trained."""
        if not learner.training:
            return
        self.checks += 1
        for p, view in enumerate(learner.core.fragments):
            if view.in_flight is not None and view.in_flight.base_version != learner.anchors[p].version:
                self._violated(
                    "a contribution is made on its base",
                    f"site {site}, fragment {p}: base {view.in_flight.base_version} at {learner.anchors[p].version}",
                )
        if self._config.rounds.align != "carry" or site in self.forgetful:
            return
        taken = self._strides[site].after(learner.stream.state_dict()["position"])
        replica = learner.trainer
        assert isinstance(replica, Replica)
        for p, view in enumerate(learner.core.fragments):
            flight = view.in_flight
            if view.complete or view.arrived is not None or learner.replays(p):
                continue
            if flight is not None and flight.holding is None:
                continue  # whether it is delivered is not known here
            since = learner.anchors[p].flat if flight is None else replica.snapshots[p].numpy()
            held = since - replica.read(p).numpy()
            if (residual := replica.residuals.get(p)) is not None:
                held = held + residual.numpy()
            delivered = self._delivered.get((site, p), np.zeros(PLACES, np.float32))
            wrong = np.abs(delivered + held - taken)
            if wrong.max() > ROUNDING:
                place = int(wrong.argmax())
                self._violated(
                    "no step is lost or delivered twice",
                    f"site {site}, fragment {p}, step {place} of {learner.core.steps}: {delivered[place]:.2f} are out "
                    f"and {held[place]:.3f} held of {taken[place]:g}",
                )

    def trained(self, site: str, step: int, at: tuple[tuple[int, int, int], ...]) -> None:
        """A site trains sequences of leased data: each (epoch, shard, position)."""
        self.checks += 1
        before = self._data.setdefault((site, step), at)
        if before != at and site not in self.forgetful:
            self._violated("a step is trained again on the same data", f"site {site}, step {step}: {before}, then {at}")
        for each in at:
            self._trained.setdefault(each, set()).add((site, step))

    def _all_data_once(self, coordinator: Coordinator) -> None:
        """What was leased is trained once where nobody forgot what it did, and nothing that is done is left out."""
        if (leases := coordinator.lending.leases) is None:
            return
        for at, steps in self._trained.items():
            if len(steps) > 1 and not self.forgetful and at[:2] not in self._came_back:
                raise Violation("a sequence is trained once an epoch", f"{at} by {sorted(steps)}")
        dealt = leases.dealt
        for epoch in range(dealt.epoch + 1):
            order = leases.order(epoch)
            for shard in order[: dealt.shards] if epoch == dealt.epoch else order:
                entry = leases.entries.get((epoch, shard))
                done = leases.sizes[shard] if entry is None else entry.position
                for position in range(done):
                    if (epoch, shard, position) not in self._trained:
                        raise Violation(
                            "no sequence is left out", f"{(epoch, shard, position)}, of {done} that are done"
                        )

    def site_done(self, site: str, learner: Learner) -> None:
        """A site leaves, because the run is finished."""
        self.site_went_on(site, learner)

    # -- the end

    async def finished(self, coordinator: Coordinator) -> list[tuple[int, str]]:
        """The run is over: every contribution is in one round, and where it was promised to be; and the whole state
        directory is what the journal says."""
        while coordinator._merges:
            await asyncio.wait(coordinator._merges)
        self._look(coordinator)
        holds: dict[str, tuple[int, int]] = {}
        for p in range(len(coordinator.layout.fragments)):
            for round_ in coordinator.reader.rounds(p, after=0):
                if round_.published_at is None:
                    raise Violation("every round is published", f"version {round_.version} of fragment {p} is not")
                for id_, _ in round_.members:
                    if id_ in holds:
                        raise Violation("a contribution is merged once", f"{id_} is in two rounds")
                    holds[id_] = p, round_.version
        lost = [seen for seen in self._contributions if seen.id not in holds]
        if lost:
            raise Violation(
                "an accepted contribution is merged", f"{len(lost)} are in no round, the first is {lost[0]}"
            )
        for seen, version in self._promised:
            if holds[seen.id][1] > version:
                raise Violation(
                    "a contribution is in the version that was promised",
                    f"{seen} is in {holds[seen.id]}, not {version}",
                )
        self._all_data_once(coordinator)
        if (verified := verify(coordinator.store.path, coordinator.workers.chunks)).faults:
            raise Violation("the state is a fold of the journal", verified.faults[0])
        return [(newest.version, newest.digest) for newest in coordinator.publication.newest]

    def _violated(self, invariant: str, found: str) -> None:
        self._failed(Violation(invariant, found))
