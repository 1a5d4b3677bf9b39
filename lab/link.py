"""`isthmus link`: a wide-area link on one machine, as a TCP relay that needs no root and no kernel module.

    client ──▶ listen │ bottleneck, delay, loss, cuts │ to ──▶ server

`lab.shaping` says when bytes leave and arrive; this module reads, waits and writes. Why a relay and not
tc/netem: it runs in any container and inside a test, and it shapes one link and not the whole loopback.
The price is that it ends TCP on both sides, so a connection looks established to the client at once; the
round trip of the handshake is charged before its first byte instead.

Memory is bounded: a connection holds at most about one bandwidth-delay product each way, then its sender
is held back, as a full network would. A reset travels like data: behind what was sent before it.

Timers wake up to a millisecond late, each way, so delays below 10 ms are coarse; from about 2 gbit/s on the
relay itself is the bottleneck.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import re
import signal
import socket
import struct
from asyncio.trsock import TransportSocket
from collections import deque
from random import Random
from typing import Final, Literal

from lab.shaping import LinkSettings, Shaper, next_cut
from shared.errors import ConfigError

__all__ = ["Link", "LinkSettings", "parse_endpoint", "run_link"]

_log = logging.getLogger(__name__)

PACKET_BYTES: Final = 40
"""IP and TCP header: what a SYN, a FIN or a RST costs at the bottleneck."""

_READ_AHEAD: Final = 64 << 10
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 seconds: close() sends RST
_FINISH: Final = struct.pack("ii", 0, 0)  # SO_LINGER off: close() sends what is left, then FIN
_ENDPOINT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]*):([0-9]{1,5})")


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of "host:port", "[ipv6]:port" or ":port", which is this machine alone (127.0.0.1)."""
    if "//" in text:
        raise ConfigError(f'address "{text}" is a URL and a link relays plain TCP: write host:port')
    match = _ENDPOINT.fullmatch(text)
    if match is None:
        raise ConfigError(f'address "{text}" cannot be read: write host:port, [ipv6]:port or :port, as in :8471')
    if (port := int(match[2])) > 65535:
        raise ConfigError(f'address "{text}" has port {port}: ports go up to 65535')
    host = match[1].strip("[]") or "127.0.0.1"
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigError(f'address "{text}" has no valid host name: use a name or an IP address') from None
    return host, port


class _Lane:
    """One direction of the link, shared by all connections: the shaper, the queue before it and the counters."""

    def __init__(self, settings: LinkSettings, direction: Literal["up", "down"]) -> None:
        self.settings = settings
        self.delivered = 0
        self.held = 0
        self._shaper = Shaper(settings, direction)
        self._turn = asyncio.Lock()

    async def enter(self, nbytes: int, after: float = -math.inf) -> float:
        """Wait for room before the bottleneck and take it; the arrival time.

        Connections that wait take turns chunk by chunk, so none of them has the link for itself.
        """
        loop = asyncio.get_running_loop()
        async with self._turn:
            await _sleep_until(self._shaper.room_at(loop.time()))
            return self._shaper.send(loop.time(), nbytes, after).arrives

    async def cross(self, nbytes: int) -> None:
        """Return when `nbytes` that belong to no stream, such as a SYN, have arrived."""
        await _sleep_until(await self.enter(nbytes))


class _Pump:
    """One direction of one connection: reads from one end, writes to the other when the lane says so."""

    def __init__(self, lane: _Lane, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self.done = asyncio.Event()  # nothing more will reach the sink
        self._lane = lane
        self._source = source
        self._sink = sink
        self._queue: deque[tuple[float, bytes | None]] = deque()  # (arrival, chunk); b"" ends, None resets
        self._queued = asyncio.Event()
        self._room = asyncio.Event()
        self._held = 0

    async def run(self, back: _Pump) -> None:
        """Relay until the end of the stream. Raises a group of OSError when the connection is to be reset."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fill())
                tasks.create_task(self._deliver(back))
        finally:
            self._lane.held -= self._held
        self.done.set()

    async def _fill(self) -> None:
        arrival = -math.inf
        chunk: bytes | None = None
        while True:
            try:
                chunk = await self._source.read(self._lane.settings.chunk_bytes)
            except OSError:
                chunk = None
            self._hold(len(chunk or b""))
            arrival = await self._lane.enter(len(chunk) if chunk else PACKET_BYTES, arrival)
            self._queue.append((arrival, chunk))
            self._queued.set()
            if not chunk:
                return
            while self._held >= self._lane.settings.buffer_bytes:
                self._room.clear()
                await self._room.wait()

    async def _deliver(self, back: _Pump) -> None:
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            arrival, chunk = self._queue[0]
            await _sleep_until(arrival)
            self._queue.popleft()
            if chunk is None:
                raise ConnectionResetError
            try:
                if not chunk:
                    self._sink.write_eof()
                    return
                self._sink.write(chunk)
                await self._sink.drain()
            except OSError:
                # The sink is gone, but its last words (an early refusal, say) may still be on their way back.
                self.done.set()
                await back.done.wait()
                raise
            self._lane.delivered += len(chunk)
            self._hold(-len(chunk))
            self._room.set()

    def _hold(self, nbytes: int) -> None:
        self._held += nbytes
        self._lane.held += nbytes


class Link:
    """A relay from `listen` to `to`, each (host, port), that behaves like a link with these settings.

    Port 0 listens on any free port. A link can be started once.
    """

    def __init__(self, listen: tuple[str, int], to: tuple[str, int], settings: LinkSettings) -> None:
        self.listen = listen
        self.to = to
        self.settings = settings
        self.connections = 0
        """Connections accepted so far."""
        self._up = _Lane(settings, "up")
        self._down = _Lane(settings, "down")
        self._carrying: set[asyncio.Task[None]] = set()
        self._cutting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes delivered from clients to the server."""
        return self._up.delivered

    @property
    def bytes_down(self) -> int:
        """Bytes delivered from the server to clients."""
        return self._down.delivered

    @property
    def bytes_under_way(self) -> int:
        """Bytes that were read and not yet delivered, of all connections in both directions."""
        return self._up.held + self._down.held

    async def start(self) -> int:
        """Listen, and return the port. Raises ConfigError if the address cannot be had."""
        self._listener = await _listen(self.listen)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._socket_buffer)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        if self.settings.cut_every is not None:
            self._cutting = asyncio.create_task(self._cut_forever(self.settings.cut_every))
        port = self._listener.getsockname()[1]
        assert isinstance(port, int)
        return port

    async def stop(self) -> None:
        """Stop listening and reset what is open; when this returns, no task and no socket of the link is left."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        tasks = [*self._carrying, *([self._cutting] if self._cutting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections now, at both ends; new ones are accepted as before."""
        for task in self._carrying:
            task.cancel()

    @property
    def _socket_buffer(self) -> int:
        # Left to itself the kernel would take megabytes off a sender that the link should hold back.
        return min(self.settings.buffer_bytes, 1 << 20)

    async def _cut_forever(self, every: float) -> None:
        random = Random(f"{self.settings.seed}/cuts")
        at = asyncio.get_running_loop().time()
        while True:
            at = next_cut(at, every, random)
            await _sleep_until(at)
            self.cut()

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # the client went away again
        client.setblocking(False)
        _at_close(client, _RESET)  # whatever becomes of it, short of two ends of stream
        self.connections += 1
        task = asyncio.create_task(self._carry(client))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        task.add_done_callback(lambda _: client.close())  # it may be cancelled before its first step

    async def _carry(self, client: socket.socket) -> None:
        ends: list[asyncio.StreamWriter] = []
        try:
            await self._relay(client, ends)
            for end in ends:
                _at_close(end.get_extra_info("socket"), _FINISH)
                end.close()
                await end.wait_closed()
        except* OSError:
            pass  # one end was reset, or the server cannot be reached; below, both learn of it
        finally:
            for end in ends:
                _at_close(end.get_extra_info("socket"), _RESET)
                end.transport.abort()
            for end in ends:
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _relay(self, client: socket.socket, ends: list[asyncio.StreamWriter]) -> None:
        from_client, to_client = await asyncio.open_connection(sock=client, limit=_READ_AHEAD)
        ends.append(to_client)
        await self._up.cross(PACKET_BYTES)  # SYN
        try:
            from_server, to_server = await asyncio.open_connection(*self.to, limit=_READ_AHEAD)
            ends.append(to_server)
        except OSError as error:
            _log.warning("cannot reach %s: %s", _show(*self.to), error)
            await self._down.cross(PACKET_BYTES)  # RST
            raise
        await self._down.cross(PACKET_BYTES)  # SYN-ACK
        to_server.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._socket_buffer)
        up = _Pump(self._up, from_client, to_server)
        down = _Pump(self._down, from_server, to_client)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(up.run(back=down))
            tasks.create_task(down.run(back=up))


async def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: stop the program that listens there, or listen on "
                "another port (port 0 takes any free one)"
            ) from error
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): use an address of this machine, such as "
            "127.0.0.1, and a port above 1023"
        ) from error
    listener.setblocking(False)
    return listener


def _at_close(connection: socket.socket | TransportSocket, how: bytes) -> None:
    with contextlib.suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)


async def _sleep_until(when: float) -> None:
    delay = when - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)


def run_link(listen: str, to: str, settings: LinkSettings) -> None:
    """Relay until SIGINT or SIGTERM, then say how much. `listen` and `to` are read by `parse_endpoint`."""
    asyncio.run(_run(parse_endpoint(listen), _parse_target(to), settings))


def _parse_target(to: str) -> tuple[str, int]:
    host, port = parse_endpoint(to)
    if port == 0:
        raise ConfigError(f'address "{to}" has port 0: name the port that the server listens on')
    return host, port


async def _run(listen: tuple[str, int], to: tuple[str, int], settings: LinkSettings) -> None:
    link = Link(listen, to, settings)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    port = await link.start()
    try:
        print(f"link {_show(listen[0], port)} -> {_show(*to)} {settings}", flush=True)
        await stop.wait()
    finally:
        await link.stop()
    print(f"relayed {link.bytes_up} bytes up and {link.bytes_down} bytes down in {link.connections} connections")


def _show(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
