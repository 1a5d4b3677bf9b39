"""The wire container: a contribution, a delta or a snapshot of one fragment as bytes.

    magic "ISTHMUS" + format version (8 bytes) | header length (uint32, little endian) | msgpack header | sections

One section per chunk of the fragment's flat vector, in order, each an independent zstd frame (content
size and checksum on) of the codec's raw bytes, or these bytes themselves where the run has zstd off.
The header names all section sizes, so that a reader can check the whole geometry against the run's
layout before it touches a section, decode sections in parallel, and never allocates more than one
section's raw size. Nothing here is trusted: every length is bounded by what the layout allows.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgpack
import numpy as np
import zstandard
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.codecs import Codec, codec_named, grid
from shared.codecs.kernels import F32, U8
from shared.errors import FormatError
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment
from shared.names import LONGEST_NAME
from shared.parallel import over_chunks

Buffer = bytes | memoryview
MAGIC = b"ISTHMUS\x01"
_PREFIX = struct.Struct("<8sI")
_LONGEST_COUNT = 10**15
MOST_PROGRESS = 1 << 12
RUN_BYTES = 1 << 20
"""What is read of a container at once where all of it is read."""

Count = Annotated[int, Field(ge=0, le=_LONGEST_COUNT)]


class Header(BaseModel):
    """What a container says of itself.

    `progress`: of data that is leased, (epoch, shard, position) up to which a contribution holds it.

    `digest` is the digest of the published version `version`: of the base that a contribution starts from,
    of the result that a delta or snapshot leads to. So every body names exact weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["contribution", "delta", "snapshot"]
    run: str = Field(max_length=128)
    site: str = Field(max_length=LONGEST_NAME)
    fragment: Count
    base_version: Count
    version: Count
    digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    codec: str = Field(max_length=32)
    zstd: bool
    chunk: int = Field(ge=64, le=1 << 20)
    tensors: list[tuple[str, list[Count]]]
    tokens: Count
    steps: Count
    sizes: list[Count]
    progress: list[Annotated[tuple[Count, Count, Count], Field(strict=False)]] = Field([], max_length=MOST_PROGRESS)


def header_bound(fragment: Fragment) -> int:
    """The largest header, in bytes, that a container of this fragment can need."""
    table = sum(16 + len(tensor.name.encode()) + 9 * len(tensor.shape) for tensor in fragment.tensors)
    return 1024 + table + 9 * len(fragment.chunks()) + 28 * MOST_PROGRESS


def section_bound(raw_size: int) -> int:
    """The largest zstd frame of `raw_size` bytes: stored blocks of 128 KiB, frame header and checksum."""
    return raw_size + 3 * (raw_size // (128 << 10) + 1) + 32


def container_bound(fragment: Fragment, codec: str) -> int:
    """The largest container, in bytes, that this fragment in this codec can be."""
    sections = sum(section_bound(codec_named(codec).size(chunk.size)) for chunk in fragment.chunks())
    return _PREFIX.size + header_bound(fragment) + sections


class _Zstd(threading.local):
    """Compression contexts, one set per thread: they are costly to make and not safe to share."""

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._compressors:
            self._compressors[level] = zstandard.ZstdCompressor(
                level=level, write_checksum=True, write_content_size=True
            )
        return self._compressors[level]


_zstd = _Zstd()


def pack_section(raw: U8, zstd_level: int) -> Buffer:
    """The raw bytes of one chunk as a section; `zstd_level` 0 leaves them as they are, and where they are."""
    return _zstd.compressor(zstd_level).compress(raw.data) if zstd_level else raw.data


def unpacked(section: Buffer, zstd_level: int) -> U8:
    """The raw bytes of a section that `pack_section` made here."""
    return np.frombuffer(_zstd.decompressor.decompress(section) if zstd_level else section, dtype=np.uint8)


def pack_head(header: Header, sizes: Sequence[int]) -> bytes:
    """What comes before the sections of a container, where these have so many bytes."""
    sized = header.model_copy(update={"sizes": list(sizes)})
    # Left out where there is none: most runs have none.
    packed = msgpack.packb(sized.model_dump(mode="python", exclude={"progress"} if not sized.progress else None))
    return bytes(_PREFIX.pack(MAGIC, len(packed)) + packed)


def container_pieces(header: Header, sections: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """The container of `sections` without a copy of them: its bytes are these pieces, one after the other."""
    return (pack_head(header, [len(section) for section in sections]), *sections)


def pack_container(header: Header, sections: Sequence[Buffer]) -> bytes:
    """The container of `sections`; the header's `sizes` are filled in from them."""
    return b"".join(container_pieces(header, sections))


def encode_flat(
    header: Header,
    fragment: Fragment,
    flat: F32,
    zstd_level: int,
    residual: F32 | None = None,
    grid_step: float = 0.0,
) -> bytes:
    """`flat` (fp32, fragment.size) encoded under the header's codec, as one container; `grid_step`: see codecs.grid.

    `residual`, where given, receives `flat − decoded`: what the codec lost. Raises ValueError on NaN or infinity.
    """
    sections = encode_sections(grid(header.codec, grid_step), fragment.chunks(), flat, residual)
    return pack_container(header, pack_sections(fragment, sections, zstd_level))


def encode_sections(codec: Codec, chunks: Sequence[Chunk], flat: F32, residual: F32 | None = None) -> list[U8]:
    """The raw bytes of every chunk of `flat` (fp32), encoded on all cores; `residual` as in `encode_flat`, or `flat`
    itself."""

    def encode(_: int, chunk: Chunk) -> U8:
        x = flat[chunk.start : chunk.stop]
        if residual is None:
            return codec.encode(x)
        left = residual[chunk.start : chunk.stop]
        if residual is not flat:
            np.copyto(left, x)
        return codec.encode(x, left, -1.0)

    return over_chunks(chunks, encode)


def pack_sections(fragment: Fragment, raws: Sequence[U8], zstd_level: int) -> list[Buffer]:
    """`pack_section` of the raw bytes of every chunk, on all cores."""
    if not zstd_level:
        return [pack_section(raw, 0) for raw in raws]
    return over_chunks(fragment.chunks(), lambda section, _: pack_section(raws[section], zstd_level))


class _Buffer(threading.local):
    """Memory to read into, one piece per thread, as large as was ever asked for."""

    def __init__(self) -> None:
        self._held = memoryview(bytearray())

    def of(self, size: int) -> memoryview:
        if len(self._held) < size:
            self._held = memoryview(bytearray(size))
        return self._held[:size]


_buffer = _Buffer()


class Bytes:
    """Random access to bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.size = len(data)

    def read(self, offset: int, size: int) -> memoryview:
        """At most `size` bytes from `offset` on, which is fewer at the end."""
        return self._data[offset : offset + size]

    def close(self) -> None:
        self._data.release()


class File:
    """Random access to a file, by positioned reads, so that threads share it and nothing is mapped."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> memoryview:
        """At most `size` bytes from `offset` on, in memory that this thread's next reading of any file takes again:
        fresh pages for every section would cost more than the reading."""
        buffer = _buffer.of(size)
        return buffer[: self.read_into(offset, buffer)]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from `offset` on; how many bytes there were."""
        filled = 0
        while filled < len(buffer) and (got := os.preadv(self._descriptor, [buffer[filled:]], offset + filled)):
            filled += got
        return filled

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Container:
    """A container whose geometry has been checked against a fragment; sections are read on demand."""

    header: Header
    fragment: Fragment
    codec: Codec
    chunks: tuple[Chunk, ...]
    _source: Bytes | File
    _offsets: tuple[int, ...]

    def raw(self, section: int) -> U8:
        """The raw bytes of one section, which are this thread's until it reads another one.

        Raises FormatError where they are not what the header promised.
        """
        return self._unpacked(section, self._read(section, section + 1))

    def _read(self, start: int, stop: int) -> memoryview:
        """The bytes of sections `start` to `stop`."""
        size = sum(self.header.sizes[start:stop])
        data = self._source.read(self._offsets[start], size)
        if len(data) != size:
            cut = bisect_right(self._offsets, self._offsets[start] + len(data)) - 1
            here = self._offsets[start] + len(data) - self._offsets[cut]
            raise FormatError(f"section {cut} is cut short: {here} of {self.header.sizes[cut]} bytes")
        return data

    def _unpacked(self, section: int, data: memoryview) -> U8:
        if not self.header.zstd:
            return np.frombuffer(data, dtype=np.uint8)
        elements = self.chunks[section].size
        least, most = self.codec.least(elements), self.codec.size(elements)
        return np.frombuffer(_decompress(data, least, most, section), dtype=np.uint8)

    def read_raw(self, section: int, out: U8) -> None:
        """The raw bytes of one section of a codec that always has as many, into `out` uint8 (codec.size(…),)."""
        if self.header.zstd or not isinstance(self._source, File):
            out[:] = self.raw(section)
        elif (got := self._source.read_into(self._offsets[section], out.data)) != out.size:
            raise FormatError(f"section {section} is cut short: {got} of {out.size} bytes")

    def accumulate(self, section: int, weight: float, acc: F32) -> None:
        """acc += weight · decoded section; acc is fp32 (chunks[section].size,)."""
        self.codec.accumulate(self.raw(section), weight, acc)

    def add_to(self, flat: F32, weight: float = 1.0) -> None:
        """flat += weight · decoded, the whole fragment, in place and on all cores."""
        over_chunks(
            self.chunks, lambda section, chunk: self.accumulate(section, weight, flat[chunk.start : chunk.stop])
        )

    def decode(self) -> F32:
        """The whole fragment as a new flat fp32 vector."""
        flat = np.zeros(self.fragment.size, dtype=np.float32)
        self.add_to(flat)
        return flat

    def screen(self, seen: Callable[[memoryview], object] = lambda data: None) -> float:
        """Σ of the squares of all that it decodes to, in one pass, in which `seen` is given all of the container's
        bytes from first to last. Raises FormatError naming the first section that is malformed or absurd (see
        `Codec.screen`), and takes memory for a few sections at a time: reading and hashing each alone is as many more
        times that threads wait for Python's lock."""
        squares = []
        seen(self._source.read(0, self._offsets[0]))
        for run in self._runs():
            data = self._read(run.start, run.stop)
            seen(data)
            for section in run:
                at = self._offsets[section] - self._offsets[run.start]
                raw = self._unpacked(section, data[at : at + self.header.sizes[section]])
                try:
                    squares.append(self.codec.screen(raw, self.chunks[section].size))
                except FormatError as error:
                    raise FormatError(f"section {section}: {error}") from None
        return math.fsum(squares)

    def _runs(self) -> Iterator[range]:
        """All sections, in runs of at least one and at most RUN_BYTES."""
        start = size = 0
        for section, more in enumerate(self.header.sizes):
            if section > start and size + more > RUN_BYTES:
                yield range(start, section)
                start, size = section, 0
            size += more
        if start < len(self.header.sizes):
            yield range(start, len(self.header.sizes))

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_header(source: Bytes | File, bound: int) -> tuple[Header, int]:
    """The header and the offset of the first section; `bound` limits the header's bytes."""
    prefix = bytes(source.read(0, _PREFIX.size))
    if len(prefix) < _PREFIX.size or prefix[:7] != MAGIC[:7]:
        raise FormatError("not an Isthmus container: the magic is missing")
    magic, length = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FormatError(f"container format {magic[7]} is not known here; this is format {MAGIC[7]}")
    if length > bound:
        raise FormatError(f"the header claims {length} bytes; at most {bound} fit this fragment")
    packed = bytes(source.read(_PREFIX.size, length))
    if len(packed) != length:
        raise FormatError(f"the header is cut short: {len(packed)} of {length} bytes")
    try:
        fields = msgpack.unpackb(packed, use_list=True)
        return Header.model_validate(_tuples(fields)), _PREFIX.size + length
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"the header's {where or 'fields'}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FormatError(f"the header is not msgpack: {error}") from None


def open_container(source: bytes | Path, fragment: Fragment, codecs: Sequence[str] | None = None) -> Container:
    """The container in `source`, its whole geometry checked against `fragment`.

    `codecs` are those that the run allows here; None: any that is known. Raises FormatError.
    """
    reader = Bytes(source) if isinstance(source, bytes) else File(source)
    try:
        return _checked(reader, fragment, codecs)
    except BaseException:
        reader.close()
        raise


def _checked(reader: Bytes | File, fragment: Fragment, codecs: Sequence[str] | None) -> Container:
    header, start = read_header(reader, header_bound(fragment))
    if header.fragment != fragment.index:
        raise FormatError(f"the container is of fragment {header.fragment}, not {fragment.index}")
    if codecs is not None and header.codec not in codecs:
        raise FormatError(f"codec {header.codec!r} is not allowed here; {', '.join(codecs)} would do")
    table = [(tensor.name, list(tensor.shape)) for tensor in fragment.tensors]
    if header.tensors != table:
        raise FormatError(f"the tensor table is not that of fragment {fragment.index}")
    if header.chunk != CHUNK_ELEMENTS:
        raise FormatError(f"chunks of {header.chunk} elements are not known here; {CHUNK_ELEMENTS} would do")
    codec, chunks = codec_named(header.codec), tuple(fragment.chunks(header.chunk))
    if len(header.sizes) != len(chunks):
        raise FormatError(f"{len(header.sizes)} sections where the fragment has {len(chunks)} chunks")
    offsets = []
    for section, (size, chunk) in enumerate(zip(header.sizes, chunks, strict=True)):
        least, most = codec.least(chunk.size), codec.size(chunk.size)
        if size > section_bound(most) or (not header.zstd and not least <= size <= most):
            raise FormatError(f"section {section} claims {size} bytes for {_count(least, most)} raw ones")
        offsets.append(start)
        start += size
    if start != reader.size:
        raise FormatError(f"the container has {reader.size} bytes and its sections end at {start}")
    return Container(header, fragment, codec, chunks, reader, tuple(offsets))


def tensor_table(fragment: Fragment) -> list[tuple[str, list[int]]]:
    """The header's `tensors` for this fragment."""
    return [(tensor.name, list(tensor.shape)) for tensor in fragment.tensors]


def blob_digest(data: bytes) -> str:
    """BLAKE3 of a whole container (256 bits, hexadecimal): its address, its ETag, its identity on the wire."""
    return blake3(data).hexdigest()


def _decompress(data: memoryview, least: int, most: int, section: int) -> bytes:
    try:
        claimed = zstandard.get_frame_parameters(data).content_size
        if not least <= claimed <= most:
            needed = _count(least, most)
            raise FormatError(f"section {section} claims {claimed} raw bytes and the codec needs {needed}")
        raw = _zstd.decompressor.decompress(data, max_output_size=claimed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"section {section} is not a sound zstd frame: {error}") from None
    if len(raw) != claimed:
        raise FormatError(f"section {section} holds {len(raw)} raw bytes and claims {claimed}")
    return raw


def _count(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _tuples(fields: object) -> object:
    """msgpack has lists only; the tensor table's rows are pairs."""
    if isinstance(fields, dict) and isinstance(fields.get("tensors"), list):
        fields["tensors"] = [tuple(row) if isinstance(row, list) else row for row in fields["tensors"]]
    return fields
