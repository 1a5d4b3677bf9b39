import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

import lab.link
from lab.link import PACKET_BYTES, Link, LinkSettings, _Lane, _Pump, parse_endpoint, run_link
from lab.shaping import Passage, Shaper
from shared.errors import ConfigError

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

FAST = LinkSettings(rate=1e9, rtt=0.002)
LOCAL = ("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[str, int]]:
    """A server on a free port that runs `serve` for each connection and then closes it."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                await serve(reader, writer)
        finally:
            await close(writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(run(reader, writer)))

    listening = await asyncio.start_server(accept, *LOCAL)
    try:
        yield listening.sockets[0].getsockname()[:2]
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listening.wait_closed()


@contextlib.asynccontextmanager
async def link_to(target: tuple[str, int], settings: LinkSettings = FAST) -> AsyncIterator[tuple[Link, int]]:
    link = Link(LOCAL, target, settings)
    port = await link.start()
    try:
        yield link, port
    finally:
        await link.stop()


@contextlib.asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def free_port() -> int:
    with socket.create_server(LOCAL) as listener:
        port: int = listener.getsockname()[1]
        return port


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()


async def hold(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Read until the client is gone."""
    while await reader.read(1 << 16):
        pass


class Recorder:
    """Notes every chunk that passes a shaper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[tuple[str, int, Passage]] = []
        self.waits: list[float] = []  # seconds from being sent to having left
        recorder = self

        class RecordingShaper(Shaper):
            def __init__(self, settings: LinkSettings, direction: str) -> None:
                super().__init__(settings, direction)  # type: ignore[arg-type]
                self._direction = direction

            def send(self, now: float, nbytes: int, after: float = float("-inf")) -> Passage:
                passage = super().send(now, nbytes, after)
                recorder.passed.append((self._direction, nbytes, passage))
                recorder.waits.append(passage.leaves - now)
                return passage

        monkeypatch.setattr(lab.link, "Shaper", RecordingShaper)

    def sizes(self) -> list[tuple[str, int]]:
        return [(direction, nbytes) for direction, nbytes, _ in self.passed]


@pytest.mark.parametrize(
    "settings",
    [FAST, LinkSettings(), LinkSettings(rate=50e6, rtt=0.004, jitter=0.004, loss=0.05, seed=1)],
    ids=["plain", "unlimited", "jitter and loss"],
)
async def test_bytes_are_relayed_intact_and_counted(settings: LinkSettings) -> None:
    sent = Random(0).randbytes(1_000_003)
    async with server(echo) as target, link_to(target, settings) as (link, port):

        async def send(writer: asyncio.StreamWriter) -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()

        async with client_of(port) as (reader, writer):
            received, _ = await asyncio.gather(reader.read(-1), send(writer))
        assert received == sent
        assert (link.bytes_up, link.bytes_down, link.connections) == (len(sent), len(sent), 1)
        assert link.bytes_under_way == 0


async def test_connections_do_not_mix() -> None:
    async with server(echo) as target, link_to(target) as (link, port):

        async def talk(number: int) -> bytes:
            async with client_of(port) as (reader, writer):
                for _ in range(20):
                    writer.write(bytes([number]) * 1000)
                    await writer.drain()
                writer.write_eof()
                return await reader.read(-1)

        answers = await asyncio.gather(*(talk(number) for number in range(8)))
        assert answers == [bytes([number]) * 20_000 for number in range(8)]
        assert link.connections == 8
        assert link.bytes_up == link.bytes_down == 160_000


async def test_server_may_speak_first() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await reader.read()

    async with server(greet) as target, link_to(target) as (_, port), client_of(port) as (reader, _):
        assert await reader.readexactly(5) == b"hello"


async def test_client_that_has_said_all_still_hears_the_answer() -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read(-1)
        writer.write(question.upper())
        await writer.drain()

    async with server(answer_at_the_end) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        writer.write(b"question")
        writer.write_eof()
        assert await reader.read(-1) == b"QUESTION"


async def test_server_that_has_said_all_still_hears_the_client() -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def hush(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        heard.set_result(await reader.read(-1))

    async with server(hush) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        assert await reader.read(-1) == b""
        writer.write(b"one more thing")
        writer.write_eof()
        assert await heard == b"one more thing"


class GoneSink(asyncio.StreamWriter):
    """The writing side of a connection whose peer is gone."""

    def __init__(self) -> None: ...
    def __del__(self) -> None: ...
    def write(self, data: object) -> None:
        raise BrokenPipeError


class KeepingSink(GoneSink):
    """Keeps what is written to it; a dot stands for the end of the stream."""

    heard = b""

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.heard += data

    def write_eof(self) -> None:
        self.heard += b"."

    async def drain(self) -> None: ...


async def relay_upload_and_refusal(to_server: GoneSink, to_client: GoneSink) -> None:
    from_client, from_server = asyncio.StreamReader(), asyncio.StreamReader()
    from_client.feed_data(b"a large body")
    from_server.feed_data(b"too large")
    from_server.feed_eof()
    up = _Pump(_Lane(LinkSettings(), "up"), from_client, to_server)
    down = _Pump(_Lane(LinkSettings(rtt=0.05), "down"), from_server, to_client)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(up.run(back=down))
        tasks.create_task(down.run(back=up))


async def test_answer_on_its_way_outlives_the_server() -> None:
    to_client = KeepingSink()
    with pytest.raises(BaseExceptionGroup) as failed:
        await relay_upload_and_refusal(GoneSink(), to_client)
    assert failed.group_contains(BrokenPipeError)
    assert to_client.heard == b"too large."


async def test_connection_ends_when_both_ends_are_gone() -> None:
    with pytest.raises(BaseExceptionGroup) as failed:
        await relay_upload_and_refusal(GoneSink(), GoneSink())
    assert failed.group_contains(BrokenPipeError)


async def test_end_of_the_connection_waits_for_a_client_that_reads_late() -> None:
    nbytes = 1 << 20

    async def send_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.write(bytes(nbytes))

    loop = asyncio.get_running_loop()
    async with server(send_all) as target, link_to(target, LinkSettings()) as (link, port):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            client.shutdown(socket.SHUT_WR)
            while link.bytes_down < nbytes:  # noqa: ASYNC110 - a gauge tells nobody
                await asyncio.sleep(0)
            for _ in range(100):  # more than the steps from the last byte to the close
                await asyncio.sleep(0)
            received = 0
            while chunk := await loop.sock_recv(client, 1 << 16):
                received += len(chunk)
            assert received == nbytes


async def test_slow_receiver_holds_the_sender_back() -> None:
    settings = LinkSettings(rate=100e6, rtt=0.002)
    bound = settings.buffer_bytes + settings.chunk_bytes
    nbytes = 32 << 20  # far more than the kernel's own buffers take
    full = asyncio.Event()
    held: list[int] = []

    async def read_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await full.wait()
        received = 0
        while chunk := await reader.read(1 << 16):
            received += len(chunk)
            held.append(link.bytes_under_way)
        writer.write(received.to_bytes(8, "big"))
        await writer.drain()

    async with server(read_late) as target, link_to(target, settings) as (link, port):
        async with client_of(port) as (reader, writer):

            async def send() -> None:
                for _ in range(nbytes >> 16):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
                    held.append(link.bytes_under_way)
                writer.write_eof()

            sending = asyncio.create_task(send())
            while link.bytes_under_way < settings.buffer_bytes:  # noqa: ASYNC110 - a gauge tells nobody
                await asyncio.sleep(0)
            full.set()
            await sending
            assert int.from_bytes(await reader.readexactly(8), "big") == nbytes
        assert settings.buffer_bytes <= max(held) <= bound
        assert link.bytes_under_way == 0


async def test_bytes_pass_the_link_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    settings = LinkSettings(rate=6.25e6, rtt=0.002)
    async with server(hold) as target, link_to(target, settings) as (_, port), client_of(port) as (reader, writer):
        writer.write(bytes(100_000))
        writer.write_eof()
        assert await reader.read(-1) == b""
    chunks = [nbytes for direction, nbytes in recorder.sizes() if direction == "up" and nbytes != PACKET_BYTES]
    assert sum(chunks) == 100_000
    assert max(chunks) <= settings.chunk_bytes == 25_000


async def test_connecting_costs_a_round_trip_before_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    async with server(echo) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
    assert recorder.sizes()[:4] == [("up", PACKET_BYTES), ("down", PACKET_BYTES), ("up", 1), ("down", 1)]
    (_, _, syn), (_, _, syn_ack), (_, _, first), _ = recorder.passed[:4]
    assert syn.arrives <= syn_ack.leaves
    assert syn_ack.arrives <= first.leaves


async def test_no_byte_is_delivered_before_the_shaper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    received: list[float] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            received.append(asyncio.get_running_loop().time())
            writer.write(b"x")

    async with server(note) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        for _ in range(10):
            writer.write(b"x")
            await reader.readexactly(1)
    due = [passage.arrives for direction, nbytes, passage in recorder.passed if (direction, nbytes) == ("up", 1)]
    assert len(received) == len(due) == 10
    assert all(at >= arrives - 1e-6 for at, arrives in zip(received, due, strict=True))


async def test_connections_share_one_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    settings = LinkSettings(rate=20e6)
    async with server(hold) as target, link_to(target, settings) as (_, port):

        async def send() -> None:
            async with client_of(port) as (reader, writer):
                writer.write(bytes(200_000))
                writer.write_eof()
                await reader.read(-1)

        await asyncio.gather(send(), send(), send())
    up = [(nbytes, passage) for direction, nbytes, passage in recorder.passed if direction == "up"]
    assert sum(nbytes for nbytes, _ in up) >= 600_000
    for (_, earlier), (nbytes, later) in pairwise(up):
        assert later.leaves - earlier.leaves >= nbytes / settings.rate - 1e-9


async def test_queue_does_not_grow_with_the_number_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    settings = LinkSettings(rate=20e6)
    async with server(hold) as target, link_to(target, settings) as (_, port):

        async def send() -> None:
            async with client_of(port) as (reader, writer):
                writer.write(bytes(400_000))
                writer.write_eof()
                await reader.read(-1)

        await asyncio.gather(*(send() for _ in range(6)))
    assert max(recorder.waits) <= (settings.buffer_bytes + settings.chunk_bytes) / settings.rate + 1e-6


async def test_chunks_of_a_connection_are_due_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    settings = LinkSettings(rate=1e6, rtt=0.01, jitter=0.02, loss=0.1)
    async with server(hold) as target, link_to(target, settings) as (_, port), client_of(port) as (reader, writer):
        writer.write(bytes(100_000))
        writer.write_eof()
        assert await reader.read(-1) == b""
    due = [passage.arrives for direction, _, passage in recorder.passed[2:] if direction == "up"]
    assert len(due) > 20
    assert due == sorted(due)


async def test_dead_target_resets_the_client(caplog: pytest.LogCaptureFixture) -> None:
    port_of_nobody = free_port()
    async with link_to(("127.0.0.1", port_of_nobody)) as (link, port), client_of(port) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        assert link.connections == 1
    assert f"cannot reach 127.0.0.1:{port_of_nobody}" in caplog.text


async def test_reset_by_the_server_reaches_the_client() -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        reset(writer)

    async with server(drop) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await reader.read(1)


async def test_reset_by_the_client_reaches_the_server_behind_its_data() -> None:
    outcome: asyncio.Future[tuple[bytes, type]] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(4)
        writer.write(b"x")
        try:
            await reader.read(1)
        except OSError as error:
            outcome.set_result((data, type(error)))

    async with server(listen) as target, link_to(target) as (_, port), client_of(port) as (reader, writer):
        writer.write(b"data")
        await reader.readexactly(1)
        reset(writer)
        assert await outcome == (b"data", ConnectionResetError)


async def test_cut_resets_both_ends_and_lets_new_connections_in() -> None:
    outcomes: asyncio.Queue[type | None] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(reader, writer)
            outcomes.put_nowait(None)
        except OSError as error:
            outcomes.put_nowait(type(error))

    async with server(listen) as target, link_to(target) as (link, port):
        async with client_of(port) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            link.cut()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            assert await outcomes.get() is ConnectionResetError
        async with client_of(port) as (reader, writer):
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
        assert await outcomes.get() is None
        assert link.connections == 2


async def test_cut_every_resets_again_and_again() -> None:
    settings = LinkSettings(rate=1e9, cut_every=0.02)
    async with server(echo) as target, link_to(target, settings) as (_, port):
        for _ in range(3):
            async with client_of(port) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)


async def test_stop_leaves_no_task_and_resets_what_was_open() -> None:
    async with server(echo) as target:
        before = asyncio.all_tasks()
        link = Link(LOCAL, target, LinkSettings(rate=6.25e6, rtt=0.08, cut_every=1000))
        port = await link.start()
        async with client_of(port) as (idle, _), client_of(port) as (busy, writer):
            writer.write(bytes(1_000_000))
            await busy.readexactly(1)
            assert link.bytes_under_way > 0
            await link.stop()
            for reader in (idle, busy):
                with pytest.raises(ConnectionResetError):
                    await reader.read(-1)
        echoing = {task for task in asyncio.all_tasks() - before if "server" in task.get_coro().__qualname__}  # type: ignore[union-attr]
        assert asyncio.all_tasks() - before - echoing == set()
        assert link.bytes_under_way == 0
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_connection_that_is_stopped_at_any_step_is_reset_and_not_leaked() -> None:
    loop = asyncio.get_running_loop()
    async with server(echo) as target:
        for steps in range(1, 20):
            link = Link(LOCAL, target, LinkSettings())
            with socket.create_connection(("127.0.0.1", await link.start())) as client:
                client.setblocking(False)
                for _ in range(steps):
                    await asyncio.sleep(0)
                await link.stop()
                with pytest.raises(ConnectionResetError):
                    await loop.sock_recv(client, 1)


async def test_port_in_use_is_refused_with_its_number_and_the_way_out() -> None:
    with socket.create_server(LOCAL) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is in use: .*another port"):
            await Link(("127.0.0.1", port), ("127.0.0.1", 1), FAST).start()


async def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0 .*an address of this machine"):
        await Link(("192.0.2.1", 0), ("127.0.0.1", 1), FAST).start()


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1:8470", ("127.0.0.1", 8470)),
        ("coordinator.example:443", ("coordinator.example", 443)),
        (":8471", ("127.0.0.1", 8471)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_address_is_read(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read: write host:port"),
        ("8470", "cannot be read: write host:port"),
        ("host", "cannot be read: write host:port"),
        ("host:", "cannot be read: write host:port"),
        ("host:http", "cannot be read: write host:port"),
        ("host:-1", "cannot be read: write host:port"),
        ("::1:80", r"cannot be read: write host:port, \[ipv6\]:port"),
        ("host:65536", "has port 65536: ports go up to 65535"),
        ("http://host:80", "is a URL .*: write host:port"),
        ("a..b:80", "has no valid host name"),
    ],
)
def test_address_that_cannot_be_read_is_refused_with_what_would_do(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_endpoint(text)


def test_link_to_port_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match='"host:0" has port 0: name the port'):
        run_link(":0", "host:0", FAST)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_link_says_where_it_is_and_what_it_relayed(number: signal.Signals) -> None:
    program = (
        "from lab.link import LinkSettings, run_link; import sys;"
        "run_link(':0', sys.argv[1], LinkSettings(rate=6.25e6, rtt=0.08))"
    )
    root = Path(__file__).parents[2]
    with socket.create_server(LOCAL) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-c", program, target]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                words = process.stdout.readline().split()
                assert [words[0], *words[2:]] == ["link", "->", target, "50mbit", "80ms"]
                with socket.create_connection(parse_endpoint(words[1])) as client:
                    client.sendall(b"hello")
                    client.shutdown(socket.SHUT_WR)
                    peer, _ = listener.accept()
                    with peer:
                        while peer.recv(100):
                            pass
                        peer.sendall(b"bye")
                    while client.recv(100):
                        pass
                process.send_signal(number)
                assert process.stdout.read() == "relayed 5 bytes up and 3 bytes down in 1 connections\n"
                assert process.wait() == 0
            finally:
                process.kill()
