"""Whether compressing pays, and how hard: by what this processor and this link are measured to do.

The sections of a container are worth compressing where the bytes that it saves take longer to send than it takes to
find them. zstd at level 1 is within a hundredth of the entropy of quantised values, which have no repetitions for a
higher level to find; floats may have some.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.codecs.kernels import U8
from shared.wire import pack_section

Level = Literal["auto"] | int
LEVELS = (1, 3)
USUAL = 1
"""As long as nothing is known of the link."""
AGAIN = 16
"""Uses of a trial before the next one: what is compressed changes slowly as training goes on."""


@dataclass(frozen=True)
class Trial:
    """What a level made of a sample: the share of its bytes that was left, and raw bytes per second on one core."""

    level: int
    ratio: float
    bytes_per_second: float


def best_level(trials: Sequence[Trial], link: float) -> int:
    """The level under which a byte is soonest over a link of `link` bytes per second; 0: as it is.

    How slow a link is, may be somebody else's claim. Whatever it says, the answer is among the trials, and is none of
    them where nothing gets smaller: at the worst everyone pays for the slowest trial.
    """

    def cost(trial: Trial) -> float:
        """Seconds for each one that the same bytes take as they are."""
        return link / trial.bytes_per_second + trial.ratio

    best = min(trials, key=cost, default=None)
    return best.level if best is not None and cost(best) < 1 else 0


def usual_level(wanted: Level) -> int:
    """The level where nothing is measured."""
    return USUAL if wanted == "auto" else wanted


class Compression:
    """The level of one kind of container, where the run's config leaves it open."""

    def __init__(self, wanted: Level, clock: Callable[[], float] = time.perf_counter) -> None:
        self._wanted, self._clock = wanted, clock
        self._trials: list[Trial] = []
        self._uses = 0

    def level(self, sample: U8, link: float | None) -> int:
        """The level for what `sample` (the raw bytes of a section) is like, on a link of so many bytes per second
        (None: that is not known)."""
        if self._wanted != "auto" or link is None:
            return usual_level(self._wanted)
        if self._uses % AGAIN == 0:
            self._trials = [self._try(level, sample) for level in LEVELS]
        self._uses += 1
        return best_level(self._trials, link)

    def _try(self, level: int, sample: U8) -> Trial:
        began = self._clock()
        size = len(pack_section(sample, level))
        return Trial(level, size / max(1, sample.size), sample.size / max(1e-9, self._clock() - began))
