"""What a coordinator needs of the machine that it runs on: real by default, imagined in the simulator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shared.files import DISK, Disk
from shared.parallel import CORES


def _threads(count: int, name: str) -> Executor:
    return ThreadPoolExecutor(count, name)


def memory_bytes(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may have: the machine's, or what its container, or a control group around it,
    may. `groups` names the process's groups, and `root` is where their files are."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_number(file) for file in _limits(groups, root))
    return min([have, *(limit for limit in limits if limit is not None)])


def _limits(groups: Path, root: Path) -> Iterator[Path]:
    """The files that may hold a limit: of the process's own group and of all around it, in version 2 and version 1 of
    control groups. (A container often sees its own group at the root, and the path to it as the machine has it.)"""
    try:
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in ["0::/", *lines]:
        _, _, kinds_and_path = line.partition(":")
        kinds, _, path = kinds_and_path.partition(":")
        names = [name for name in path.split("/") if name]
        if ".." in names:  # outside of what is to be seen here
            names = []
        for depth in range(len(names) + 1):
            if not kinds:
                yield root.joinpath(*names[:depth], "memory.max")
            elif "memory" in kinds.split(","):
                yield root.joinpath("memory", *names[:depth], "memory.limit_in_bytes")


def _number(file: Path) -> int | None:
    """The number above 0 that the file holds; None where there is none: version 2 says "max" of no limit."""
    try:
        number = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return number if number > 0 else None


@dataclass(frozen=True)
class Machine:
    """`clock` decides and never goes back; `wall` is only written down; `pool(count, name)` makes `count` threads;
    `memory` is how many bytes of it there are, `cores` how many threads can be at work at once."""

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    disk: Disk = DISK
    pool: Callable[[int, str], Executor] = _threads
    memory: Callable[[], int] = memory_bytes
    cores: int = CORES


MACHINE = Machine()
