"""Published versions: what each fragment's newest one is, its delta, its snapshot, and who waits for the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.outer.step import OuterState
from coordinator.refused import Refused
from coordinator.store.journal import Journal
from coordinator.store.state_dir import StateDir
from coordinator.workers import Workers
from shared.codecs import DENSE
from shared.compression import Compression
from shared.container_files import write_flat
from shared.errors import CorruptError
from shared.fragments import CHUNK_ELEMENTS
from shared.protocol import Code
from shared.wire import Header, tensor_table

log = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 4
PUBLISHED_WITHIN_SECONDS = 30.0


@dataclass(frozen=True)
class Published:
    """A fragment's newest published version, its digest, and the tokens merged into it."""

    version: int
    digest: str
    tokens: int


class Publication:
    """Answers for deltas and snapshots. `newest` is what the journal holds; the states may be a step ahead. `link`: how
    many bytes per second reach the sites, None where nobody knows."""

    def __init__(
        self,
        store: StateDir,
        states: list[OuterState],
        reader: Journal,
        workers: Workers,
        compression: Compression,
        link: Callable[[], float | None],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._states, self._reader, self._workers = store, states, reader, workers
        self._compression, self._link, self._clock = compression, link, clock
        self._run = store.run_id
        self._initial_digests = [store.initial_digest(p) for p in range(len(states))]
        self.newest = [Published(state.version, state.digest, state.tokens) for state in states]
        self._news = [asyncio.Event() for _ in states]
        self._closed = False
        # What an earlier process made of them is not known; they are made again when somebody asks.
        for old in store.snapshots.iterdir():
            store.disk.remove(old)

    def publish(self, fragment: int, published: Published) -> None:
        """The version is in the journal: whoever waits for it may have it."""
        self.newest[fragment] = published
        self._wake(fragment)

    def close(self) -> None:
        """Sends everyone who waits away."""
        self._closed = True
        for fragment in range(len(self._news)):
            self._wake(fragment)

    def digest(self, fragment: int, version: int) -> str | None:
        """The digest of a version, as long as the journal knows it."""
        if version == 0:
            return self._initial_digests[fragment]
        round_ = self._reader.round(fragment, version)
        return None if round_ is None else round_.published_digest

    async def delta(self, fragment: int, version: int, wait: float) -> tuple[Path, str]:
        """The delta that leads to `version`, its file and digest; waits up to `wait` seconds for it."""
        self._check(fragment)
        deadline = self._clock() + wait
        while version > (newest := self.newest[fragment].version):
            left = deadline - self._clock()
            if self._closed:
                raise Refused(Code.STOPPING, "the coordinator is stopping; ask again")
            if left <= 0:
                raise Refused(
                    Code.NOT_PUBLISHED, f"fragment {fragment} is at version {newest}, not yet at {version}", newest
                )
            try:
                async with asyncio.timeout(left):
                    await self._news[fragment].wait()
            except TimeoutError:
                continue
        round_ = self._reader.round(fragment, version)
        if round_ is None or round_.delta is None or not self._store.blobs.has(round_.delta, round_.delta_size or 0):
            raise Refused(
                Code.VERSION_GONE, f"the delta to version {version} is no longer kept; take a snapshot", newest
            )
        if not await self._is_sound(round_.delta):
            raise Refused(Code.VERSION_GONE, f"the delta to version {version} is damaged; take a snapshot", newest)
        return self._store.blobs.path(round_.delta), round_.delta

    async def _is_sound(self, digest: str) -> bool:
        """Whether a delta still is what its name says: looked at once, before it goes out for the first time since the
        start. One that is not is removed."""
        try:
            await self._workers.on(self._workers.screeners, self._store.blobs.sound, digest)
        except CorruptError as error:
            log.error("%s", error)
            self._store.blobs.remove(digest)
            return False
        return True

    async def snapshot(self, fragment: int, version: int) -> tuple[Path, str]:
        """A snapshot of `version` (the newest, or one that was asked for not long ago): its file and digest."""
        self._check(fragment)
        newest = self.newest[fragment].version
        if version > newest:
            raise Refused(Code.NOT_PUBLISHED, f"fragment {fragment} is at version {newest}", newest)
        if (path := self._find_snapshot(fragment, version)) is None:
            try:
                made = await self._workers.on(self._workers.merger, self._make_snapshot, fragment, self._link())
            except OSError as error:
                raise self._workers.storage_refusal(error) from error
            if made != version:
                # Named only once it exists and may be had, so that whoever asks can catch up with a run that moves
                # on while they ask.
                await self._until(fragment, made)
                raise Refused(
                    Code.VERSION_GONE, f"version {version} of fragment {fragment} is superseded by {made}", made
                )
            path = self._find_snapshot(fragment, version)
        if path is None:
            raise Refused(Code.VERSION_GONE, f"version {version} of fragment {fragment} is gone", newest)
        return path, path.stem.split("-")[2]

    def _find_snapshot(self, fragment: int, version: int) -> Path | None:
        """The file of a snapshot, which has its digest in its name: pPPPP-vVVVVVVVVV-DIGEST.isthmus."""
        return next(self._store.snapshots.glob(f"p{fragment:04d}-v{version:09d}-*.isthmus"), None)

    async def _until(self, fragment: int, version: int) -> None:
        """Until `version` is published; not for longer than a publication can take."""
        try:
            async with asyncio.timeout(PUBLISHED_WITHIN_SECONDS):
                while self.newest[fragment].version < version and not self._closed:
                    await self._news[fragment].wait()
        except TimeoutError:
            return

    def _make_snapshot(self, fragment: int, link: float | None) -> int:
        """On the merge thread, where the state stands still: a snapshot of the version that it has, which may be a
        moment from being published, for a link of so many bytes per second. Returns that version."""
        state = self._states[fragment]
        version = state.version
        if self._find_snapshot(fragment, version) is not None:
            return version
        first = state.fragment.chunks()[0]
        sample = DENSE["fp32"].encode(state.published[first.start : first.stop])
        level = self._compression.level(sample, link)
        header = Header(
            kind="snapshot",
            run=self._run,
            site="",
            fragment=fragment,
            base_version=version,
            version=version,
            digest=state.digest,
            codec="fp32",
            zstd=level > 0,
            chunk=CHUNK_ELEMENTS,
            tensors=tensor_table(state.fragment),
            tokens=state.tokens,
            steps=0,
            sizes=[],
        )

        def write(beside: Path) -> str:
            digest = write_flat(beside, header, state.fragment, state.published, level, self._workers.chunks)
            return f"p{fragment:04d}-v{version:09d}-{digest}.isthmus"

        try:
            self._store.disk.put_as(self._store.snapshots, write)
        finally:
            state.vectors.rest()
        for old in sorted(self._store.snapshots.glob(f"p{fragment:04d}-v*.isthmus"))[:-SNAPSHOTS_KEPT]:
            self._store.disk.remove(old)
        return version

    def _check(self, fragment: int) -> None:
        if fragment >= len(self._states):
            raise Refused(Code.NOT_FOUND, f"the run has fragments 0 to {len(self._states) - 1}, not {fragment}")

    def _wake(self, fragment: int) -> None:
        self._news[fragment].set()
        self._news[fragment] = asyncio.Event()
