"""How a site's batch is shared among its devices.

A site has device groups, each of some equal devices, one rank each. Every inner step trains `batch_size` sequences,
whatever the devices are: groups get sequences in proportion to their measured speeds, the ranks of a group as many as
each other. What a rank gets is cut into passes of at most a micro-batch. The ranks of a group take the same number of
passes, because they meet in each: where one has no sequence for a pass it takes another's, which weighs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

REDEAL_GAIN = 0.05
"""New shares are dealt where a step would be this much shorter by them: less is within what measured speeds waver."""
ANOTHER_SPEED = 2 * REDEAL_GAIN
"""A group's speed has to be another by so much to be worth a new deal: what two groups gain is half of it at most."""
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
    before the first step; `batch` is the site's.

    Shares are dealt as if a group took as long for each sequence, which is only about true: a pass has costs of its
    own, however many sequences are in it. So one deal leads to the next, and in the end to one that has been before,
    for ever to and fro. Then the best of them, as measured, stays until a group's speed with it is another.
    """

    def __init__(self, batch: int, speeds: Sequence[float]) -> None:
        self.batch, self.speeds = batch, list(speeds)
        self.shares = deal(batch, speeds)
        self._measured: list[list[float]] = [[] for _ in speeds]
        self._tried: list[Tried] = []
        self._settled: Tried | None = None

    def stepped(self, took: Sequence[float]) -> bool:
        """A step was taken, in so many seconds by each group. Whether the shares are others now."""
        if len(took) < 2:
            return False
        for measured, share, one in zip(self._measured, self.shares, took, strict=True):
            # One without a share has come along with a sequence of another's: it may have become faster.
            measured.append(max(1, share) / max(one, 1e-9))
        if len(self._measured[0]) < SETTLED_STEPS:
            return False
        self.speeds = [statistics.median(measured) for measured in self._measured]
        for measured in self._measured:
            measured.clear()
        shares, self.shares = self.shares, self._next()
        return self.shares != shares

    def _next(self) -> list[int]:
        """The shares from here on, by the speeds with those until now."""
        now = Tried(self.shares, self.speeds, seconds(self.shares, self.speeds))
        if self._settled is not None and now.like(self._settled):
            return self.shares
        self._settled = None
        self._tried.append(now)
        better = deal(self.batch, self.speeds)
        gains = seconds(better, self.speeds) < (1 - REDEAL_GAIN) * now.seconds
        if gains and all(better != tried.shares for tried in self._tried):
            return better
        self._settled = min(self._tried, key=lambda tried: tried.seconds)
        self._tried = []
        return self._settled.shares


@dataclass(frozen=True)
class Tried:
    """Shares, the groups' speeds with them, and how long the slowest took."""

    shares: list[int]
    speeds: list[float]
    seconds: float

    def like(self, other: Tried) -> bool:
        """Whether it is the same as then, as far as speeds can be measured."""
        speeds = zip(self.speeds, other.speeds, strict=True)
        return self.shares == other.shares and all(abs(one - then) <= ANOTHER_SPEED * then for one, then in speeds)
