"""When each fragment is due, and how long a cycle is.

A cycle is the H inner steps in which each fragment is due once. With a fixed H this is the schedule
`t ≡ (p+1)·H/P (mod H)` of Streaming DiLoCo (arXiv 2501.18512); a paced site's H may change from cycle to
cycle, so steps are counted from the cycle's own start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cycle:
    """`length` inner steps that begin after step `start`; `carry` is the fraction of a step left for the next."""

    start: int
    length: int
    carry: float = 0.0

    def due(self, step: int, fragments: int) -> list[int]:
        """The fragments that are due once inner step `step` (counted from 1) is done, in order."""
        return [p for p in range(fragments) if self.start + offset(p, fragments, self.length) == step]

    @property
    def end(self) -> int:
        """The last step of the cycle."""
        return self.start + self.length


def offset(fragment: int, fragments: int, steps: int) -> int:
    """(p+1)·H/P rounded, as a step of the cycle from 1 to H; what rounds to 0 falls on H."""
    return math.floor((fragment + 1) * steps / fragments + 0.5) % steps or steps


def next_cycle(start: int, pace: float, carry: float = 0.0) -> Cycle:
    """The cycle after step `start` for a site paced at `pace` steps: the whole steps now, the fraction later."""
    wanted = pace + carry
    length = max(1, math.floor(wanted + 1e-9))
    return Cycle(start, length, max(0.0, wanted - length))
