"""Intake: a contribution from its announcement to its acknowledgement.

The order is the promise: parts are spooled, the whole is screened, the blob is on disk and synced, the
journal row is committed, and only then is the contribution acknowledged. Every request may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from coordinator.core.rounds import Contribution
from coordinator.core.run import Decision, Refusal, RunCore
from coordinator.lending import Lending
from coordinator.machine import Machine
from coordinator.metrics import Metrics
from coordinator.publication import Publication
from coordinator.refused import Refused
from coordinator.store.files import file_digest
from coordinator.store.journal import Journal
from coordinator.store.state_dir import StateDir
from coordinator.uploads import SpooledUpload, Uploads, upload_id
from coordinator.workers import Workers
from shared.codecs import codec_named
from shared.errors import FormatError
from shared.protocol import INLINE_BYTES, Code, OpenUpload, Outcome, Upload
from shared.wire import Header, container_bound, open_container

log = logging.getLogger(__name__)

LARGEST_NORM = 1e18
"""A contribution beyond this norm is refused: merged and stepped in fp32 it could overflow the master. It is the second
line: of sections that are screened one by one (`Codec.screen`) none is let through that would bring it near, and this
one holds should a codec's screening ever err."""

SPOOL_BYTES = 16 << 20
MOST_ROOM, LEAST_ROOM = 1 << 20, 64 << 10
"""What all parts that are under way may hold in memory before it is written, and the bounds of one part's share: a
few fast links are read in large pieces, many slow ones take no memory to speak of."""
MOST_PIECES = 64


@dataclass(frozen=True)
class Screened:
    """What was found in a contribution's container: its header, sound throughout, and its L2 norm."""

    header: Header
    norm: float


class Intake:
    """Takes contributions in. `carry_out` gets the decisions that an accepted one leads to."""

    def __init__(
        self,
        core: RunCore,
        store: StateDir,
        reader: Journal,
        publication: Publication,
        workers: Workers,
        metrics: Metrics,
        codec: str,
        lending: Lending,
        machine: Machine,
        carry_out: Callable[[list[Decision]], Awaitable[None]],
    ) -> None:
        self._core, self._store, self._reader, self._publication = core, store, reader, publication
        self._workers, self._metrics, self._codec = workers, metrics, codec
        self._lending = lending
        self._clock, self._wall, self._carry_out = machine.clock, machine.wall, carry_out
        self._run, self._layout = store.run_id, store.layout
        self._bounds = [container_bound(fragment, codec) for fragment in self._layout.fragments]
        self.contribution_bound = sum(self._bounds)
        """Bytes that one contribution to each fragment can have."""
        self._incoming = 0
        self._turns: dict[str, asyncio.Lock] = {}
        self.uploads = Uploads(store.uploads, per_site=2 * len(self._bounds) + 2, disk=store.disk)

    async def open(self, site: str, message: OpenUpload) -> Upload:
        """Opens (or finds again) the upload of a contribution; one that brings its body is committed at once."""
        if message.site != site:
            raise Refused(Code.NOT_YOUR_SITE, f"site {site} cannot contribute as {message.site}")
        id_ = upload_id(message)
        held = self._known(site, id_)
        if held is None:
            held = self._holding(message, id_)
        if held is not None:
            return Upload(
                id=id_, part_size=self.uploads.part_bytes, parts=[], outcome=Outcome(accepted=True, version=held)
            )
        self._require_codec(message)
        bound = self._bounds[message.fragment]
        if not 0 < message.size <= bound:
            raise Refused(
                Code.TOO_LARGE,
                f"a contribution of {message.size} bytes; fragment {message.fragment} needs 1 to {bound}",
            )
        upload = self.uploads.open(id_, message.model_copy(update={"body": None}), self._clock())
        outcome = None
        if message.body is not None:
            if len(message.body) != message.size or message.size > INLINE_BYTES:
                raise Refused(
                    Code.BAD_REQUEST, f"a body of {len(message.body)} bytes where {message.size} were announced"
                )
            await self._write(upload, 0, upload.part_bytes, 0, [message.body])
            upload.parts.update(range(upload.part_count))
            outcome = await self.commit(site, id_)
        return Upload(id=id_, part_size=upload.part_bytes, parts=sorted(upload.parts), outcome=outcome)

    @property
    def room(self) -> int:
        """Bytes that a part may hold in memory before they are written."""
        return max(LEAST_ROOM, min(MOST_ROOM, SPOOL_BYTES // max(1, self._incoming)))

    async def put_part(
        self, site: str, id_: str, part: int, pieces: AsyncIterator[bytes], part_bytes: int | None = None
    ) -> None:
        """Stores one part as it comes in, so that many slow links at once take no memory to speak of; the same part
        again does no harm. `part_bytes` is how the site cuts the upload."""
        upload = self._upload(site, id_)
        if part_bytes not in (None, upload.part_bytes):
            raise Refused(Code.UNKNOWN_UPLOAD, f"upload {id_} is cut otherwise by now; open it again")
        if not 0 <= part < upload.part_count:
            raise Refused(Code.BAD_REQUEST, f"part {part} of an upload of {upload.part_count} parts")
        cut = upload.part_bytes
        _, size = upload.part_range(part)
        written = 0
        self._incoming += 1
        try:
            async for held in _gathered(pieces, lambda: self.room):
                count = sum(map(len, held))
                if written + count <= size:
                    await self._write(upload, part, cut, written, held)
                written += count
        finally:
            self._incoming -= 1
        if written != size:
            raise Refused(Code.BAD_REQUEST, f"part {part} has {written} bytes and must have {size}")
        if upload.part_bytes != cut:
            raise Refused(Code.UNKNOWN_UPLOAD, f"upload {id_} was cut otherwise meanwhile; open it again")
        upload.parts.add(part)

    async def commit(self, site: str, id_: str) -> Outcome:
        """Accepts or refuses a finished upload; may be asked again, and then answers the same."""
        if (held := self._known(site, id_)) is not None:
            return Outcome(accepted=True, version=held)
        upload = self._upload(site, id_)
        async with upload.lock:
            if (held := self._holding(upload.opening, id_)) is not None:
                return Outcome(accepted=True, version=held)
            self._require_open(upload)
            if not upload.complete:
                raise Refused(Code.INCOMPLETE, f"{len(upload.parts)} of {upload.part_count} parts are here")
            try:
                return await self._accept(upload)
            finally:
                self.uploads.close(upload)

    async def _accept(self, upload: SpooledUpload) -> Outcome:
        opening = upload.opening
        base_digest = self._publication.digest(opening.fragment, opening.base_version)
        try:
            screened = await self._workers.on(self._workers.screeners, self._screen, upload, base_digest)
        except FormatError as error:
            raise Refused(Code.MALFORMED, str(error)) from error
        except OSError as error:
            raise self._workers.storage_refusal(error) from error
        # One at a time for each site, and looked at again: while it was screened the round may have closed, the site
        # have gone, or another contribution from the same base have come in.
        async with self._turns.setdefault(opening.site, asyncio.Lock()):
            if (held := self._holding(opening, upload.id)) is not None:
                return Outcome(accepted=True, version=held)
            return await self._acknowledge(upload, screened)

    async def _acknowledge(self, upload: SpooledUpload, screened: Screened) -> Outcome:
        opening, header = upload.opening, screened.header
        claimed = Contribution(
            upload.id, opening.site, opening.fragment, opening.base_version, header.tokens, header.steps
        )
        contribution = self._core.credible(claimed, self._clock())
        if contribution != claimed:
            self._metrics.bounded.labels(opening.site, "tokens").inc()
            log.warning(
                "site %s claims %d tokens in %d steps, more than is believed; counted as %d in %d",
                *(opening.site, claimed.tokens, claimed.steps, contribution.tokens, contribution.steps),
            )
        await self._workers.write(self._store.blobs.adopt, upload.path, opening.digest)
        async with self._lending.progress(opening.site, header) as trained:
            await self._workers.write(
                self._store.journal.accept,
                contribution,
                opening.digest,
                opening.size,
                screened.norm,
                self._wall(),
                trained,
            )
        version, decisions = self._core.accept(contribution, self._clock())
        self._metrics.accepted.labels(opening.site).inc()
        self._metrics.contribution_norm.labels(opening.site).set(screened.norm)
        await self._carry_out(decisions)
        return Outcome(accepted=True, version=version)

    def _screen(self, upload: SpooledUpload, base_digest: str | None) -> Screened:
        """Reads the whole contribution once, and sees to it that its bytes are durable: here, where others are screened
        beside it, and not where the journal is written. Raises FormatError naming what is wrong with it, or Refused."""
        try:
            screened, digest = self._read_through(upload, base_digest)
        except (FormatError, Refused):
            # What was damaged on its way may look like anything.
            self._require_digest(file_digest(upload.path), upload)
            raise
        self._require_digest(digest, upload)
        self._store.disk.sync(upload.path)
        return screened

    def _require_digest(self, digest: str, upload: SpooledUpload) -> None:
        if digest != upload.opening.digest:
            raise Refused(Code.WRONG_DIGEST, "the uploaded bytes do not match the announced digest; upload again")

    def _read_through(self, upload: SpooledUpload, base_digest: str | None) -> tuple[Screened, str]:
        """What is in the container, and the BLAKE3 of its bytes."""
        opening, hashed = upload.opening, blake3()
        with open_container(upload.path, self._layout.fragments[opening.fragment], [self._codec]) as container:
            header = container.header
            named = (header.kind, header.run, header.site, header.base_version, header.version)
            announced = ("contribution", opening.run, opening.site, opening.base_version, opening.base_version)
            if named != announced:
                raise FormatError(f"the container names {named} and its upload announced {announced}")
            if header.digest != base_digest:
                raise Refused(
                    Code.WRONG_BASE,
                    f"base {opening.base_version} of fragment {opening.fragment} at site {opening.site} is not what "
                    "was published; take a snapshot",
                )
            squares = container.screen(hashed.update)
        if not squares <= LARGEST_NORM**2:
            raise FormatError(f"its norm is {squares**0.5:.7g}, beyond {LARGEST_NORM:g}, which no training survives")
        return Screened(header, squares**0.5), hashed.hexdigest()

    def _known(self, site: str, id_: str) -> int | None:
        """The version that holds a contribution which is in the journal; however long ago it was accepted, a site that
        asks again is told the same."""
        stored = self._reader.contribution(id_)
        if stored is None or stored.contribution.site != site:
            return None
        return stored.version or self._core.holding(stored.contribution.fragment, id_)

    def _holding(self, opening: OpenUpload, id_: str) -> int | None:
        """The version that holds this contribution already, or None where it may come. Raises Refused."""
        p = opening.fragment
        verdict = self._core.offer(opening.site, opening.session, p, opening.base_version, id_)
        if isinstance(verdict, Refusal):
            newest = None
            if p < len(self._bounds):
                state = self._core.fragments[p]
                # A finished fragment's last version may be in the making; a site can wait for it.
                newest = state.merging or state.version if verdict.code is Code.RUN_FINISHED else state.version
            raise Refused(verdict.code, verdict.detail, newest)
        return verdict

    def _require_codec(self, opening: OpenUpload) -> None:
        """Asked only of what is not here: a site may come with what it made before the run's codec was changed, and is
        told where that was accepted then. Raises Refused."""
        if opening.codec == self._codec:
            return
        try:
            codec_named(opening.codec)
        except FormatError as error:
            raise Refused(Code.MALFORMED, str(error)) from None
        raise Refused(
            Code.WRONG_CODEC,
            f"a contribution in codec {opening.codec}; by [wire] upload this run takes {self._codec}",
            self._core.fragments[opening.fragment].version,
        )

    def _upload(self, site: str, id_: str) -> SpooledUpload:
        upload = self.uploads.get(id_)
        if upload is None or upload.opening.site != site:
            raise Refused(Code.UNKNOWN_UPLOAD, f"no upload {id_} is open; open it again")
        upload.touched = self._clock()
        return upload

    def _require_open(self, upload: SpooledUpload) -> None:
        """An upload that was waited for may have been committed or dropped meanwhile. Raises Refused."""
        if self.uploads.get(upload.id) is not upload:
            raise Refused(Code.UNKNOWN_UPLOAD, f"upload {upload.id} is no longer open; open it again")

    async def _write(self, upload: SpooledUpload, part: int, cut: int, at: int, pieces: Sequence[bytes]) -> None:
        """Writes `pieces` at `at` of a part of `cut` bytes, unless it is here already, the upload no longer open, or
        cut finer meanwhile."""
        async with upload.lock:
            if part in upload.parts or self.uploads.get(upload.id) is not upload or upload.part_bytes != cut:
                return
            offset, _ = upload.part_range(part)
            try:
                await self._workers.on(self._workers.screeners, upload.write, offset + at, pieces)
            except OSError as error:
                raise self._workers.storage_refusal(error) from error


async def _gathered(pieces: AsyncIterator[bytes], size: Callable[[], int]) -> AsyncIterator[list[bytes]]:
    """The same bytes, a few pieces of together at least `size()` at a time, but for the last ones. Large pieces are
    passed on as they are, many small ones joined: a link that brings a few bytes at a time must not cost as many
    objects."""
    held: list[bytes] = []
    count = 0
    async for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= size():
            yield held
            held, count = [], 0
        elif len(held) == MOST_PIECES:
            held = [b"".join(held)]
    if held:
        yield held
