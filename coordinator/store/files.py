"""Blobs: immutable files that are named by what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

from blake3 import blake3

from shared.errors import CorruptError
from shared.files import DISK, Disk, write_pieces
from shared.wire import Buffer


def tree_bytes(directory: Path | str) -> int:
    """Bytes of all files below `directory`; files that vanish meanwhile do not count."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    inside = entry.is_dir(follow_symlinks=False)
                    total += tree_bytes(entry.path) if inside else entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue
    except (FileNotFoundError, NotADirectoryError):
        pass
    return total


REMEMBERED = 4096
WRITE_BYTES = 4 << 20
"""The disk is given a blob in pieces of about this size, and writes one while the next is copied."""


class Blobs:
    """Immutable files named by their BLAKE3 (256 bits): `blobs/ab/abcdef…`."""

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self.directory, self._disk = directory, disk
        self._sound: set[str] = set()

    def path(self, digest: str) -> Path:
        return self.directory / digest[:2] / digest

    def has(self, digest: str, size: int) -> bool:
        path = self.path(digest)
        return path.is_file() and path.stat().st_size == size

    def put(self, *pieces: Buffer, executor: Executor | None = None) -> str:
        """Stores the bytes of all pieces, one after the other, durably as one blob and returns its digest; `executor`
        may hash them while they are written. Raises OSError where the disk refuses."""

        def write(beside: Path) -> str:
            hashing = None if executor is None else executor.submit(_digest, pieces)
            _fill(beside, pieces)
            digest = _digest(pieces) if hashing is None else hashing.result()
            self._prepare(digest)
            return f"{digest[:2]}/{digest}"

        path = self._disk.put_as(self.directory, write)
        self._remember(path.name)
        return path.name

    def adopt(self, source: Path, digest: str) -> None:
        """Moves the finished file `source`, whose digest the caller has checked, into place, durably."""
        self._prepare(digest)
        self._disk.sync(source)
        self._disk.rename(source, self.path(digest))
        self._disk.sync_directory(self.path(digest).parent)
        self._remember(digest)

    def sound(self, digest: str) -> Path:
        """As `verify`, but what this process has written or verified is not read once more: a hash of all bytes costs
        more than merging them."""
        if digest not in self._sound:
            self.verify(digest)
            self._remember(digest)
        return self.path(digest)

    def verify(self, digest: str) -> Path:
        """The blob's path, once its bytes have been found to match. Raises CorruptError."""
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                found = _file_digest(file.fileno())
        except OSError as error:
            raise CorruptError(f"blob {path} cannot be read: {error.strerror}; restore it from a backup") from None
        if found != digest:
            raise CorruptError(f"blob {path} is corrupt: its bytes do not match its name; restore it from a backup")
        return path

    def remove(self, digest: str) -> None:
        self._sound.discard(digest)
        self._disk.remove(self.path(digest))

    def sweep(self, needed: set[str]) -> int:
        """Removes every blob that is not `needed` (a crash can leave one between its file and its row); how many."""
        strays = [path for path in self.directory.glob("??/*") if path.name not in needed]
        strays += self.directory.glob(".*")  # and one that has no name yet
        for path in strays:
            self._disk.remove(path)
        return len(strays)

    def _remember(self, digest: str) -> None:
        if len(self._sound) >= REMEMBERED:
            self._sound.clear()
        self._sound.add(digest)

    def _prepare(self, digest: str) -> None:
        parent = self.path(digest).parent
        if not parent.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            self._disk.sync_directory(self.directory)


def file_digest(path: Path) -> str:
    """BLAKE3 of a file, hexadecimal, read in bounded pieces."""
    with path.open("rb") as file:
        return _file_digest(file.fileno())


def _file_digest(descriptor: int) -> str:
    digest = blake3()
    while piece := os.read(descriptor, 1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _digest(pieces: Iterable[Buffer]) -> str:
    hashed = blake3()
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


def _fill(path: Path, pieces: Iterable[Buffer]) -> None:
    with path.open("wb") as file:
        end, held, size = 0, list[Buffer](), 0
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= WRITE_BYTES:
                end, held, size = write_pieces(file.fileno(), end, held), [], 0
        write_pieces(file.fileno(), end, held)
