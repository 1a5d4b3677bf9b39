"""How a contribution is cut into parts, and over how many connections it goes; from what the link has done so far.

A part should be on its way for a few seconds. Much less, and round trips cost more than bytes. Much more, and what
stands between a site and its coordinator cuts it off: proxies let no request last longer than a minute or so.
"""

from __future__ import annotations

import math
from collections import deque

from shared.protocol import PART_BYTES, SMALLEST_PART_BYTES

AIM_SECONDS = 8.0
MOST_LANES = 4
MOST_CONNECTIONS = 16
FIRST_BYTES = 512 << 10
"""Before anything is measured. Four of them take half a minute at 0.6 Mbit/s."""


class UploadPace:
    """`part_bytes` (a power of two) and `connections` of the next upload. `bytes_per_second` is what the link carried
    lately (None: nothing is known), `round_trip` the shortest of the last answers to small requests, in seconds."""

    def __init__(self) -> None:
        self.part_bytes, self.lanes = FIRST_BYTES, MOST_LANES
        self.bytes_per_second: float | None = None
        self._round_trips: deque[float] = deque(maxlen=16)

    @property
    def round_trip(self) -> float:
        return min(self._round_trips, default=0.0)

    @property
    def connections(self) -> int:
        """`lanes`, and more where these do not fill the link: each is idle for a round trip after each part, and one
        TCP stream carries no more than its window in a round trip. So four times what the link holds is on its way."""
        if self.lanes < MOST_LANES or self.bytes_per_second is None:
            return self.lanes
        held = self.bytes_per_second * self.round_trip
        return max(self.lanes, min(MOST_CONNECTIONS, math.ceil(4 * held / self.part_bytes)))

    def answered(self, seconds: float) -> None:
        """A small request was answered."""
        self._round_trips.append(seconds)

    def sent(self, size: int, seconds: float) -> None:
        """`size` bytes of a contribution took so long in all."""
        if size >= SMALLEST_PART_BYTES:
            rate = size / max(seconds, 1e-3)
            self.bytes_per_second = rate if self.bytes_per_second is None else (self.bytes_per_second + rate) / 2

    def took(self, size: int, seconds: float) -> None:
        """A part of `size` bytes arrived in `seconds`, with as many more on their way as there were connections."""
        if size < self.part_bytes:
            return  # the end of an upload is short: mostly round trip
        fit = size * AIM_SECONDS / max(seconds, 1e-3)
        while self.part_bytes > fit and self.part_bytes > SMALLEST_PART_BYTES:
            self.part_bytes //= 2
        if self.part_bytes == SMALLEST_PART_BYTES and seconds > AIM_SECONDS:
            self.lanes = max(1, self.lanes // 2)
        elif 2 * self.part_bytes <= fit:
            if self.lanes < MOST_LANES:
                self.lanes *= 2
            elif self.part_bytes < PART_BYTES:
                self.part_bytes *= 2

    def broke(self, size: int, seconds: float) -> bool:
        """A part of `size` bytes was cut off after `seconds`. Whether smaller parts, or fewer at a time, may get
        through. (Those that were cut with it are larger than parts are by then: they change nothing more.)"""
        if seconds < AIM_SECONDS / 2:
            return False
        if size > self.part_bytes:
            return True
        if self.part_bytes == SMALLEST_PART_BYTES and self.lanes == 1:
            return False
        self.part_bytes = max(SMALLEST_PART_BYTES, self.part_bytes // 4)
        self.lanes = max(1, self.lanes // 2)
        return True
