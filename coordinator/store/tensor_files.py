"""safetensors files of fp32 tensors, written and read in pieces.

The library's own functions want all tensors in memory at once, and copy them. Here a file of any size takes memory for
nothing but its header: it is written from the arrays as they lie, and read straight into others. Every program that
reads safetensors reads these.

    header's length (uint64, little endian) | header (JSON, padded with spaces) | tensors, end to end
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.codecs.kernels import F32, U8

PIECE_BYTES = 4 << 20
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000
"""The library's own bound, in bytes."""


class TensorWriter:
    """A new file of tensors with these names and shapes, which may come in any order.

    The header stands first and may say what is known last: `metadata` is a sample that is as long as what `finish` will
    be given, or longer.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        self._entries: dict[str, Any] = {}
        offset = 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            self._entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        # Padded, so that the tensors are aligned wherever the file is mapped.
        self._header_size = -(-len(self._header(metadata)) // 8) * 8
        self._file = path.open("wb", buffering=0)

    def write(self, name: str, values: F32) -> None:
        """The tensor `name`, contiguous. Raises OSError."""
        start, stop = self._entries[name]["data_offsets"]
        data = values.reshape(-1).view(np.uint8)
        if len(data) != stop - start:
            raise ValueError(f"tensor {name} has {len(data)} bytes where {stop - start} were announced")
        at = _LENGTH.size + self._header_size + start
        for begin in range(0, len(data), PIECE_BYTES):
            _write_at(self._file.fileno(), data[begin : begin + PIECE_BYTES], at + begin)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """All tensors are there. Raises OSError, and ValueError where the metadata is longer than its sample."""
        header = self._header(metadata)
        if len(header) > self._header_size:
            raise ValueError(f"metadata of {len(header)} bytes and room for {self._header_size}")
        padded = _LENGTH.pack(self._header_size) + header.ljust(self._header_size)
        _write_at(self._file.fileno(), np.frombuffer(padded, dtype=np.uint8), 0)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        return json.dumps({"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")).encode()


def write_tensors(path: Path, tensors: Mapping[str, F32], metadata: Mapping[str, str]) -> None:
    """Writes a whole file. Raises OSError."""
    with TensorWriter(path, {name: values.shape for name, values in tensors.items()}, metadata) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish(metadata)


@dataclass(frozen=True)
class TensorFile:
    """An opened file whose header has been read. `offsets` are where each tensor's bytes begin."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    offsets: dict[str, int]
    _descriptor: int

    def read_into(self, name: str, out: F32) -> None:
        """Fills `out`, contiguous and of the tensor's size. Raises OSError, and ValueError where the file ends."""
        data = out.view(np.uint8)
        for begin in range(0, len(data), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            filled = 0
            while filled < len(piece):
                got = os.preadv(self._descriptor, [piece[filled:].data], self.offsets[name] + begin + filled)
                if got == 0:
                    raise ValueError(f"tensor {name} is cut short")
                filled += got

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: Path) -> TensorFile:
    """Reads the header. Raises OSError, and ValueError where it is not that of a whole safetensors file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _opened(descriptor)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        os.close(descriptor)
        raise ValueError(f"its header is malformed: {type(error).__name__}: {error}") from None
    except BaseException:
        os.close(descriptor)
        raise


def _opened(descriptor: int) -> TensorFile:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, _LENGTH.size, 0)
    if len(prefix) < _LENGTH.size:
        raise ValueError("it is too short")
    (length,) = _LENGTH.unpack(prefix)
    if length > min(_LONGEST_HEADER, size - _LENGTH.size):
        raise ValueError(f"it claims a header of {length} bytes and has {size} in all")
    header = json.loads(os.pread(descriptor, length, _LENGTH.size).decode())
    metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
    shapes, offsets, end = {}, {}, 0
    for name, entry in sorted(header.items(), key=lambda named: int(named[1]["data_offsets"][0])):
        start, stop = (int(offset) for offset in entry["data_offsets"])
        shapes[name] = tuple(int(side) for side in entry["shape"])
        if entry["dtype"] != "F32" or start != end or stop - start != 4 * math.prod(shapes[name]):
            raise ValueError(f"tensor {name} is not fp32, or does not lie where it should")
        offsets[name], end = _LENGTH.size + length + start, stop
    if _LENGTH.size + length + end != size:
        raise ValueError(f"it has {size} bytes and its tensors end at {_LENGTH.size + length + end}")
    return TensorFile(metadata, shapes, offsets, descriptor)


def _write_at(descriptor: int, data: U8, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:].data, offset + written)
