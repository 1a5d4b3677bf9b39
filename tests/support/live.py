"""A real coordinator behind real HTTP on a loopback port of its own, and real site agents, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from coordinator.api.app import Api
from coordinator.service import Coordinator
from shared.config import RunConfig, SiteConfig, parse
from site_agent.agent import Agent
from site_agent.news import Stop

TOY = Path(__file__).parent / "toy.py"


def run_config(tables: dict[str, dict[str, Any]]) -> RunConfig:
    """A run config from its tables, checked as a file would be."""
    return parse(RunConfig, tables, "run.toml")


def site_config(name: str, url: str, directory: Path, **tables: dict[str, Any]) -> SiteConfig:
    """A site's config with local state under `directory`, on the CPU, without a metrics port."""
    site = {"name": name, "coordinator": url, "state": f"state-{name}", **tables.pop("site", {})}
    devices = {"device": "cpu", **tables.pop("devices", {})}
    config = parse(SiteConfig, {"site": site, "devices": devices, "metrics": {"port": 0}, **tables}, "site.toml")
    return config.model_copy(update={"base": directory})


class Live:
    """A served coordinator. `call` runs a coroutine on its loop; `weather` stands between it and every request. `shard`
    is which of several it is, `door` the socket that it listens on. `insecure`: it asks for no tokens."""

    def __init__(
        self,
        config: RunConfig,
        state: Path,
        weather: Middleware | None = None,
        shard: int | None = None,
        door: socket.socket | None = None,
        *,
        insecure: bool = True,
    ) -> None:
        self._weather, self._shard, self._door, self._insecure = weather, shard, door, insecure
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.coordinator, self._runner, self._api, self.url = self.call(self._start(config, state))

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=120)

    async def _start(self, config: RunConfig, state: Path) -> tuple[Coordinator, web.AppRunner, Api, str]:
        coordinator = await Coordinator.open(config, state, state.parent, shard=self._shard)
        api = Api(coordinator, insecure=self._insecure)
        app = api.app()
        if self._weather is not None:
            app.middlewares.insert(0, self._weather)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        if self._door is None:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        else:
            await web.SockSite(runner, self._door.dup()).start()
        await coordinator.start()
        return coordinator, runner, api, f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _stop(self) -> None:
        self._api.close()
        self.coordinator.publication.close()
        await self._runner.cleanup()
        await self.coordinator.stop()

    def stop(self) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def digests(self) -> list[tuple[int, str]]:
        """(version, digest) of each fragment's newest published version."""
        return [(newest.version, newest.digest) for newest in self.coordinator.publication.newest]


@contextmanager
def doors(count: int) -> Iterator[list[socket.socket]]:
    """Sockets on loopback ports of their own, for coordinators whose URLs must be known before they are there, and
    that come back at the same one."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]


def url_of(door: socket.socket) -> str:
    """Where a coordinator at this door is found."""
    return f"http://127.0.0.1:{door.getsockname()[1]}"


@contextmanager
def live(
    config: RunConfig,
    state: Path,
    weather: Middleware | None = None,
    shard: int | None = None,
    door: socket.socket | None = None,
    *,
    insecure: bool = True,
) -> Iterator[Live]:
    """A coordinator for the length of the block."""
    served = Live(config, state, weather, shard, door, insecure=insecure)
    try:
        yield served
    finally:
        served.stop()


def train(*agents: Agent) -> None:
    """Runs the agents, each in a thread of its own, until the run is finished; the first error is raised here."""
    errors: list[BaseException] = []

    def run(agent: Agent) -> None:
        try:
            agent.run()
        except BaseException as error:
            errors.append(error)
            for other in agents:
                other.courier.events.put(Stop(15))

    threads = [threading.Thread(target=run, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
