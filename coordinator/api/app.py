"""The aiohttp application of one coordinator: which path leads to which question."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from coordinator.api.bodies import pieces
from coordinator.api.downloads import Downloads, Tagged
from coordinator.api.errors import problems
from coordinator.api.status import run_document, status_document, versions_document
from coordinator.refused import Refused
from coordinator.service import Coordinator
from coordinator.tokens import check_token
from shared.names import PARTICIPANT_NAME, site_of
from shared.protocol import (
    DIGEST_HEADER,
    INLINE_BYTES,
    MEDIA_TYPE,
    MESSAGE_BYTES,
    PART_BYTES,
    SITE_HEADER,
    Code,
    Heartbeat,
    Join,
    Leave,
    Manifest,
    Message,
    OpenUpload,
    content_digest,
    is_damaged,
    pack,
    unpack,
)

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
EVENTS_SECONDS = 1.0
QUIET_SECONDS, SLOWEST_SECONDS = 60.0, 600.0
"""How long a body may pause, and how long one that is held in memory may take."""
DASHBOARD = Path(__file__).parent.parent / "dashboard" / "index.html"


class Api:
    """Request handlers over one coordinator. `insecure` takes a site at its word and is for loopback only."""

    def __init__(self, coordinator: Coordinator, *, insecure: bool) -> None:
        self._coordinator, self._insecure = coordinator, insecure
        self._stopping = False
        self.quiet_seconds = QUIET_SECONDS
        self._downloads = Downloads()

    def app(self) -> web.Application:
        c = self._coordinator
        app = web.Application(
            middlewares=[problems(c.metrics, c.knows_site)],
            client_max_size=PART_BYTES,
        )
        app.on_response_prepare.append(self._before_answer)
        fragment = "/v1/fragments/{fragment:[0-9]{1,9}}/versions/{version:[0-9]{1,15}}"
        app.add_routes(
            [
                web.post("/v1/join", self.join),
                web.get("/v1/join", self.preview),
                web.post("/v1/sites/{site}/heartbeat", self.heartbeat),
                web.post("/v1/sites/{site}/leave", self.leave),
                web.put("/v1/sites/{site}/manifest", self.describe),
                web.post("/v1/contributions", self.open_upload),
                web.put("/v1/contributions/{id:[0-9a-f]{32}}/parts/{part:[0-9]{1,9}}", self.put_part),
                web.post("/v1/contributions/{id:[0-9a-f]{32}}/commit", self.commit),
                web.get(fragment + "/delta", self.delta),
                web.get(fragment + "/snapshot", self.snapshot),
                web.get("/v1/versions", self.versions),
                web.get("/v1/run", self.run),
                web.get("/v1/status", self.status),
                web.get("/v1/events", self.events),
                web.get("/metrics", self.metrics),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/", self.dashboard),
                web.get("/favicon.ico", self.no_icon),
            ]
        )
        return app

    def close(self) -> None:
        """Ends the event streams, so that a graceful stop does not wait for browsers."""
        self._stopping = True

    # -- for sites

    async def join(self, request: web.Request) -> web.Response:
        site = self._site(request)
        message = unpack(Join, await self._body(request, site, MESSAGE_BYTES))
        _same(site, message.site)
        return _message(await self._coordinator.join(site, message))

    async def preview(self, request: web.Request) -> web.Response:
        """What a site would get if it joined; it stays outside."""
        self._site(request)
        return _message(self._coordinator.preview())

    async def heartbeat(self, request: web.Request) -> web.Response:
        site = self._site(request)
        _same(site, request.match_info["site"])
        message = unpack(Heartbeat, await self._body(request, site, MESSAGE_BYTES))
        return _message(await self._coordinator.heartbeat(site, message))

    async def leave(self, request: web.Request) -> web.Response:
        site = self._site(request)
        _same(site, request.match_info["site"])
        message = unpack(Leave, await self._body(request, site, MESSAGE_BYTES))
        await self._coordinator.leave(site, message.run, message.session)
        return web.Response(status=204)

    async def describe(self, request: web.Request) -> web.Response:
        site = self._site(request)
        _same(site, request.match_info["site"])
        message = unpack(Manifest, await self._body(request, site, MESSAGE_BYTES))
        await self._coordinator.describe(site, message)
        return web.Response(status=204)

    async def open_upload(self, request: web.Request) -> web.Response:
        site = self._site(request)
        limit = INLINE_BYTES + MESSAGE_BYTES
        message = unpack(OpenUpload, await self._body(request, site, limit, uploads=True), limit)
        self._coordinator.check_run(message.run)
        return _message(await self._coordinator.intake.open(site, message))

    async def put_part(self, request: web.Request) -> web.Response:
        site = self._site(request)
        intake = self._coordinator.intake
        if (transport := request.transport) is not None and hasattr(transport, "max_size"):
            # asyncio's own measure for one read of the socket: 256 KiB, which for a fast link is many.
            transport.max_size = intake.room
        body = self._pieces(request, site, PART_BYTES, uploads=True)
        id_, part = request.match_info["id"], int(request.match_info["part"])
        size = request.query.get("part_size", "")
        cut = int(size) if size.isdecimal() else None
        await intake.put_part(site, id_, part, body, cut)
        return web.Response(status=204)

    async def commit(self, request: web.Request) -> web.Response:
        site = self._site(request)
        await self._body(request, site, MESSAGE_BYTES)
        return _message(await self._coordinator.intake.commit(site, request.match_info["id"]))

    async def delta(self, request: web.Request) -> web.StreamResponse:
        self._reader(request)
        wait = _seconds(request.query.get("wait", "0"))
        path, digest = await self._coordinator.publication.delta(*_where(request), min(wait, LONGEST_WAIT_SECONDS))
        return self._immutable(request, path, digest)

    async def snapshot(self, request: web.Request) -> web.StreamResponse:
        self._reader(request)
        path, tag = await self._coordinator.publication.snapshot(*_where(request))
        return self._immutable(request, path, tag)

    # -- for people

    async def versions(self, request: web.Request) -> web.Response:
        return _json(versions_document(self._coordinator))

    async def run(self, request: web.Request) -> web.Response:
        return _json(run_document(self._coordinator))

    async def status(self, request: web.Request) -> web.Response:
        return _json(await status_document(self._coordinator))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the status, once a second while somebody looks."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        try:
            while not self._stopping:
                data = json.dumps(await status_document(self._coordinator))
                await response.write(f"event: status\ndata: {data}\n\n".encode())
                await asyncio.sleep(EVENTS_SECONDS)
        except ConnectionResetError:
            log.debug("an event stream's reader went away")
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=await self._coordinator.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        fault = self._coordinator.workers.storage_fault
        return web.Response(text="ok\n") if fault is None else web.Response(status=503, text=f"storage: {fault}\n")

    async def dashboard(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(DASHBOARD, headers={"Cache-Control": "no-cache"})

    async def no_icon(self, request: web.Request) -> web.Response:
        """Browsers ask for one with each page; that is no refusal to count."""
        return web.Response(status=204, headers={"Cache-Control": "public, max-age=86400"})

    # -- bounds and rights

    def _site(self, request: web.Request) -> str:
        """The site or the learner that calls, once its token has been found to be its site's own."""
        site = request.headers.get(SITE_HEADER, "")
        if not re.fullmatch(PARTICIPANT_NAME, site):
            raise Refused(Code.UNAUTHORIZED, f"the header {SITE_HEADER} must name the site that calls")
        if self._insecure:
            return site
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not check_token(self._coordinator.reader, site_of(site), token.strip()):
            # A site has one token for all of a run's coordinators.
            same = " --token-file FILE" if len(self._coordinator.config.run.coordinators) > 1 else ""
            add = f"isthmus coordinator token add {site_of(site)} --state DIR{same}"
            raise Refused(Code.UNAUTHORIZED, f"no valid token for site {site_of(site)}; make one with: {add}")
        return site

    def _reader(self, request: web.Request) -> None:
        """The caller of an immutable object: a site, which may name the run that it thinks it reads from."""
        self._site(request)
        if (run := request.query.get("run")) is not None:
            self._coordinator.check_run(run)

    async def _body(self, request: web.Request, site: str, limit: int, *, uploads: bool = False) -> bytes:
        """The whole body as it was sent, bounded: in size, and in the time that it may take."""
        try:
            async with asyncio.timeout(SLOWEST_SECONDS):
                body = b"".join([piece async for piece in self._pieces(request, site, limit, uploads=uploads)])
        except TimeoutError:
            raise Refused(Code.CUT, f"the body did not come within {SLOWEST_SECONDS:g} s") from None
        encoded = "Content-Encoding" in request.headers  # and what was sent is not what is here
        if not encoded and is_damaged(body, request.headers.get(DIGEST_HEADER)):
            raise Refused(Code.CUT, f"the body was damaged on its way: it is not what {DIGEST_HEADER} says")
        return body

    def _pieces(self, request: web.Request, site: str, limit: int, *, uploads: bool = False) -> AsyncIterator[bytes]:
        """The body as it comes in, bounded; every piece renews the site's lease. `uploads`: it is of a contribution."""
        core, clock = self._coordinator.core, self._coordinator.clock
        counted = self._coordinator.metrics.bytes_in.labels(site) if site in core.roster else None

        def arrived(count: int) -> None:
            core.bytes_arrived(site, clock(), uploads=uploads)
            if counted is not None:
                counted.inc(count)

        return pieces(request, limit, self.quiet_seconds, arrived)

    def _immutable(self, request: web.Request, path: Path, digest: str) -> web.StreamResponse:
        """A file that never changes, for caches on the way too; Range and If-None-Match work."""
        headers = {
            "Cache-Control": "public, max-age=31536000, immutable",
            "ETag": f'"{digest}"',
            "Content-Type": "application/octet-stream",
        }
        if f'"{digest}"' in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        return Tagged(path, headers, self._downloads)

    async def _before_answer(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, Tagged):
            response.headers["ETag"] = response.tag
        site = request.headers.get(SITE_HEADER, "")
        sent = 0 if request.method == "HEAD" else response.content_length
        if site in self._coordinator.core.roster and sent:
            self._coordinator.metrics.bytes_out.labels(site).inc(sent)


def _same(site: str, named: str) -> None:
    if site != named:
        raise Refused(Code.NOT_YOUR_SITE, f"site {site} cannot act as {named[:64]}")


def _where(request: web.Request) -> tuple[int, int]:
    return int(request.match_info["fragment"]), int(request.match_info["version"])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise Refused(Code.BAD_REQUEST, f"wait: {text[:32]!r} is not a number of seconds from 0")
    return seconds


def _message(message: Message) -> web.Response:
    body = pack(message)
    return web.Response(body=body, content_type=MEDIA_TYPE, headers={DIGEST_HEADER: content_digest(body)})


def _json(document: object) -> web.Response:
    return web.json_response(document, headers={"Cache-Control": "no-store"})
