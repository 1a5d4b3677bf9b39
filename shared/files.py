"""Durable files: written beside, synced, renamed, so that a file is either whole or not there.

`Disk` is the operations that durability depends on, and nothing else; both programs write through one, so that the
simulator can put a disk in its place that fills up, fails, and loses in a crash what was not synced.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


class Disk:
    """The machine's own disk. Every method raises OSError where it refuses."""

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """`write` makes the file `path`. Not durable before `sync`."""
        write(path)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """`data` at its place in the file `path`, which is made if need be. Not durable before `sync`."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], offset + written)
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
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            self.write(beside, write)
            self.sync(beside)
            self.rename(beside, path)
        except BaseException:
            self.remove(beside)
            raise
        self.sync_directory(path.parent)


DISK = Disk()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
