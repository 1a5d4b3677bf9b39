"""What a coordinator needs of the machine that it runs on: real by default, imagined in the simulator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shared.files import DISK, Disk


def _threads(count: int, name: str) -> Executor:
    return ThreadPoolExecutor(count, name)


def memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory that this process may have: the machine's, or what its container may."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(have, int(limit.read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is none, or it says "max"
        return have


@dataclass(frozen=True)
class Machine:
    """`clock` decides and never goes back; `wall` is only written down; `pool(count, name)` makes `count` threads;
    `memory` is how many bytes of it there are."""

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    disk: Disk = DISK
    pool: Callable[[int, str], Executor] = _threads
    memory: Callable[[], int] = memory_bytes


MACHINE = Machine()
