"""Durable files: written beside, synced, renamed, so that a file is either whole or not there.

`Disk` is the operations that durability depends on, and nothing else; both programs write through one, so that the
simulator can put a disk in its place that fills up, fails, and loses in a crash what was not synced.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path


class Disk:
    """The machine's own disk. Every method raises OSError where it refuses."""

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """`write` makes the file `path`. Not durable before `sync`."""
        write(path)

    def write_at(self, path: Path, offset: int, pieces: Sequence[bytes]) -> None:
        """`pieces`, one after the other at their place in the file `path`, which is made if need be. Not durable before
        `sync`."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            write_pieces(descriptor, offset, pieces)
        finally:
            os.close(descriptor)

    def allocate(self, path: Path, size: int) -> None:
        """The file `path` is there, with `size` bytes that are zero and whose room on the disk is taken: a store into a
        mapping of it can then not find the disk full, which would end the process where it stands (SIGBUS)."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:  # macOS
                zeros = bytes(1 << 20)
                for at in range(0, size, len(zeros)):
                    os.pwrite(descriptor, zeros[: size - at], at)
        finally:
            os.close(descriptor)

    def sync(self, path: Path) -> None:
        """The content of a file is durable."""
        _fsync(path)

    def rename(self, source: Path, target: Path) -> None:
        """`source` takes the name `target`. Not durable before `sync_directory`."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """The file or directory `path` is gone, if it was there."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """The names within `directory` are durable."""
        _fsync(directory)

    def commit(self, what: str, commit: Callable[[], object]) -> None:
        """A database's transaction `what`, durable once `commit` has returned."""
        commit()

    def put(self, path: Path, write: Callable[[Path], None]) -> None:
        """`write` fills a file beside `path`; it is synced and takes that name, durably."""

        def named(beside: Path) -> str:
            write(beside)
            return path.name

        self.put_as(path.parent, named)

    def put_as(self, directory: Path, write: Callable[[Path], str]) -> Path:
        """The same for a file whose name shows only when it is written: `write` returns it, from `directory` on."""
        beside = directory / f".{uuid.uuid4().hex}"
        names: list[str] = []
        try:
            self.write(beside, lambda path: names.append(write(path)))
            self.sync(beside)
            path = directory / names[0]
            self.rename(beside, path)
        except BaseException:
            self.remove(beside)
            raise
        self.sync_directory(path.parent)
        return path


DISK = Disk()
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2
MOST_PIECES = 256
"""In one system call, which may take 1024 (IOV_MAX)."""


def write_pieces(descriptor: int, offset: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Writes `pieces`, one after the other, at `offset`; where they end. Raises OSError.

    The disk begins with them, so that the sync which makes them durable finds little left to wait for. That promises
    nothing, and where the system knows no such thing it does not happen.
    """
    begun, left = offset, [piece for piece in pieces if len(piece)]
    while left:
        written = os.pwritev(descriptor, left[:MOST_PIECES], offset)
        offset += written
        done = 0
        while done < len(left) and written >= len(left[done]):
            written -= len(left[done])
            done += 1
        del left[:done]
        if written:
            left[0] = memoryview(left[0])[written:]
    if _sync_file_range is not None:
        _sync_file_range(descriptor, begun, offset - begun, _SYNC_FILE_RANGE_WRITE)
    return offset


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
