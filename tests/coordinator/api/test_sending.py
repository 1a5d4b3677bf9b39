"""How files go out where the kernel cannot send them as they are: over TLS, and on event loops without the call."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from coordinator.api import downloads
from coordinator.daemon import Listen
from tests.support.loopback import write_certificate

DELTA = "/v1/fragments/0/versions/1/delta"
PIECE = 64


@pytest.fixture
async def site(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that has brought fragment 0 to version 1, whose delta goes out in many pieces."""
    monkeypatch.setattr(downloads, "MOST_SENT", PIECE)
    monkeypatch.setattr(downloads, "LEAST_SENT", PIECE)
    (site,) = await fleet.trains("eu")
    await site.contribute(0, 0)
    await site.published(0, 1)
    return site


async def whole_and_parts(site: Any, **more: Any) -> tuple[bytes, bytes]:
    """The delta, and what its thirds are together."""
    whole = await site.ask("GET", DELTA, **more)
    third, parts = len(whole.body) // 3, b""
    assert (whole.status, third > PIECE) == (200, True)
    for span in (f"0-{third - 1}", f"{third}-{2 * third - 1}", f"{2 * third}-"):
        part = await site.ask("GET", DELTA, headers={"Range": f"bytes={span}"}, **more)
        assert part.status == 206
        parts += part.body
    return whole.body, parts


async def test_a_delta_and_its_ranges_are_the_same_over_tls(fleet: Any, site: Any, tmp_path: Path) -> None:
    plain, _ = await whole_and_parts(site)
    certificate, key = write_certificate(tmp_path)
    server = TestServer(fleet.api.app(), scheme="https")
    await server.start_server(ssl=Listen("127.0.0.1", 0, certificate, key).ssl_context())
    trusting = ssl.create_default_context(cafile=certificate)
    async with TestClient(server) as client:
        fleet.client, before = client, fleet.client
        try:
            assert await whole_and_parts(site, ssl=trusting) == (plain, plain)
        finally:
            fleet.client = before


async def test_a_loop_that_cannot_send_files_reads_and_writes_them(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = await whole_and_parts(site)
    asked = 0

    async def sendfile(*_: object, **__: object) -> int:
        nonlocal asked
        asked += 1
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "sendfile", sendfile)
    assert await whole_and_parts(site) == (plain, plain)
    assert asked == 4, "once for each answer"


async def test_a_loop_that_stops_sending_files_goes_on_where_it_was(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = await whole_and_parts(site)
    loop, left = asyncio.get_running_loop(), 2
    can = loop.sendfile

    async def sendfile(*args: Any, **named: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise NotImplementedError
        return await can(*args, **named)

    monkeypatch.setattr(loop, "sendfile", sendfile)
    assert (await site.ask("GET", DELTA)).body == plain
