"""One HTTP request to the coordinator, once: connections, credentials, and which failures are worth another try."""

from __future__ import annotations

import io
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from shared.errors import ConfigError
from shared.protocol import MEDIA_TYPE, SITE_HEADER

CONNECT_SECONDS = 10.0
QUIET_SECONDS = 60.0
"""How long a connection may carry nothing before it is given up; the long poll asks for less than that."""


class TransientError(Exception):
    """A failure that trying again may mend. `partial` is what had come of the answer's body."""

    def __init__(self, message: str, partial: Reply | None = None) -> None:
        super().__init__(message)
        self.partial = partial


@dataclass(frozen=True)
class Request:
    """What is asked. `control`: on the connection that tensors never hold up."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    control: bool = False


@dataclass(frozen=True)
class Reply:
    """What came back; `headers` with lower-case names. From the answer's head to the last byte of its body, which took
    `seconds`, `carried` bytes of bodies came over the link: this one's, and those of other downloads."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    carried: int = 0
    seconds: float = 0.0


class Transport(ABC):
    """Carries requests, each of them once. Opened and closed within one event loop."""

    url: str

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def send(self, request: Request) -> Reply:
        """The answer, whatever its status. Raises TransientError where none came whole, ConfigError where none can."""


@dataclass(frozen=True)
class Credentials:
    """Who the site is: its name, its token (None: an insecure coordinator), and TLS material."""

    site: str
    token: str | None
    ssl: ssl.SSLContext | None


def credentials(
    site: str, token_file: Path | None, ca: Path | None, cert: Path | None, key: Path | None
) -> Credentials:
    """Credentials read from the files that the site config names. Raises ConfigError naming the file."""
    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"[site] token_file: {token_file} cannot be read ({reason}); it holds what "
                f"`isthmus coordinator token add {site}` printed"
            ) from None
        if not token or any(c.isspace() for c in token):
            raise ConfigError(f"[site] token_file: {token_file} does not hold one token")
    context = None
    if ca is not None or cert is not None:
        try:
            context = ssl.create_default_context(cafile=str(ca) if ca else None)
            if cert is not None:
                context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"[site] ca, client_cert or client_key cannot be used: {error}") from None
    return Credentials(site, token, context)


class Http(Transport):
    """Real connections. `counted` is told of body bytes sent and received."""

    def __init__(
        self,
        url: str,
        who: Credentials,
        counted: Callable[[int, int], None] = lambda up, down: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url.rstrip("/")
        self._who, self._counted, self._clock = who, counted, clock
        self._carried = 0
        self._data: aiohttp.ClientSession
        self._control: aiohttp.ClientSession

    async def open(self) -> None:
        headers = {SITE_HEADER: self._who.site}
        if self._who.token is not None:
            headers["Authorization"] = f"Bearer {self._who.token}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=QUIET_SECONDS)

        def session(limit: int) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=limit, ssl=self._who.ssl or True, keepalive_timeout=60)
            return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, trust_env=True)

        self._data, self._control = session(64), session(1)

    async def close(self) -> None:
        await self._data.close()
        await self._control.close()

    async def send(self, request: Request) -> Reply:
        session = self._control if request.control else self._data
        headers = {"Content-Type": MEDIA_TYPE} if request.body is not None else {}
        got, answered = bytearray(), None
        began = came = 0.0
        before = carried = 0

        def reply(status: int, names: Mapping[str, str]) -> Reply:
            return Reply(status, names, bytes(got), carried - before, came - began)

        try:
            # Wrapped, because aiohttp warns of large bodies that are plain bytes.
            data_out = io.BytesIO(request.body) if request.body is not None else None
            async with session.request(
                request.method,
                self.url + request.path,
                data=data_out,
                params=request.query,
                headers={**headers, **request.headers},
                allow_redirects=False,
            ) as answer:
                answered = answer.status, {name.lower(): value for name, value in answer.headers.items()}
                self._counted(len(request.body or b""), 0)
                began = came = self._clock()
                before = carried = self._carried
                async for piece in answer.content.iter_any():
                    self._counted(0, len(piece))
                    got += piece
                    self._carried += len(piece)
                    carried, came = self._carried, self._clock()
                return reply(*answered)
        except TimeoutError:
            fault = "no answer in time"
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigError(f"the coordinator's certificate is not trusted: {error}; see [site] ca") from None
        except aiohttp.InvalidURL:
            raise ConfigError(f"[site] coordinator: {self.url} is not a URL that can be called") from None
        except aiohttp.ClientConnectorError as error:
            fault = error.os_error.strerror or str(error.os_error)
        except (aiohttp.ClientError, OSError) as error:
            fault = str(error) or type(error).__name__
        raise TransientError(fault, reply(*answered) if answered is not None else None)
