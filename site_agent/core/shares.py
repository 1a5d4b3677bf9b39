"""How a site's batch is shared among its devices.

A site has device groups, each of some equal devices, one rank each. Every inner step trains `batch_size` sequences,
whatever the devices are: groups get sequences in proportion to their measured speeds, the ranks of a group as many as
each other. What a rank gets is cut into passes of at most a micro-batch. The ranks of a group take the same number of
passes, because they meet in each: where one has no sequence for a pass it takes another's, which weighs nothing.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

REDEAL_GAIN = 0.05
"""New shares are dealt where a step would be this much shorter by them: less is within what measured speeds waver."""
SETTLED_STEPS = 16
"""Steps between two deals; the median of as many is a group's speed."""


@dataclass(frozen=True)
class Pass:
    """Sequences `start` to `stop` of the step's batch in one forward and backward pass. `weighs` is false where they
    are another's."""

    start: int
    stop: int
    weighs: bool = True


def deal(batch: int, speeds: Sequence[float]) -> list[int]:
    """`batch` sequences for groups of these speeds (sequences per second), so that the slowest is through soonest: one
    after the other, each to the group that would be through with it first. Ties go to the group that comes first."""
    shares = [0] * len(speeds)
    for _ in range(batch):
        soonest = min(range(len(speeds)), key=lambda group: (shares[group] + 1) / speeds[group])
        shares[soonest] += 1
    return shares


def seconds(shares: Sequence[int], speeds: Sequence[float]) -> float:
    """How long the slowest group takes."""
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


def passes(first: int, sequences: int, ranks: int, most: int) -> list[list[Pass]]:
    """For each rank of a group its passes over the group's sequences, which begin at `first`; none of more than `most`.

    A group without sequences takes one pass over the batch's first one, which weighs nothing: its ranks have to come
    along.
    """
    bounds = [first + sequences * rank // ranks for rank in range(ranks + 1)]
    largest = max(stop - start for start, stop in pairwise(bounds))
    count = max(1, -(-largest // most))
    borrowed = Pass(first, first + 1, weighs=False) if sequences else Pass(0, 1, weighs=False)
    taken = []
    for start, stop in pairwise(bounds):
        cuts = [start + (stop - start) * n // count for n in range(count + 1)]
        taken.append([Pass(a, b) if b > a else borrowed for a, b in pairwise(cuts)])
    return taken


class Balance:
    """The shares of a site's groups, dealt anew as their speeds drift. `speeds` are sequences per second as measured
    before the first step; `batch` is the site's."""

    def __init__(self, batch: int, speeds: Sequence[float]) -> None:
        self.batch, self.speeds = batch, list(speeds)
        self.shares = deal(batch, speeds)
        self._taken: list[deque[float]] = [deque(maxlen=SETTLED_STEPS) for _ in speeds]

    def stepped(self, took: Sequence[float]) -> bool:
        """A step was taken, in so many seconds by each group. Whether the shares are others now."""
        for group, one in enumerate(took):
            if self.shares[group]:
                self._taken[group].append(self.shares[group] / max(one, 1e-9))
        if len(took) < 2 or any(share and len(taken) < SETTLED_STEPS for share, taken in self._now()):
            return False
        self.speeds = [
            statistics.median(taken) if share else speed
            for (share, taken), speed in zip(self._now(), self.speeds, strict=True)
        ]
        better = deal(self.batch, self.speeds)
        if seconds(better, self.speeds) > (1 - REDEAL_GAIN) * seconds(self.shares, self.speeds):
            return False
        self.shares = better
        for taken in self._taken:
            taken.clear()
        return True

    def _now(self) -> list[tuple[int, deque[float]]]:
        return list(zip(self.shares, self._taken, strict=True))
