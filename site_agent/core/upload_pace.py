"""How a contribution is cut into parts, and over how many connections it goes; from what the link has done so far.

A part should be on its way for a few seconds. Much less, and round trips cost more than bytes. Much more, and what
stands between a site and its coordinator cuts it off: proxies let no request last longer than a minute or so.
"""

from __future__ import annotations

from shared.protocol import PART_BYTES, SMALLEST_PART_BYTES

AIM_SECONDS = 8.0
MOST_LANES = 4
FIRST_BYTES = 512 << 10
"""Before anything is measured. Four of them take half a minute at 0.6 Mbit/s."""


class UploadPace:
    """`part_bytes` (a power of two) and `lanes` of the next upload."""

    def __init__(self) -> None:
        self.part_bytes, self.lanes = FIRST_BYTES, MOST_LANES

    def took(self, size: int, seconds: float) -> None:
        """A part of `size` bytes arrived in `seconds`, while `lanes` of them were on their way."""
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
