"""The server around the coordinator: who asks nothing is not waited for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from coordinator import daemon
from coordinator.api.app import Api
from coordinator.service import Coordinator
from tests.coordinator.test_recovery import config


@pytest.mark.parametrize(
    "said", [b"", b"POST /v1/contributions HTTP/1.1\r\nHost: ", b"GET /healthz HTTP/1.1\r\n\r\nGE"]
)
async def test_half_a_header_is_not_waited_for(said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "IDLE_SECONDS", 0.01)
    coordinator: Any = await Coordinator.open(config(), tmp_path / "state", tmp_path)
    runner = daemon.runner_of(Api(coordinator, insecure=True))
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
        writer.write(said)
        await reader.read()  # until the server has closed it
        writer.close()
        await writer.wait_closed()
    finally:
        await runner.cleanup()
        await coordinator.stop()
