"""The network between sites and coordinator: the real request handlers, without sockets.

A request travels as the site's link sends it and is answered by the handler that the path leads to. On the way it can
be lost, held up, repeated or damaged, and so can the answer. The body arrives in pieces at the link's rate.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol

from aiohttp import web

from coordinator.api.app import Api
from coordinator.api.errors import problems
from lab.simulator.disk import Crashed
from shared.protocol import SITE_HEADER
from site_agent.transport import Reply, Request, TransientError, Transport

QUIET_SECONDS = 15.0
LEAST_SECONDS, PIECE_SECONDS = 0.01, 1.0
"""What takes less time on its way takes none; what takes longer arrives in pieces."""
_FRAGMENT = r"/v1/fragments/(?P<fragment>[0-9]{1,9})/versions/(?P<version>[0-9]{1,15})"
_ROUTES = [
    ("POST", re.compile(r"/v1/join"), "join"),
    ("POST", re.compile(r"/v1/sites/(?P<site>[^/]+)/heartbeat"), "heartbeat"),
    ("POST", re.compile(r"/v1/sites/(?P<site>[^/]+)/leave"), "leave"),
    ("PUT", re.compile(r"/v1/sites/(?P<site>[^/]+)/manifest"), "describe"),
    ("POST", re.compile(r"/v1/contributions"), "open_upload"),
    ("PUT", re.compile(r"/v1/contributions/(?P<id>[0-9a-f]{32})/parts/(?P<part>[0-9]{1,9})"), "put_part"),
    ("POST", re.compile(r"/v1/contributions/(?P<id>[0-9a-f]{32})/commit"), "commit"),
    ("GET", re.compile(_FRAGMENT + "/delta"), "delta"),
    ("GET", re.compile(_FRAGMENT + "/snapshot"), "snapshot"),
]


@dataclass
class Weather:
    """How bad a link is: seconds of one way, bytes a second, and the chances of each misfortune per request."""

    latency: float = 0.05
    rate: float = 1e6
    lost: float = 0.0
    unanswered: float = 0.0
    held_up: float = 0.0
    repeated: float = 0.0
    garbled: float = 0.0
    damaged: float = 0.0
    starves_control: bool = False
    """Uploads hold up heartbeats for as long as they last."""


@dataclass
class Wire:
    """A site's link as it is now; `cut` is whether anything gets through."""

    weather: Weather
    cut: bool = False
    uploading: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def upload(self, change: int) -> None:
        """One upload more, or less; of a site that died there are none."""
        self.uploading = max(0, self.uploading + change)
        if not self.uploading:
            self._idle.set()
            self._idle = asyncio.Event()

    async def idle(self) -> None:
        """Until no upload is under way."""
        while self.uploading:
            await self._idle.wait()


class Server(Protocol):
    """Where requests arrive. `answer` runs the work in the server's own life: if that ends, so does the request."""

    def answer(self, work: Callable[[], Awaitable[Reply]]) -> asyncio.Future[Reply] | None: ...


class _Content:
    """What the handlers use of aiohttp's StreamReader; `heard` is called for each piece."""

    def __init__(self, pieces: AsyncIterator[bytes], heard: Callable[[], None]) -> None:
        self._pieces, self._heard, self._ended = pieces, heard, False
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def readchunk(self) -> tuple[bytes, bool]:
        reading = asyncio.ensure_future(anext(self._pieces, None))
        either: set[asyncio.Future[Any]] = {reading, self._broken}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            piece = reading.result()
        finally:
            reading.cancel()
        if piece is None:
            self._ended = True
            return b"", False
        self._heard()
        return piece, False

    def at_eof(self) -> bool:
        return self._ended

    def set_exception(self, error: BaseException) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
            self._broken.exception()  # whether or not anyone reads on


class Routes:
    """The handlers of one coordinator, by path, behind its own middleware for refusals."""

    def __init__(self, api: Api, heard: Callable[[str], None]) -> None:
        coordinator = api._coordinator
        self._api, self._heard = api, heard
        self._middleware = problems(coordinator.metrics, coordinator.knows_site)

    async def handle(self, site: str, request: Request, pieces: AsyncIterator[bytes]) -> Reply:
        for method, pattern, name in _ROUTES:
            if method == request.method and (match := pattern.fullmatch(request.path)) is not None:
                handler = getattr(self._api, name)
                fake = self._request(site, request, match.groupdict(), pieces)
                answer = await self._middleware(fake, handler)
                return _reply(answer, request)
        return Reply(404, {}, b"")

    def _request(self, site: str, request: Request, match: Mapping[str, str], pieces: AsyncIterator[bytes]) -> Any:
        """What the handlers look at of a request."""
        headers = {SITE_HEADER: site, **request.headers}
        return SimpleNamespace(
            method=request.method,
            path=request.path,
            headers=headers,
            match_info=match,
            query=request.query,
            content_length=len(request.body or b""),
            content=_Content(pieces, lambda: self._heard(site)),
            transport=None,
        )


def _reply(answer: web.StreamResponse, request: Request) -> Reply:
    """What would be sent; of a file the rest only, where that is asked for."""
    headers = {name.lower(): value for name, value in answer.headers.items()}
    if isinstance(answer, web.FileResponse):
        body, status = answer._path.read_bytes(), 200
        span = re.fullmatch(r"bytes=([0-9]+)-", request.headers.get("Range", ""))
        if span is not None and request.headers.get("If-Range") == headers["etag"]:
            begin, status = int(span[1]), 206
            headers["content-range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            body = body[begin:]
        headers["content-length"] = str(len(body))
        return Reply(status, headers, body)
    body = getattr(answer, "body", None) or b""
    return Reply(answer.status, headers, bytes(body))


@dataclass
class Imagined(Transport):
    """A site's connections. `server` is whatever coordinator there is at the moment; `routes` its handlers."""

    site: str
    wire: Wire
    server: Server
    routes: Callable[[], Routes | None]
    rng: random.Random
    url: str = "imagined://coordinator"
    _copies: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, request: Request) -> Reply:
        chance, weather = self.rng.random, self.wire.weather
        if chance() < weather.repeated:
            self._copy(request, self.rng.uniform(0, 40))
        if request.body and chance() < weather.garbled:
            self._copy(_garbled(request, self.rng), self.rng.uniform(0, 5))
        if request.control and weather.starves_control:
            await self.wire.idle()
        if chance() < weather.held_up:
            await asyncio.sleep(self.rng.uniform(1, 20))
        lost, unanswered = chance() < weather.lost, chance() < weather.unanswered
        await asyncio.sleep(weather.latency * self.rng.uniform(0.5, 1.5))
        if lost or self.wire.cut:
            await asyncio.sleep(QUIET_SECONDS)
            raise TransientError("no answer in time")
        try:
            async with asyncio.timeout(QUIET_SECONDS + (len(request.body or b"") / weather.rate)):
                reply = await self._deliver(request)
        except TimeoutError:
            raise TransientError("no answer in time") from None
        await asyncio.sleep(weather.latency * self.rng.uniform(0.5, 1.5))
        if unanswered or self.wire.cut:
            await asyncio.sleep(QUIET_SECONDS * self.rng.random())
            raise TransientError("cut")
        reply = replace(reply, carried=len(reply.body), seconds=len(reply.body) / weather.rate)
        if reply.body and chance() < weather.damaged:
            return self._damaged(reply)
        return reply

    async def _deliver(self, request: Request) -> Reply:
        routes = self.routes()
        if routes is None:
            raise TransientError("connection refused")

        async def work() -> Reply:
            return await routes.handle(self.site, request, self._pieces(request.body or b""))

        answer = self.server.answer(work)
        if answer is None:
            raise TransientError("connection refused")
        try:
            return await asyncio.shield(answer)
        except Crashed:
            raise TransientError("connection reset") from None
        except asyncio.CancelledError:
            if answer.cancelled():
                raise TransientError("connection reset") from None
            raise

    async def _pieces(self, body: bytes) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        self.wire.upload(1)
        try:
            rate = self.wire.weather.rate
            size = len(body) if len(body) < rate * PIECE_SECONDS else -(-len(body) // 4)
            for at in range(0, len(body), max(1, size)):
                piece = body[at : at + size]
                if (seconds := len(piece) / rate) > LEAST_SECONDS:
                    await asyncio.sleep(seconds)
                if self.wire.cut:
                    raise web.RequestPayloadError("cut")
                yield piece
        finally:
            self.wire.upload(-1)

    def _copy(self, request: Request, delay: float) -> None:
        """The same request once more, later; nobody waits for its answer."""

        async def again() -> None:
            await asyncio.sleep(delay)
            if not self.wire.cut:
                try:
                    await self._deliver(request)
                except (TransientError, asyncio.CancelledError):
                    return

        task = asyncio.get_running_loop().create_task(again())
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    def _damaged(self, reply: Reply) -> Reply:
        """An answer that arrives cut, or with a bit that is another."""
        if self.rng.random() < 0.5:
            half = replace(
                reply,
                body=reply.body[: len(reply.body) // 2],
                carried=reply.carried // 2,
                seconds=reply.seconds / 2,
            )
            raise TransientError("cut", half)
        body = bytearray(reply.body)
        body[self.rng.randrange(len(body))] ^= 1 << self.rng.randrange(8)
        return replace(reply, body=bytes(body))


def _garbled(request: Request, rng: random.Random) -> Request:
    """The same request with a body that was cut, or in which one byte is another."""
    body = bytearray(request.body or b"")
    if rng.random() < 0.5:
        del body[rng.randrange(len(body)) :]
    else:
        body[rng.randrange(len(body))] = rng.randrange(256)
    return Request(request.method, request.path, request.query, bytes(body), request.headers, request.control)
