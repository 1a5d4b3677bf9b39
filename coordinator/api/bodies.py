"""Request bodies as they come in: bounded in size, and in how long they may pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from aiohttp import StreamReader, web

from coordinator.refused import Refused
from shared.protocol import Code


class _Watch:
    """Breaks off a reading for which nothing came for `seconds`. It is one timer for all of a body: one for each piece
    costs as much as the piece."""

    def __init__(self, content: StreamReader, seconds: float) -> None:
        self._content, self._seconds = content, seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer = self._loop.call_later(seconds, self._look)

    async def read(self) -> bytes:
        """The next piece, as it came; empty at the end. Raises TimeoutError."""
        self._since = self._loop.time()
        while True:
            piece, _ = await self._content.readchunk()
            if piece or self._content.at_eof():
                break
        self._since = None
        return piece

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        # (What was read is being used as long as nobody waits for more.)
        due = (now if self._since is None else self._since) + self._seconds
        if due <= now:
            self._content.set_exception(TimeoutError())
        else:
            self._timer = self._loop.call_at(due, self._look)


async def pieces(
    request: web.Request, limit: int, quiet_seconds: float, arrived: Callable[[int], None]
) -> AsyncIterator[bytes]:
    """The body of `request`, at most `limit` bytes; `arrived` is told how many came each time. Raises Refused."""
    if (request.content_length or 0) > limit:
        raise Refused(Code.TOO_LARGE, f"a body of {request.content_length} bytes; at most {limit} are read here")
    read, watch = 0, _Watch(request.content, quiet_seconds)
    try:
        while piece := await watch.read():
            read += len(piece)
            if read > limit:
                raise Refused(Code.TOO_LARGE, f"a body of more than {limit} bytes")
            arrived(len(piece))
            yield piece
    except TimeoutError:
        raise Refused(Code.CUT, f"nothing more of the body came for {quiet_seconds:g} s") from None
    except web.RequestPayloadError as error:
        reason = " ".join(str(error).split())
        code = Code.BAD_REQUEST if "Content-Encoding" in request.headers else Code.CUT
        raise Refused(code, f"the body cannot be read: {reason}") from error
    finally:
        watch.stop()
