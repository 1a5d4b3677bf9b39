"""What a coordinator needs of the machine that it runs on: real by default, imagined in the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from shared.files import DISK, Disk
from shared.memory import memory_bytes
from shared.parallel import CORES


def _threads(count: int, name: str) -> Executor:
    return ThreadPoolExecutor(count, name)


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
