"""A disk that fills up, fails, slows down, and loses in a crash what was not synced.

The files are real ones, in memory; what is imagined is what a crash leaves of them. A file that was written and not
synced is cut off anywhere or filled with zeros; a name that was given and whose directory was not synced may be the old
one. The database's own files are SQLite's business: for them a crash is a transaction that did or did not happen.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.files import Disk


class Crashed(BaseException):
    """The process whose disk this was is dead; nothing that it does any more reaches the disk."""


class FaultyDisk(Disk):
    """The disk of one process, for one life of it: after `crash` nothing gets through.

    `full` and `broken` make every write fail, as on a full disk or one that was remounted read-only. `crash_in` counts
    down with each operation: at 0 the process dies there, before or after the operation took effect. `committed` is
    told of each transaction that became durable.
    """

    def __init__(
        self, rng: random.Random, on_crash: Callable[[], None], committed: Callable[[str], None] = lambda what: None
    ) -> None:
        self._rng, self._on_crash, self._committed = rng, on_crash, committed
        self.dead = False
        self.fault: int | None = None
        self.crash_in: int | None = None
        self._unsynced: set[Path] = set()
        self._renamed: list[tuple[Path, Path, bytes | None]] = []

    # -- what the process does

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        with self._operation():
            self._unsynced.add(path)
            super().write(path, write)

    def write_at(self, path: Path, offset: int, pieces: Sequence[bytes]) -> None:
        with self._operation():
            self._unsynced.add(path)
            super().write_at(path, offset, pieces)

    def allocate(self, path: Path, size: int) -> None:
        with self._operation():
            super().allocate(path, size)

    def sync(self, path: Path) -> None:
        with self._operation():
            self._unsynced.discard(path)

    def rename(self, source: Path, target: Path) -> None:
        with self._operation():
            before = target.read_bytes() if target.is_file() else None
            super().rename(source, target)
            self._renamed.append((source, target, before))
            moved = {path for path in self._unsynced if path == source or source in path.parents}
            self._unsynced -= moved
            self._unsynced |= {target / path.relative_to(source) for path in moved}

    def sync_directory(self, directory: Path) -> None:
        with self._operation():
            self._renamed = [entry for entry in self._renamed if entry[1].parent != directory]

    def remove(self, path: Path) -> None:
        if self.dead:
            raise Crashed
        super().remove(path)
        self._unsynced.discard(path)

    def commit(self, what: str, commit: Callable[[], object]) -> None:
        with self._operation():
            super().commit(what, commit)
            self._committed(what)

    # -- what happens to it

    def crash(self) -> None:
        """The process is dead; what was not durable is lost, or not."""
        if self.dead:
            return
        self.dead = True
        for source, target, before in reversed(self._renamed):
            if self._rng.random() < 0.5 or not target.exists():
                continue
            source.parent.mkdir(parents=True, exist_ok=True)
            target.rename(source)
            if before is not None:
                target.write_bytes(before)
            if target in self._unsynced:
                self._unsynced.discard(target)
                self._unsynced.add(source)
        for path in sorted(self._unsynced):
            self._lose(path)

    def _lose(self, path: Path) -> None:
        if not path.is_file():
            return
        size = path.stat().st_size
        match self._rng.randrange(4):
            case 0:
                path.unlink()
            case 1:
                with path.open("r+b") as file:
                    file.truncate(self._rng.randrange(size + 1))
            case 2:
                path.write_bytes(bytes(size))
            case _:
                pass  # it had reached the disk after all

    def _operation(self) -> _Operation:
        return _Operation(self)


class _Operation:
    """One operation of a disk: it may be refused, or be the last one."""

    def __init__(self, disk: FaultyDisk) -> None:
        self._disk = disk
        self._last = False

    def __enter__(self) -> None:
        disk = self._disk
        if disk.dead:
            raise Crashed
        if disk.crash_in is not None:
            disk.crash_in -= 1
            if disk.crash_in <= 0:
                if disk._rng.random() < 0.5:
                    self._die()
                self._last = True
        if disk.fault is not None:
            raise OSError(disk.fault, errno.errorcode[disk.fault])

    def __exit__(self, kind: object, *_: object) -> None:
        if self._last and kind is None:
            self._die()

    def _die(self) -> None:
        self._disk.crash_in = None
        self._disk._on_crash()
        raise Crashed
