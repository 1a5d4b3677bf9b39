"""The server around the coordinator: who asks nothing is not waited for."""

from __future__ import annotations

import asyncio
import gc
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


def test_what_the_start_has_made_is_out_of_the_collectors_sight() -> None:
    made = [[n] for n in range(1000)]
    try:
        daemon.settle_garbage_collection()
        watched = {id(each) for each in gc.get_objects()}
        assert not any(id(each) in watched for each in made)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("listen", "clear"),
    [
        (daemon.Listen("0.0.0.0", 1), True),
        (daemon.Listen("0.0.0.0", 1, Path("certificate"), Path("key")), False),
        (daemon.Listen("127.0.0.1", 1), False),
        (daemon.Listen("localhost", 1, insecure=True), False),
    ],
)
def test_a_port_that_tokens_come_to_without_tls_is_known(listen: daemon.Listen, clear: bool) -> None:
    assert listen.in_the_clear is clear
