"""Shards of data on loan: what `coordinator.core.leases` decides, journaled before anyone hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from coordinator.core.leases import Change, Leases
from coordinator.refused import Refused
from coordinator.store.journal import Journal
from coordinator.workers import Workers
from shared.protocol import Code, DataOrders, DataReport, Manifest, ShardLease
from shared.wire import Header

log = logging.getLogger(__name__)

AWAY_SECONDS = 300.0
"""A site of which nothing is heard for so long is not waited for: others train its shards."""


class Lending:
    """The leases of one run; there are none before a site has described its data."""

    def __init__(self, journal: Journal, reader: Journal, workers: Workers, fragments: int, seed: int) -> None:
        self._journal, self._workers, self._fragments, self._seed = journal, workers, fragments, seed
        self.away_seconds = AWAY_SECONDS
        self._turn = asyncio.Lock()
        self._away: dict[str, float] = {}
        self._digest = ""
        self.leases: Leases | None = None
        if (known := reader.manifest()) is not None:
            self._digest, sizes = known
            self.leases = Leases(sizes, fragments, seed)
            self.leases.restore(*reader.leases())

    async def describe(self, site: str, manifest: Manifest) -> None:
        """A site says what its data is cut into: the first one's word holds. Raises Refused where another's differs."""
        async with self._turn:
            if self.leases is None:
                await self._workers.write(self._journal.put_manifest, manifest.digest, manifest.sizes)
                self._digest, self.leases = manifest.digest, Leases(manifest.sizes, self._fragments, self._seed)
                log.info("the data of site %s is leased: %d shards", site, len(manifest.sizes))
            elif (manifest.digest, manifest.sizes) != (self._digest, self.leases.sizes):
                raise Refused(
                    Code.WRONG_DATA,
                    f"site {site} has {sum(manifest.sizes)} sequences in {len(manifest.sizes)} shards, and not the "
                    f"data that this run leases ({sum(self.leases.sizes)} in {len(self.leases.sizes)}); "
                    'give it the same files, or set [data] partition = "local"',
                )

    async def report(self, site: str, report: DataReport, sites: int) -> DataOrders | None:
        """What the site, one of `sites`, is to train next; no more than it has where the disk refuses."""
        if self.leases is None:
            return None
        # Nobody takes much more than a part of what there is in advance: a site that dies with it holds it up.
        share = sum(self.leases.sizes) // (4 * max(1, sites))
        missing = max(report.least, min(report.want, share)) - report.left
        known = [*report.holding, *report.finished]
        async with self._turn:
            with contextlib.suppress(Refused):
                await self._write(self.leases, self.leases.plan_grants(site, missing, report.newest, known))
        return DataOrders(
            next_number=self.leases.dealt.next_number,
            leases=[
                ShardLease(number=e.number, epoch=e.epoch, shard=e.shard, start=e.position)
                for e in self.leases.held_by(site)
            ],
            withdrawn=self.leases.withdrawn(known),
        )

    def document(self) -> dict[str, Any] | None:
        """How the leases stand, for people; None where no data is leased."""
        if (leases := self.leases) is None:
            return None
        return {
            "epoch": leases.dealt.epoch,
            "shards": len(leases.sizes),
            "dealt": leases.dealt.shards,
            "leased": sum(entry.site is not None for entry in leases.entries.values()),
            "came_back": sum(entry.site is None for entry in leases.entries.values()),
        }

    @asynccontextmanager
    async def progress(self, site: str, header: Header) -> AsyncIterator[Change | None]:
        """What a contribution's acceptance changes, to be written with it; made once the block is left without an
        error."""
        if self.leases is None or not header.progress:
            yield None
            return
        async with self._turn:
            change = self.leases.plan_progress(site, header.fragment, header.progress)
            yield change
            if change is not None:
                self.leases.make(change)

    async def take_back(self, live: Collection[str], now: float) -> None:
        """Shards of sites that have not been live for long come back."""
        if self.leases is None:
            return
        holders = {entry.site for entry in self.leases.entries.values() if entry.site is not None}
        self._away = {site: self._away.get(site, now) for site in holders - set(live)}
        gone = sorted(site for site, since in self._away.items() if now - since >= self.away_seconds)
        if count := await self._come_back(gone):
            log.warning("nothing was heard of %s for long; %d shards came back", ", ".join(gone), count)

    async def give_back(self, site: str) -> None:
        """The site trains other data: what it was leased comes back."""
        if count := await self._come_back([site]):
            log.warning("site %s does not train leased data any more; %d shards came back", site, count)

    async def _come_back(self, sites: Sequence[str]) -> int:
        """How many shards of these sites came back. Where the disk refuses they do not yet: the caller comes again."""
        if self.leases is None:
            return 0
        async with self._turn:
            change = self.leases.plan_return(sites)
            try:
                await self._write(self.leases, change)
            except Refused as error:
                log.error("shards of %s cannot come back yet: %s", ", ".join(sites), error)
                return 0
        return len(change.entries) if change is not None else 0

    async def _write(self, leases: Leases, change: Change | None) -> None:
        """Writes a change, then makes it. Raises Refused, and it was not made."""
        if change is not None:
            await self._workers.write(self._journal.lease, change)
            leases.make(change)
