"""What a site asks of its coordinator: requests that are tried again until an answer comes.

Every request is idempotent by design, so trying again is always right. What is transient (no
connection, a time-out, 5xx, 408, 429) is tried again with exponential backoff and full jitter, within the
patience that the caller gives; a problem document is an answer, and becomes RefusedError. A download that
was cut goes on where it stopped. Heartbeats have a connection of their own: a link that is full of tensors
must not cost the site its lease.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import TypeVar

from shared.errors import FaultError, FormatError, RefusedError
from shared.protocol import (
    DIGEST_HEADER,
    INLINE_BYTES,
    PROTOCOL,
    Code,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Manifest,
    Message,
    OpenUpload,
    Orders,
    Outcome,
    Preview,
    Upload,
    content_digest,
    is_damaged,
    pack,
    unpack,
)
from shared.wire import blob_digest
from site_agent.core.upload_pace import UploadPace
from site_agent.transport import Reply, Request, TransientError, Transport

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

WAIT_SECONDS = 20.0
BACKOFF_FIRST, BACKOFF_LONGEST = 0.2, 15.0
MEASURED_BYTES = 1 << 20
"""A download of less comes out of buffers, and says little of the link."""
SHORTEST_SECONDS = 1e-3
DAMAGED = 5
"""An object that comes whole and wrong so often is not damaged on its way."""
FAILURES = 3
"""After so many in a row of one request the coordinator counts as out of reach."""
_TRANSIENT = {408, 425, 429}
_DIGEST = re.compile("[0-9a-f]{64}")


class Refusal(RefusedError):
    """A refusal by problem document; `version` is the newest one, where the coordinator named it."""

    def __init__(self, code: str, detail: str, version: int | None) -> None:
        super().__init__(code, detail)
        self.version = version


class _BrokeError(Exception):
    """A request that took long and failed, and would do better in another shape."""


def backoff(attempt: int, chance: float) -> float:
    """Seconds to wait before try `attempt` (from 1), for a uniform `chance` in [0, 1): full jitter."""
    return chance * float(min(BACKOFF_LONGEST, BACKOFF_FIRST * 2.0 ** min(attempt - 1, 16)))


class Link:
    """The requests of site `site`, over `transport`. Use as an async context manager, within one event loop.

    `patience` is for how many seconds a request is tried again before FaultError. `download_rate`: bytes per second
    that the link brought during the last download of `measured_bytes` or more; None before the first.
    """

    def __init__(self, transport: Transport, site: str, patience: float) -> None:
        self.patience = patience
        self.inline_bytes, self.measured_bytes = INLINE_BYTES, MEASURED_BYTES
        self.download_rate: float | None = None
        self.pace = UploadPace()
        self.in_touch: Callable[[bool], None] = lambda ok: None
        """Told whether the coordinator answers on the control connection, with each answer and at the third failure."""
        self.run = ""
        self._transport, self._site = transport, site

    @property
    def url(self) -> str:
        """Where the coordinator is."""
        return self._transport.url

    async def __aenter__(self) -> Link:
        await self._transport.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    # -- the control connection

    async def join(self, software: dict[str, str], patience: float | None = None) -> Joined:
        message = Join(protocol=PROTOCOL, site=self._site, software=software)
        body = await self._ask(_with("POST", "/v1/join", message, control=True), patience)
        joined = _understood(Joined, body, 64 << 20)
        # Once: whoever joins again compares, and must not be overtaken by requests that name another run.
        self.run = self.run or joined.run
        return joined

    async def heartbeat(self, message: Heartbeat, patience: float | None = None) -> Orders:
        path = f"/v1/sites/{self._site}/heartbeat"
        body = await self._ask(_with("POST", path, message, control=True), patience)
        return _understood(Orders, body)

    async def describe(self, digest: str, sizes: list[int]) -> None:
        message = Manifest(run=self.run, digest=digest, sizes=sizes)
        await self._ask(_with("PUT", f"/v1/sites/{self._site}/manifest", message, control=True))

    async def leave(self, session: str, patience: float) -> None:
        message, path = Leave(run=self.run, session=session), f"/v1/sites/{self._site}/leave"
        await self._ask(_with("POST", path, message, control=True), patience)

    async def preview(self) -> Preview:
        """The run as this site would join it, without joining."""
        return _understood(Preview, await self._ask(Request("GET", "/v1/join", control=True)), 64 << 20)

    async def ping(self) -> None:
        """The least that a round trip can be."""
        await self._ask(Request("GET", "/healthz", control=True), 0.0)

    # -- contributions

    async def contribute(self, opening: OpenUpload, body: bytes) -> Outcome:
        """Uploads a contribution, in one request or in parallel parts, and returns what became of it."""
        while True:
            announcement = self._with_body(opening, body)
            request = _with("POST", "/v1/contributions", announcement)
            try:
                cut = partial(self.pace.broke, len(announcement.body or b""))
                upload = _understood(Upload, await self._ask(request, broke=cut))
                if upload.outcome is not None:
                    return upload.outcome
                return await self._send_parts(upload, body)
            except _BrokeError as error:
                pace = self.pace
                log.info("%s; parts of %d bytes, %d at a time, from now on", error, pace.part_bytes, pace.connections)
            except RefusedError as error:
                # The coordinator was started anew and forgot the open upload: opened again, it goes on.
                if error.code not in (Code.UNKNOWN_UPLOAD, Code.INCOMPLETE):
                    raise
                await asyncio.sleep(backoff(1, random.random()))

    def _with_body(self, opening: OpenUpload, body: bytes) -> OpenUpload:
        """The announcement, with the body in it where that makes one request of the two."""
        small = len(body) <= min(self.inline_bytes, self.pace.part_bytes)
        return opening.model_copy(update={"part_size": self.pace.part_bytes, "body": body if small else None})

    async def _send_parts(self, upload: Upload, body: bytes) -> Outcome:
        size, path = upload.part_size, f"/v1/contributions/{upload.id}"
        missing = [n for n in reversed(range(-(-len(body) // size))) if n not in upload.parts]
        clock = asyncio.get_running_loop().time
        begun, whole = clock(), sum(min(size, len(body) - n * size) for n in missing)

        async def lane() -> None:
            while missing:
                n, began = missing.pop(), clock()
                part = body[n * size : (n + 1) * size]
                request = Request("PUT", f"{path}/parts/{n}", {"part_size": str(size)}, part)
                try:
                    await self._ask(request, broke=partial(self.pace.broke, len(part)))
                except BaseException:
                    missing.clear()
                    raise
                self.pace.took(len(part), clock() - began)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_plainly(lane())) for _ in range(min(self.pace.connections, len(missing)))]
        for task in tasks:
            if (error := task.result()) is not None:
                raise error
        self.pace.sent(whole, clock() - begun)
        return _understood(Outcome, await self._ask(Request("POST", f"{path}/commit", body=b"")))

    # -- published versions

    async def delta(self, fragment: int, version: int) -> bytes:
        """The delta to `version`, waiting for it as long as it takes. Raises Refusal (version-gone)."""
        path = f"/v1/fragments/{fragment}/versions/{version}/delta"
        while True:
            try:
                return await self._ask(Request("GET", path, {"wait": f"{WAIT_SECONDS:g}"}))
            except Refusal as refusal:
                if refusal.code != Code.NOT_PUBLISHED:
                    raise

    async def snapshot(self, fragment: int, version: int) -> bytes:
        """The snapshot of `version`. Raises Refusal (version-gone, not-published)."""
        return await self._ask(Request("GET", f"/v1/fragments/{fragment}/versions/{version}/snapshot"))

    # -- one request

    async def _ask(
        self, request: Request, patience: float | None = None, broke: Callable[[float], bool] | None = None
    ) -> bytes:
        """The answer's body. Raises Refusal for a problem document, FaultError when the patience is at its end, and
        _BrokeError where `broke`, told how many seconds a failed try took, would have it tried otherwise."""
        clock = asyncio.get_running_loop().time
        began, attempt = clock(), 0
        if request.method == "GET" and self.run:
            request = replace(request, query={**request.query, "run": self.run})
        download = _Download()
        while True:
            attempt += 1
            tried = clock()
            try:
                body = await download.take(await self._once(download.rest_of(request)))
                if request.control:
                    self.pace.answered(clock() - tried)
                    self.in_touch(True)
                elif len(body) >= self.measured_bytes and download.rate > 0:
                    self.download_rate = download.rate
                return body
            except TransientError as error:
                fault = str(error)
                if broke is not None and broke(clock() - tried):
                    raise _BrokeError(f"{request.path} was cut off after {clock() - tried:.0f} s ({fault})") from None
                if download.damaged >= DAMAGED:
                    raise Refusal(Code.VERSION_GONE, f"{request.path} is damaged at the coordinator", None) from None
                if gets_on := download.keep(error.partial):
                    began, attempt = clock(), 1
            left = (self.patience if patience is None else patience) - (clock() - began)
            if left <= 0 and not gets_on:
                raise FaultError(
                    f"the coordinator at {self.url} cannot be reached ({fault}); "
                    "check [site] coordinator and the network"
                )
            pause = min(max(left, 0.0), backoff(attempt, random.random()))
            if request.control and attempt == FAILURES:
                self.in_touch(False)
            level = logging.WARNING if attempt in (3, 10, 30) else logging.DEBUG
            log.log(level, "%s: %s; trying again", request.path, fault)
            await asyncio.sleep(pause)

    async def _once(self, request: Request) -> Reply:
        reply = await self._transport.send(request)
        if is_damaged(reply.body, reply.headers.get(DIGEST_HEADER.lower())):
            raise TransientError("the answer was damaged on its way")
        if reply.status < 300:
            return reply
        problem = _problem(reply.body, reply.status)
        if reply.status >= 500 or reply.status in _TRANSIENT:
            raise TransientError(f"{reply.status} {problem.detail}")
        raise problem


class _Download:
    """What has come of an immutable object whose transfer was cut, and how the rest of it is asked for."""

    def __init__(self) -> None:
        self._tag, self._whole, self._got = "", 0, bytearray()
        self._carried, self._seconds = 0, 0.0
        self.damaged = 0

    @property
    def rate(self) -> float:
        """Bytes per second that the link brought while the object came: neither the wait before it nor pauses between
        tries count. 0 where nobody timed it."""
        return self._carried / max(self._seconds, SHORTEST_SECONDS)

    def rest_of(self, request: Request) -> Request:
        if not self._got:
            return request
        return replace(request, headers={"Range": f"bytes={len(self._got)}-", "If-Range": self._tag})

    def keep(self, partial: Reply | None) -> bool:
        """Keeps what came before a cut, where it can be gone on with; whether there was anything."""
        if partial is None or not partial.body or not self._fits(partial):
            return False
        if partial.status == 200:
            self._tag, self._got = partial.headers.get("etag", ""), bytearray()
            self._whole = int(partial.headers["content-length"])
            self._carried, self._seconds = 0, 0.0
        self._got += partial.body
        self._time(partial)
        return True

    async def take(self, reply: Reply) -> bytes:
        """The whole body. Raises TransientError where the answer does not go on from what is here, or where the whole
        is not what its tag says: an object's tag is the BLAKE3 of its bytes."""
        body, tag = reply.body, reply.headers.get("etag", "").strip('"')
        if reply.status == 206:
            fits = self._fits(reply) and len(self._got) + len(reply.body) == self._whole
            body = bytes(self._got + reply.body)
            self._got.clear()
            if not fits:
                raise TransientError("the rest of a download does not fit its beginning")
        else:
            self._carried, self._seconds = 0, 0.0
        self._time(reply)
        if _DIGEST.fullmatch(tag) and await asyncio.to_thread(blob_digest, body) != tag:
            self.damaged += 1
            raise TransientError("the object was damaged on its way")
        return body

    def _time(self, reply: Reply) -> None:
        self._carried += reply.carried
        self._seconds += reply.seconds

    def _fits(self, reply: Reply) -> bool:
        """Whether the answer can be gone on with (a tag that names exact bytes), or goes on from what is here."""
        tag = reply.headers.get("etag", "")
        if reply.status == 200:
            return tag.startswith('"') and reply.headers.get("content-length", "").isdigit()
        span = reply.headers.get("content-range", "")
        return reply.status == 206 and tag == self._tag and span.startswith(f"bytes {len(self._got)}-")


async def _plainly(work: Coroutine[None, None, None]) -> Exception | None:
    """The error that `work` ends in, as a value: a task group would wrap it, and callers look at its code."""
    try:
        await work
    except (RefusedError, FaultError, _BrokeError) as error:
        return error
    return None


def _with(method: str, path: str, message: Message, *, control: bool = False) -> Request:
    """A request that carries a message."""
    body = pack(message)
    return Request(method, path, body=body, headers={DIGEST_HEADER: content_digest(body)}, control=control)


def _problem(data: bytes, status: int) -> Refusal:
    try:
        document = json.loads(data)
        version = document.get("version")
        return Refusal(
            str(document["code"]), str(document.get("detail", "")), version if isinstance(version, int) else None
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        code = Code.NOT_FOUND if status == 404 else Code.BAD_REQUEST
        return Refusal(code, f"the answer was {status}, and not from a coordinator", None)


def _understood(kind: type[M], data: bytes, limit: int = 1 << 20) -> M:
    try:
        return unpack(kind, data, limit)
    except FormatError as error:
        raise FaultError(f"the coordinator's answer is not understood: {error}; is it of the same version?") from None
