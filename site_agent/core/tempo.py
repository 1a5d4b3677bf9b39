"""What a site has measured of itself: how long a step takes, how long its link takes, and τ from both."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

MARGIN = 1.5
"""τ covers the slowest of the recent trips and half as much more, for steps that are not all equally long."""


class Tempo:
    """Recent measurements, in seconds."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=64)
        self._syncs: deque[float] = deque(maxlen=16)

    def stepped(self, seconds: float) -> None:
        self._steps.append(seconds)

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
        """τ in steps of this site; None: no bound.

        "auto" is what the link takes there and back, in steps, and one for the step that the snapshot or the arrival
        falls into; before it is measured there is no bound. What the site spent waiting for *others* is left out on
        purpose: a τ that made room for that would let sites drift apart by up to a cycle and train on weights that
        are as old, where one short wait brings them in step again.
        """
        if setting == "unbounded":
            return None
        if setting != "auto":
            return setting
        if not self._syncs or self.step_seconds <= 0:
            return None
        return 1 + math.ceil(MARGIN * 2 * max(self._syncs) / self.step_seconds)
