"""Fragments at rest: Θ, Θ̂ and the optimizer's vectors in mapped scratch files, so that only those in work take memory.

A run of 10 billion parameters has 120 GB of state with Nesterov, and a merge works on one fragment of it. Mapped, a
vector is an array like any other; `rest` gives its pages back once the fragment's work is done. What was changed stays
in the page cache, from where the kernel writes it to the file and which it may use for something else after that, so
that a machine with room keeps everything in memory and one without reads a fragment from disk when its turn comes. The
price: what a round changes (12 bytes a parameter) is written to disk sooner or later, whether it is read again or not.

The files are scratch: `states/pPPPP.NAME`, made anew at each start from checkpoint and journal, never read by anyone
else, not synced, worth nothing after a crash. Their room is taken when they are made, before anything is acknowledged:
a mapping that finds the disk full ends the process where it stands.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from coordinator.outer.vectors import Vectors
from shared.files import DISK, Disk
from shared.fragments import F32, Fragment

Resting = Literal["auto", "memory", "mapped"]


def is_mapped(resting: Resting, needed: int, memory: int) -> bool:
    """Whether states of `needed` bytes in all rest in mapped files, on a machine with so many bytes of memory."""
    return needed > memory // 2 if resting == "auto" else resting == "mapped"


def state_bytes(fragment: Fragment, slots: Iterable[str]) -> int:
    """Bytes of Θ, Θ̂ and the optimizer's `slots`."""
    return 4 * fragment.size * (2 + len(tuple(slots)))


class MappedVectors(Vectors):
    """A fragment's vectors over files in `directory`, on Linux and macOS alike.

    Making one raises OSError where the disk has no room; nothing does after that.
    """

    def __init__(self, directory: Path, fragment: Fragment, disk: Disk = DISK) -> None:
        self._directory, self._fragment, self._disk = directory, fragment, disk
        self._mapped: dict[str, mmap.mmap] = {}
        self._untouched: set[str] = set()

    def reserve(self, names: Iterable[str]) -> None:
        """Makes the files of these vectors now, so that their disk is refused now or never."""
        for name in names:
            if name not in self._mapped:
                self._make(name)

    def empty(self, name: str, size: int) -> F32:
        self.reserve([name])
        self._untouched.discard(name)
        return np.frombuffer(self._mapped[name], dtype=np.float32, count=size)

    def zeros(self, name: str, size: int) -> F32:
        self.reserve([name])
        fresh = name in self._untouched
        values = self.empty(name, size)
        if not fresh:
            values.fill(0)
        return values

    def rest(self) -> None:
        for mapped in self._mapped.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _make(self, name: str) -> None:
        path, size = self._directory / f"p{self._fragment.index:04d}.{name}", 4 * self._fragment.size
        self._disk.allocate(path, size)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapped[name] = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._untouched.add(name)


def map_states(
    directory: Path, fragments: Iterable[Fragment], slots: Iterable[str], disk: Disk = DISK
) -> dict[int, MappedVectors]:
    """The homes of all fragments' states under `directory`, their disk taken. Raises OSError that says how much room
    there would have to be."""
    names, homes = ("master", "published", *slots), {}
    directory.mkdir(exist_ok=True)
    fragments = list(fragments)
    try:
        for fragment in fragments:
            home = homes[fragment.index] = MappedVectors(directory, fragment, disk)
            home.reserve(names)
    except OSError as error:
        needed = sum(state_bytes(fragment, names[2:]) for fragment in fragments)
        homes.clear()
        disk.remove(directory)
        raise OSError(
            f"{directory} has no room for the fragments at rest ({error.strerror or error}): they need "
            f"{needed / 1e9:.3g} GB of disk and {shutil.disk_usage(directory.parent).free / 1e9:.3g} GB are free"
        ) from error
    return homes
