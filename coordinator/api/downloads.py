"""Immutable files as they go out: from the disk to the socket within the kernel, in turns that leave the loop free."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import IO, Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

TURN_BYTES = 8 << 20
MOST_SENT, LEAST_SENT = 4 << 20, 256 << 10
"""What all downloads give to the kernel while nothing else gets a turn (some 4 ms, where all of them can take it), and
the bounds of one download's share."""


class Downloads:
    """How many downloads are under way, and so how much each may send at a time."""

    def __init__(self) -> None:
        self._count = 0

    def __enter__(self) -> Downloads:
        self._count += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._count -= 1

    @property
    def share(self) -> int:
        """Bytes for one system call."""
        return max(LEAST_SENT, min(MOST_SENT, TURN_BYTES // max(1, self._count)))


class Tagged(web.FileResponse):
    """A file under the ETag of its headers; aiohttp would tag it by time and size, which change with a rewrite."""

    def __init__(self, path: Path, headers: dict[str, str], downloads: Downloads) -> None:
        super().__init__(path, headers=headers)
        self.tag, self._downloads = headers["ETag"], downloads

    async def _sendfile(self, request: BaseRequest, fobj: IO[Any], offset: int, count: int) -> AbstractStreamWriter:
        """aiohttp's, in pieces: it hands all of the file to one system call, which does not come back to the event loop
        for as long as the reader keeps up. Over TLS asyncio reads and writes in place of the call; a loop that has
        neither says so, and aiohttp does it."""
        writer = await web.StreamResponse.prepare(self, request)
        if writer is None or (transport := request.transport) is None:
            raise ConnectionResetError("the connection is lost")
        loop, end = asyncio.get_running_loop(), offset + count
        with self._downloads as downloads:
            while offset < end:
                size = min(downloads.share, end - offset)
                try:
                    await loop.sendfile(transport, fobj, offset, size)
                except NotImplementedError:
                    return await self._sendfile_fallback(writer, fobj, offset, end - offset)
                offset += size
        await web.StreamResponse.write_eof(self)
        return writer
