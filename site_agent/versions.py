"""Published versions on their way to this site: by deltas where these are fewer bytes, else by snapshot.

An anchor is never changed in place: the next one is built in a new array, its digest is checked, and it is passed over
whole. Deltas go into the history as they come, so that a site that dies can come back to each version it was at.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import numpy as np

from shared.errors import FaultError, FormatError
from shared.fragments import Chunk, combine_digests, digest_chunk
from shared.parallel import over_chunks
from shared.protocol import Code
from shared.wire import container_bound, open_container
from site_agent.branch import Home
from site_agent.contribution import Address, Anchor
from site_agent.history import History
from site_agent.link import Refusal, backoff

log = logging.getLogger(__name__)

SNAPSHOT_TRIES = 8


class Versions:
    """Brings versions of fragments, each from its `home`. `codec` is that of deltas; `repaired` is told where one came
    out as other bits than it should."""

    def __init__(self, homes: Sequence[Home], codec: str, history: History, repaired: Callable[[], None]) -> None:
        self._homes, self._codec, self._history, self._repaired = homes, codec, history, repaired
        self._delta_bytes: dict[int, int] = {}
        self._keeping: dict[int, asyncio.Future[None]] = {}

    async def bring(self, p: int, anchor: Anchor | None, version: int) -> tuple[Anchor, bool]:
        """`version`, waiting for it, or a newer one where only that is to be had; and whether by a snapshot."""
        jumped = anchor is None or not self._deltas_are_less(p, version - anchor.version)
        if anchor is None or jumped:
            anchor = await self._by_snapshot(p, version)
        while anchor.version < version:
            # A snapshot is of what is published; what is not published yet comes as deltas.
            along = await self.by_deltas(p, anchor, version)
            jumped |= along is None
            anchor = along or await self._by_snapshot(p, version)
        return anchor, jumped

    async def by_deltas(self, p: int, anchor: Anchor, version: int) -> Anchor | None:
        """`anchor` moved along to `version`; None where a delta is gone or leads to other bits than it should."""
        home = self._homes[p]
        while anchor.version < version:
            if (known := await asyncio.to_thread(self._by_history, p, anchor)) is not None:
                anchor = known
                continue
            try:
                data = await home.branch.link.delta(home.address.fragment.index, anchor.version + 1)
            except Refusal as refusal:
                if refusal.code not in (Code.VERSION_GONE, Code.NOT_FOUND):
                    raise
                return None
            self._delta_bytes[p] = len(data)
            try:
                anchor = await asyncio.to_thread(self._apply, home.address, anchor, data)
            except FormatError as error:
                self._repaired()
                log.error("fragment %d: %s; repaired from a snapshot", p, error)
                return None
            await self._keep(p, anchor.version, data)
        return anchor

    async def kept(self, p: int) -> None:
        """Until what came of fragment `p` is in the history."""
        if (keeping := self._keeping.get(p)) is not None:
            await keeping

    def _deltas_are_less(self, p: int, count: int) -> bool:
        """Whether so many deltas are fewer bytes than one snapshot (fp32), by the size of the last or largest one."""
        fragment = self._homes[p].address.fragment
        each = self._delta_bytes.get(p) or container_bound(fragment, self._codec)
        return count == 1 or count * each < 4 * fragment.size

    def _by_history(self, p: int, anchor: Anchor) -> Anchor | None:
        """The version after `anchor`, where this site has been at it before."""
        data = self._history.read(p, anchor.version + 1)
        if data is None:
            return None
        try:
            return self._apply(self._homes[p].address, anchor, data)
        except FormatError as error:
            log.error("fragment %d: the history's %s; asking the coordinator", p, error)
            self._history.drop(p, anchor.version + 1)
            return None

    async def _keep(self, p: int, version: int, data: bytes) -> None:
        """Puts a delta into the history, while whoever waits for its version goes on."""
        await self.kept(p)

        def put() -> None:
            try:
                self._history.put(p, version, data)
            except OSError as error:
                log.error("a delta is not in the history (%s): if this agent is killed, it starts anew", error)

        self._keeping[p] = asyncio.ensure_future(asyncio.to_thread(put))

    async def _by_snapshot(self, p: int, version: int) -> Anchor:
        home = self._homes[p]
        for attempt in range(1, SNAPSHOT_TRIES + 1):
            try:
                data = await home.branch.link.snapshot(home.address.fragment.index, version)
                return await asyncio.to_thread(self._apply, home.address, None, data)
            except Refusal as refusal:
                if refusal.code not in (Code.VERSION_GONE, Code.NOT_PUBLISHED, Code.NOT_FOUND):
                    raise
                # The version moved on while we asked, or is not published yet; the one that is named can be had now.
                version = refusal.version if refusal.version is not None else version
                if attempt == 1:
                    continue
            except FormatError as error:
                log.error("snapshot of fragment %d: %s; fetching it again", p, error)
            await asyncio.sleep(backoff(attempt, random.random()))
        raise FaultError(f"no sound snapshot of fragment {p} could be had; look at the coordinator's log")

    def _apply(self, of: Address, anchor: Anchor | None, data: bytes) -> Anchor:
        """A delta on top of `anchor`, or (None) a snapshot. Raises FormatError where it is not what it should be."""
        fragment = of.fragment
        with open_container(data, fragment) as container:
            header = container.header
            expected = ("snapshot", of.run, header.version) if anchor is None else ("delta", of.run, anchor.version + 1)
            if (header.kind, header.run, header.version) != expected:
                raise FormatError(f"got {(header.kind, header.run, header.version)} in place of {expected}")
            flat = np.empty(fragment.size, dtype=np.float32)

            def apply_chunk(section: int, chunk: Chunk) -> bytes:
                part = flat[chunk.start : chunk.stop]
                part[:] = 0 if anchor is None else anchor.flat[chunk.start : chunk.stop]
                container.accumulate(section, 1.0, part)
                return digest_chunk(part)

            digest = combine_digests(over_chunks(container.chunks, apply_chunk))
        if digest != header.digest:
            raise FormatError(f"version {header.version} came out as {digest} and not {header.digest}")
        return Anchor(header.version, digest, header.tokens, flat)
