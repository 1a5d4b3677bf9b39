"""How much memory something takes, whatever the allocator and the machine make of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Peak:
    """`bytes`: the most that was held at once beyond what was held before, of all that Python and NumPy allocate."""

    bytes: int = 0


@contextmanager
def peak_of() -> Iterator[Peak]:
    """Measures the block."""
    peak = Peak()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
