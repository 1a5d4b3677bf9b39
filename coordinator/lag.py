"""How far the event loop lags behind: everything that a site asks for waits as long."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

INTERVAL_SECONDS = 0.05
WINDOW_SECONDS = 15.0
"""As long as people usually let pass between two scrapes, so that none misses a lag."""


class LargestOf:
    """The largest of the last WINDOW_SECONDS' measurements."""

    def __init__(self) -> None:
        self._falling: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> float:
        """Takes a measurement; the largest one as of now."""
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now, value))
        while self._falling[0][0] < now - WINDOW_SECONDS:
            self._falling.popleft()
        return self._falling[0][1]


async def watch_lag(show: Callable[[float], None]) -> None:
    """Measures until it is cancelled; `show` is told the largest recent lag in seconds."""
    clock, recent = asyncio.get_running_loop().time, LargestOf()
    while True:
        due = clock() + INTERVAL_SECONDS
        await asyncio.sleep(INTERVAL_SECONDS)
        now = clock()
        show(recent.add(now, now - due))
