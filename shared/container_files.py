"""Containers written straight to a file, section by section, with memory for a few sections of each core.

A container names the sizes of all its sections before the first one. Where they are not known beforehand (zstd), the
sections go to a spool and are copied behind their header: twice the writing, in exchange for memory that does not grow
with the fragment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from shared.codecs import codec_named
from shared.codecs.kernels import F32
from shared.fragments import Chunk, Fragment
from shared.parallel import in_order
from shared.wire import Buffer, Header, pack_head, pack_section

PIECE_BYTES = 1 << 20


def write_flat(
    path: Path, header: Header, fragment: Fragment, flat: F32, zstd_level: int, executor: Executor | None = None
) -> str:
    """Writes the container that `encode_flat` would make to `path`; returns the BLAKE3 of its bytes. Sections are
    encoded on the threads of `executor` (None: this process's), while those before them are hashed and written here.

    Raises ValueError on NaN or infinity, OSError where the disk refuses.
    """
    codec, chunks = codec_named(header.codec), fragment.chunks(header.chunk)

    def section_of(_: int, chunk: Chunk) -> Buffer:
        return pack_section(codec.encode(flat[chunk.start : chunk.stop]), zstd_level)

    sizes = [codec.size(chunk.size) for chunk in chunks]
    with _Hashed(path) as out, closing(in_order(chunks, section_of, executor)) as sections:
        if zstd_level == 0 and sizes == [codec.least(chunk.size) for chunk in chunks]:
            out.write(pack_head(header, sizes))
            for section in sections:
                out.write(section)
        else:
            # It has no name: whatever happens, nothing of it stays.
            with tempfile.TemporaryFile(dir=path.parent) as spool:
                sizes = [spool.write(section) for section in sections]
                out.write(pack_head(header, sizes))
                spool.seek(0)
                for piece in _pieces(spool):
                    out.write(piece)
        return out.digest()


class _Hashed:
    """A new file, and the BLAKE3 of what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = path.open("wb"), blake3()

    def write(self, data: Buffer) -> None:
        self._hash.update(data)
        self._file.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece
