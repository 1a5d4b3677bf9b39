"""What a site has measured of itself: how long a step takes, how long a version takes to come, and τ from both."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

MARGIN = 1.25
"""τ covers the slowest of the recent round trips and a quarter more; one late version costs a wait, a τ that is
too long costs nothing but a longer look-ahead, because "auto" aligns as soon as the version is there."""


class Tempo:
    """Recent measurements, in seconds."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=64)
        self._trips: deque[float] = deque(maxlen=16)
        self._syncs: deque[float] = deque(maxlen=16)

    def stepped(self, seconds: float) -> None:
        self._steps.append(seconds)

    def round_trip(self, seconds: float) -> None:
        """From a snapshot to the arrival of the version that it led to."""
        self._trips.append(seconds)

    def synced(self, seconds: float) -> None:
        """From a snapshot to the coordinator's acknowledgement: what the link alone takes."""
        self._syncs.append(seconds)

    @property
    def step_seconds(self) -> float:
        """Median inner step; 0 before the first."""
        return statistics.median(self._steps) if self._steps else 0.0

    @property
    def sync_seconds(self) -> float:
        """Median time to an acknowledgement; 0 before the first."""
        return statistics.median(self._syncs) if self._syncs else 0.0

    def overlap(self, setting: Literal["auto", "unbounded"] | int) -> int | None:
        """τ in steps of this site; None: no bound. "auto" before any round trip: no bound either."""
        if setting == "unbounded":
            return None
        if setting != "auto":
            return setting
        if not self._trips or self.step_seconds <= 0:
            return None
        return max(1, math.ceil(MARGIN * max(self._trips) / self.step_seconds))
