"""`isthmus coordinator serve`: one coordinator behind one HTTP server, from start to a graceful stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import resource
import signal
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from coordinator.api.app import Api
from coordinator.lag import watch_lag
from coordinator.service import Coordinator
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.sharding import slice_of

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0
IDLE_SECONDS = 90.0
"""A connection on which nothing is asked, or only half a header comes, is let go; sites keep an idle one for 60 s."""


@dataclass(frozen=True)
class Listen:
    """Where and how to serve. `insecure` means without tokens, and is refused beyond loopback."""

    host: str
    port: int
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    insecure: bool = False

    def check(self) -> None:
        """Raises ConfigError for settings that do not go together."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: name both, or neither")
        if self.client_ca is not None and self.tls_cert is None:
            raise ConfigError("--client-ca needs --tls-cert and --tls-key")
        if self.insecure and not _loopback(self.host):
            raise ConfigError(
                f"--insecure lets anyone act as any site and so serves loopback only, not {self.host}; "
                "use --host 127.0.0.1, or drop --insecure and give each site a token"
            )

    @property
    def in_the_clear(self) -> bool:
        """Whether tokens come to this port over a network without TLS."""
        return self.tls_cert is None and not self.insecure and not _loopback(self.host)

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS side of the server; with `client_ca`, only clients with a certificate of it get in."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--tls-cert, --tls-key or --client-ca cannot be used: {error}") from None
        return context


async def serve(config: RunConfig, state: Path, base: Path, listen: Listen, shard: int | None = None) -> None:
    """Serves until SIGTERM or SIGINT; see `Coordinator.open`. Raises ConfigError, CorruptError, OSError, and what
    `failure` holds."""
    listen.check()
    slice_of(config.run.coordinators, shard)
    tls = listen.ssl_context()
    _allow_many_files()
    # Before anything is made or read: a port that cannot be had must leave no run behind.
    sockets = await _bound(listen)
    # Until a run is open a signal just ends the process: recovery can be broken off anywhere. (Python's own handler
    # for SIGINT would wait for the thread that recovers.)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        coordinator = await Coordinator.open(config, state, base, shard=shard)
    except BaseException:
        for socket_ in sockets:
            socket_.close()
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt)
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    api = Api(coordinator, insecure=listen.insecure)
    runner = runner_of(api)
    try:
        await runner.setup()
        for socket_ in sockets:
            try:
                await web.SockSite(runner, socket_, ssl_context=tls).start()
            except OSError as error:
                raise _cannot_listen(listen, error) from None
        await coordinator.start()
        settle_garbage_collection()
        port = runner.addresses[0][1]
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        if not listen.insecure and not any(site.has_token for site in coordinator.reader.sites()):
            log.warning(
                "no site has a token yet, so none can join; isthmus coordinator token add SITE --state %s", state
            )
        if listen.in_the_clear:
            log.warning("without --tls-cert tokens travel in the clear, unless a proxy before this port has TLS")
        log.info("serving run %s on %s://%s:%d", coordinator.run_id, "https" if tls else "http", host, port)
        lag = asyncio.create_task(watch_lag(coordinator.metrics.loop_lag.set))
        stop = asyncio.create_task(stopped.wait())
        ends: set[asyncio.Future[Any]] = {stop, coordinator.failure}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        lag.cancel()
        if coordinator.failure.done():
            coordinator.failure.result()
        log.info("stopping")
    finally:
        api.close()
        coordinator.publication.close()
        await runner.cleanup()
        await coordinator.stop()


def runner_of(api: Api) -> web.AppRunner:
    """The server's own settings."""
    return web.AppRunner(
        api.app(),
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        keepalive_timeout=IDLE_SECONDS,
        handle_signals=False,
    )


async def _bound(listen: Listen) -> list[socket.socket]:
    """Sockets that hold the port at each of the host's addresses; they do not listen yet. Raises ConfigError."""
    sockets: list[socket.socket] = []
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(bound := socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(address)
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise _cannot_listen(listen, error) from None
    return sockets


def settle_garbage_collection() -> None:
    """Takes all that the start has made, libraries included, out of the collector's sight. It stays anyway, and a full
    collection that walks it holds the event loop, and every other thread, for a tenth of a second."""
    gc.collect()
    gc.freeze()


def _allow_many_files() -> None:
    """A merge holds one file open for each contribution, so take all that the system grants."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cannot_listen(listen: Listen, error: OSError) -> ConfigError:
    where = f"{listen.host}:{listen.port}"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {where} is in use by another program; name another --port")
    return ConfigError(f"cannot listen on {where}: {error.strerror or error}; name another --host or --port")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
