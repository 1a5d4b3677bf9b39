"""Sites that do not train, over plain sockets: what they cost is what the kernel's TCP costs, and little else."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

from shared.fragments import CHUNK_ELEMENTS, Fragment, Layout
from shared.protocol import (
    MEDIA_TYPE,
    PART_BYTES,
    PROTOCOL,
    SITE_HEADER,
    Heartbeat,
    Join,
    Joined,
    Message,
    OpenUpload,
    Outcome,
    Upload,
    pack,
    unpack,
)
from shared.wire import Bytes, Header, blob_digest, header_bound, pack_container, read_header, tensor_table

M = TypeVar("M", bound=Message)
JOIN_BYTES = 64 << 20
RECEIVE_BYTES = 1 << 20
BUFFERED = 1 << 16
MOST_BUFFERS = 64


class Connection:
    """One HTTP connection of a site."""

    def __init__(self, port: int, site: str) -> None:
        self._http, self._site = http.client.HTTPConnection("127.0.0.1", port, timeout=600), site
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._http.connect()
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, kind: type[M], method: str, path: str, message: Message | None = None) -> M:
        """The answer to a small message. Raises RuntimeError where it is a refusal."""
        return unpack(kind, self.send(method, path, [pack(message)] if message else []), JOIN_BYTES)

    def send(self, method: str, path: str, pieces: Sequence[bytes | memoryview]) -> bytes:
        """The body of the answer to `pieces`, sent one after the other from where they lie."""
        self._begin(method, path, sum(map(len, pieces)))
        left = list(pieces)
        while left:
            sent = self._http.sock.sendmsg(left[:MOST_BUFFERS])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = memoryview(left[0])[sent:]
        answer = self._http.getresponse()
        body = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {body.decode(errors='replace')}")
        return body

    def drain(self, path: str) -> tuple[int, bytes, float]:
        """The size of what `path` answers with, its first bytes, and the seconds from the answer's head to the last
        byte; the rest is received and forgotten."""
        self._begin("GET", path, 0)
        answer = self._http.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {answer.read().decode(errors='replace')}")
        began = time.perf_counter()
        first = answer.read(1 << 16)
        total = int(answer.headers["Content-Length"])
        # What the reader has taken beyond the header comes first; the rest straight from the socket.
        left = total - len(first) - len(answer.fp.read1(min(BUFFERED, total - len(first))))
        while left:
            got = self._http.sock.recv_into(self._buffer, min(left, len(self._buffer)))
            if not got:
                raise RuntimeError(f"{path}: {left} bytes are missing")
            left -= got
        answer.close()
        return total, first, time.perf_counter() - began

    def _begin(self, method: str, path: str, size: int) -> None:
        self._http.putrequest(method, path)
        for name, value in ((SITE_HEADER, self._site), ("Content-Type", MEDIA_TYPE), ("Content-Length", str(size))):
            self._http.putheader(name, value)
        self._http.endheaders()

    def close(self) -> None:
        self._http.close()


@dataclass
class Stub:
    """A site that sends the same sections again and again, as contributions to whatever version there is.

    `lanes` connections carry its parts, one of them everything else.
    """

    name: str
    port: int
    sections: Sequence[memoryview]
    codec: str
    lanes: int
    connections: list[Connection] = field(default_factory=list)
    version: int = 0
    rate: float | None = None
    joined: Joined = field(init=False)
    _head: bytes = b""
    _digest: str = ""
    _base: str = ""
    _ends: list[int] = field(default_factory=list)

    def join(self) -> None:
        """Joins, and says that it is ready."""
        self.connections = [Connection(self.port, self.name) for _ in range(self.lanes)]
        message = Join(protocol=PROTOCOL, site=self.name, software={})
        self.joined = self.connections[0].ask(Joined, "POST", "/v1/join", message)
        self._base = self.joined.fragments[0].digest
        self.beat("ready")

    def beat(self, state: str) -> None:
        """A heartbeat, on the first connection."""
        message = Heartbeat.model_validate(
            {
                "run": self.joined.run,
                "session": self.joined.session,
                "state": state,
                "steps": 0,
                "tokens": 0,
                "step_seconds": 0.01,
                "overlap_seconds": 1.0,
                "sync_seconds": 0.0,
                "training_share": 1.0,
                "download_rate": self.rate,
                "loss": None,
                "evaluation": None,
                "repairs": 0,
                "evaluates": False,
                "data": None,
            }
        )
        self.connections[0].send("POST", f"/v1/sites/{self.name}/heartbeat", [pack(message)])

    @property
    def fragment(self) -> Fragment:
        return Layout.from_wire(self.joined.layout).fragments[0]

    def prepare(self) -> int:
        """Makes the contribution to the version that is here; its bytes."""
        header = Header(
            kind="contribution",
            run=self.joined.run,
            site=self.name,
            fragment=0,
            base_version=self.version,
            version=self.version,
            digest=self._base,
            codec=self.codec,
            zstd=False,
            chunk=CHUNK_ELEMENTS,
            tensors=tensor_table(self.fragment),
            tokens=1,
            steps=1,
            sizes=[],
        )
        sized = pack_container(header, self.sections)
        self._head = sized[: len(sized) - sum(map(len, self.sections))]
        self._digest = blob_digest(sized)
        self._ends = list(accumulate(len(piece) for piece in [self._head, *self.sections]))
        return len(sized)

    def contribute(self) -> None:
        """Sends it, in parts, and waits until it is acknowledged."""
        size = len(self._head) + sum(map(len, self.sections))
        opening = OpenUpload(
            run=self.joined.run,
            site=self.name,
            session=self.joined.session,
            fragment=0,
            base_version=self.version,
            codec=self.codec,
            size=size,
            digest=self._digest,
            part_size=PART_BYTES,
            body=None,
        )
        upload = self.connections[0].ask(Upload, "POST", "/v1/contributions", opening)
        path = f"/v1/contributions/{upload.id}"
        missing = [n for n in range(-(-size // upload.part_size)) if n not in upload.parts]
        lock = threading.Lock()

        def lane(connection: Connection) -> None:
            while True:
                with lock:
                    if not missing:
                        return
                    n = missing.pop()
                cut = range(n * upload.part_size, min(size, (n + 1) * upload.part_size))
                pieces = self._slice(cut.start, cut.stop)
                connection.send("PUT", f"{path}/parts/{n}?part_size={upload.part_size}", pieces)

        with ThreadPoolExecutor(self.lanes) as pool:
            list(pool.map(lane, self.connections))
        self.connections[0].ask(Outcome, "POST", f"{path}/commit")

    def follow(self) -> int:
        """Waits for the next version and receives its delta; its bytes."""
        path = f"/v1/fragments/0/versions/{self.version + 1}/delta?wait=60"
        size, first, seconds = self.connections[0].drain(path)
        self.rate = size / max(seconds, 1e-3)
        header, _ = read_header(Bytes(first), header_bound(self.fragment))
        self.version, self._base = header.version, header.digest
        return size

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def _slice(self, start: int, stop: int) -> list[memoryview]:
        """Bytes `start` to `stop` of the contribution, from where they lie."""
        pieces, ends = [memoryview(self._head), *self.sections], self._ends
        first = bisect_right(ends, start)
        found = []
        for n in range(first, bisect_left(ends, stop) + 1):
            begin = ends[n] - len(pieces[n])
            found.append(pieces[n][max(0, start - begin) : stop - begin])
        return found
