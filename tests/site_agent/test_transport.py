"""One request over real connections: what came, and what the link did meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from site_agent.transport import Credentials, Http, Request, TransientError

PIECE = bytes(1000)


class Stage:
    """A server and a site's transport, and between them a clock that only `later` moves."""

    def __init__(self) -> None:
        self.now, self.received = 0.0, 0
        self._news = asyncio.Event()
        self.http: Http

    def later(self, seconds: float) -> None:
        self.now += seconds

    async def has(self, size: int) -> None:
        """Until so many bytes are at the site."""
        while self.received < size:
            await self._news.wait()
            self._news.clear()

    def counted(self, up: int, down: int) -> None:
        self.received += down
        self._news.set()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def on(stage: Stage, handler: Handler) -> AsyncIterator[Http]:
    app = web.Application()
    app.router.add_get("/{name}", handler)
    async with TestServer(app) as server:
        http = Http(str(server.make_url("")), Credentials("eu", None, None), stage.counted, lambda: stage.now)
        await http.open()
        try:
            yield http
        finally:
            await http.close()


async def test_a_download_is_timed_from_its_head_to_its_last_byte() -> None:
    """Not the long poll before it, nor the silence after it, nor what came earlier."""
    stage = Stage()

    async def answer(request: web.Request) -> web.StreamResponse:
        stage.later(20.0)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(2):
            received = stage.received
            await response.write(PIECE)
            await stage.has(received + 1000)
            stage.later(3.0)
        return response

    async with on(stage, answer) as http:
        for _ in range(2):
            reply = await http.send(Request("GET", "/object"))
            assert (len(reply.body), reply.carried, reply.seconds) == (2000, 2000, 3.0)


async def test_what_other_downloads_bring_meanwhile_is_the_links_too() -> None:
    stage, both = Stage(), asyncio.Barrier(2)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(PIECE)
        await stage.has(2000)
        if request.path == "/long":
            await both.wait()
            stage.later(4.0)
            await response.write(PIECE)
        else:
            stage.later(2.0)
            await response.write(PIECE)
            await stage.has(3000)
            await both.wait()
        return response

    async with on(stage, answer) as http:
        long, short = await asyncio.gather(*(http.send(Request("GET", path)) for path in ("/long", "/short")))
    assert len(long.body) == len(short.body) == 2000
    # Whichever began first has the first thousand of the other one in its time as well.
    assert (short.seconds, long.seconds) == (2.0, 6.0)
    assert short.carried in (2000, 3000)
    assert long.carried in (3000, 4000)


async def test_what_came_of_a_download_that_was_cut_is_timed_too() -> None:
    stage = Stage()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "3000"})
        await response.prepare(request)
        await response.write(PIECE)
        await stage.has(1000)
        stage.later(2.0)
        await response.write(PIECE)
        await stage.has(2000)
        stage.later(60.0)
        assert request.transport is not None
        request.transport.close()
        return response

    async with on(stage, answer) as http:
        with pytest.raises(TransientError) as cut:
            await http.send(Request("GET", "/object"))
    assert cut.value.partial is not None
    assert (cut.value.partial.carried, cut.value.partial.seconds) == (2000, 2.0)
