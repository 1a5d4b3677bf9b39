"""The HTTP client of the coordinator: requests that are tried again until an answer comes.

Every request is idempotent by design, so trying again is always right. What is transient (no
connection, a time-out, 5xx, 408, 429) is tried again with exponential backoff and full jitter, within the
patience that the caller gives; a problem document is an answer, and becomes RefusedError. Heartbeats have
a connection pool of their own: a link that is full of tensors must not cost the site its lease.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp

from shared.errors import ConfigError, FaultError, FormatError, RefusedError
from shared.protocol import (
    INLINE_BYTES,
    MEDIA_TYPE,
    PROTOCOL,
    SITE_HEADER,
    Code,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Message,
    OpenUpload,
    Orders,
    Outcome,
    Preview,
    Upload,
    pack,
    unpack,
)

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

CONNECT_SECONDS = 10.0
QUIET_SECONDS = 60.0
"""How long a connection may carry nothing before it is given up; the long poll asks for less than that."""
WAIT_SECONDS = 20.0
BACKOFF_FIRST, BACKOFF_LONGEST = 0.2, 15.0
PARALLEL_PARTS = 4
_TRANSIENT = {408, 425, 429}


class Refusal(RefusedError):
    """A refusal by problem document; `version` is the newest one, where the coordinator named it."""

    def __init__(self, code: str, detail: str, version: int | None) -> None:
        super().__init__(code, detail)
        self.version = version


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


def backoff(attempt: int, chance: float) -> float:
    """Seconds to wait before try `attempt` (from 1), for a uniform `chance` in [0, 1): full jitter."""
    return chance * float(min(BACKOFF_LONGEST, BACKOFF_FIRST * 2.0 ** min(attempt - 1, 16)))


class Link:
    """One site's connections to its coordinator. Use as an async context manager, within one event loop.

    `patience` is for how many seconds a request is tried again before FaultError; `counted` is told of body bytes
    sent and received.
    """

    def __init__(
        self, url: str, who: Credentials, patience: float, counted: Callable[[int, int], None] = lambda up, down: None
    ) -> None:
        self.url, self.patience = url.rstrip("/"), patience
        self.run = ""
        self._who, self._counted = who, counted
        self._data: aiohttp.ClientSession
        self._control: aiohttp.ClientSession

    async def __aenter__(self) -> Link:
        headers = {SITE_HEADER: self._who.site}
        if self._who.token is not None:
            headers["Authorization"] = f"Bearer {self._who.token}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=QUIET_SECONDS)

        def session(limit: int) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=limit, ssl=self._who.ssl or True, keepalive_timeout=60)
            return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, trust_env=True)

        self._data, self._control = session(64), session(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._data.close()
        await self._control.close()

    # -- the control connection

    async def join(self, software: dict[str, str], patience: float | None = None) -> Joined:
        message = Join(protocol=PROTOCOL, site=self._who.site, software=software)
        body = await self._ask(self._control, "POST", "/v1/join", pack(message), patience)
        joined = _understood(Joined, body, 64 << 20)
        self.run = joined.run
        return joined

    async def heartbeat(self, message: Heartbeat, patience: float | None = None) -> Orders:
        path = f"/v1/sites/{self._who.site}/heartbeat"
        return _understood(Orders, await self._ask(self._control, "POST", path, pack(message), patience))

    async def leave(self, session: str, patience: float) -> None:
        message = Leave(run=self.run, session=session)
        await self._ask(self._control, "POST", f"/v1/sites/{self._who.site}/leave", pack(message), patience)

    async def preview(self) -> Preview:
        """The run as this site would join it, without joining."""
        return _understood(Preview, await self._ask(self._control, "GET", "/v1/join", None), 64 << 20)

    async def ping(self) -> None:
        """The least that a round trip can be."""
        await self._ask(self._control, "GET", "/healthz", None, 0.0)

    # -- contributions

    async def contribute(self, opening: OpenUpload, body: bytes) -> Outcome:
        """Uploads a contribution, in one request or in parallel parts, and returns what became of it."""
        while True:
            upload = _understood(
                Upload, await self._ask(self._data, "POST", "/v1/contributions", pack(_with_body(opening, body)))
            )
            if upload.outcome is not None:
                return upload.outcome
            try:
                return await self._send_parts(upload, body)
            except RefusedError as error:
                # The coordinator was started anew and forgot the open upload: opened again, it goes on.
                if error.code not in (Code.UNKNOWN_UPLOAD, Code.INCOMPLETE):
                    raise
                await asyncio.sleep(backoff(1, random.random()))

    async def _send_parts(self, upload: Upload, body: bytes) -> Outcome:
        size = upload.part_size
        missing = [n for n in range(-(-len(body) // size)) if n not in upload.parts]
        lanes = asyncio.Semaphore(PARALLEL_PARTS)

        async def send(n: int) -> None:
            async with lanes:
                part = body[n * size : (n + 1) * size]
                await self._ask(self._data, "PUT", f"/v1/contributions/{upload.id}/parts/{n}", part)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_plainly(send(n))) for n in missing]
        for task in tasks:
            if (error := task.result()) is not None:
                raise error
        return _understood(Outcome, await self._ask(self._data, "POST", f"/v1/contributions/{upload.id}/commit", b""))

    # -- published versions

    async def delta(self, fragment: int, version: int) -> bytes:
        """The delta to `version`, waiting for it as long as it takes. Raises Refusal (version-gone)."""
        while True:
            try:
                path = f"/v1/fragments/{fragment}/versions/{version}/delta"
                return await self._ask(self._data, "GET", path, None, query={"wait": f"{WAIT_SECONDS:g}"})
            except Refusal as refusal:
                if refusal.code != Code.NOT_PUBLISHED:
                    raise

    async def snapshot(self, fragment: int, version: int) -> bytes:
        """The snapshot of `version`. Raises Refusal (version-gone, not-published)."""
        return await self._ask(self._data, "GET", f"/v1/fragments/{fragment}/versions/{version}/snapshot", None)

    # -- one request

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: bytes | None,
        patience: float | None = None,
        query: dict[str, str] | None = None,
    ) -> bytes:
        """The answer's body. Raises Refusal for a problem document, FaultError when the patience is at its end."""
        began, attempt = time.monotonic(), 0
        query = {**(query or {}), **({"run": self.run} if method == "GET" and self.run else {})}
        while True:
            attempt += 1
            try:
                return await self._once(session, method, path, body, query)
            except _Transient as error:
                fault = str(error)
            left = (self.patience if patience is None else patience) - (time.monotonic() - began)
            if left <= 0:
                raise FaultError(
                    f"the coordinator at {self.url} cannot be reached ({fault}); "
                    "check [site] coordinator and the network"
                )
            pause = min(left, backoff(attempt, random.random()))
            log.log(logging.WARNING if attempt in (3, 10, 30) else logging.DEBUG, "%s: %s; trying again", path, fault)
            await asyncio.sleep(pause)

    async def _once(
        self, session: aiohttp.ClientSession, method: str, path: str, body: bytes | None, query: dict[str, str]
    ) -> bytes:
        headers = {"Content-Type": MEDIA_TYPE} if body is not None else {}
        try:
            # Wrapped, because aiohttp warns of large bodies that are plain bytes.
            data_out = io.BytesIO(body) if body is not None else None
            async with session.request(
                method, self.url + path, data=data_out, params=query, headers=headers, allow_redirects=False
            ) as answer:
                data = await answer.read()
                self._counted(len(body or b""), len(data))
                if answer.status < 300:
                    return data
                problem = _problem(data, answer.status)
                if answer.status >= 500 or answer.status in _TRANSIENT:
                    raise _Transient(f"{answer.status} {problem.detail}")
                raise problem
        except TimeoutError:
            raise _Transient("no answer in time") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigError(f"the coordinator's certificate is not trusted: {error}; see [site] ca") from None
        except aiohttp.InvalidURL:
            raise ConfigError(f"[site] coordinator: {self.url} is not a URL that can be called") from None
        except aiohttp.ClientConnectorError as error:
            raise _Transient(error.os_error.strerror or str(error.os_error)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Transient(str(error) or type(error).__name__) from None


class _Transient(Exception):
    """A failure that trying again may mend."""


def _with_body(opening: OpenUpload, body: bytes) -> OpenUpload:
    """The announcement, with the body in it where that makes one request of the two."""
    return opening.model_copy(update={"body": body if len(body) <= INLINE_BYTES else None})


async def _plainly(work: Coroutine[None, None, None]) -> Exception | None:
    """The error that `work` ends in, as a value: a task group would wrap it, and callers look at its code."""
    try:
        await work
    except (RefusedError, FaultError) as error:
        return error
    return None


def _problem(data: bytes, status: int) -> Refusal:
    try:
        document = json.loads(data)
        version = document.get("version")
        return Refusal(
            str(document["code"]), str(document.get("detail", "")), version if isinstance(version, int) else None
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        code = Code.NOT_FOUND if status == 404 else Code.BAD_REQUEST
        return Refusal(code, f"the answer was {status}, and not from a coordinator", None)


def _understood(kind: type[M], data: bytes, limit: int = 1 << 20) -> M:
    try:
        return unpack(kind, data, limit)
    except FormatError as error:
        raise FaultError(f"the coordinator's answer is not understood: {error}; is it of the same version?") from None
