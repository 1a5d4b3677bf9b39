"""The scale of fp16's gradients while they are computed, so that small ones do not vanish (Micikevicius et al. 2018,
arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_SCALE, LARGEST_SCALE, GOOD_STEPS = 2.0**12, 2.0**24, 1000
"""By half as much where they overflow, by twice as much after so many steps in which they have not. They are sums over
tokens, so it begins below what is usual for means."""


class LossScale:
    """`value` is what losses are multiplied by: 1 where nothing `moves` it. Ranks that see the same gradients keep the
    same one."""

    def __init__(self, moves: bool) -> None:
        self.moves = moves
        self.reset()

    def reset(self) -> None:
        """As if no step had been taken."""
        self.value, self._good = FIRST_SCALE if self.moves else 1.0, 0

    def state(self) -> list[float]:
        return [self.value, float(self._good)]

    def load_state(self, state: Sequence[float]) -> None:
        """The inverse of `state`; a scale that nothing moves stays."""
        if self.moves:
            self.value, self._good = float(state[0]), int(state[1])

    def stepped(self, *, finite: bool) -> None:
        """A step had a gradient that was finite, or not."""
        if not self.moves:
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self._good % GOOD_STEPS == 0:
            self.value = min(LARGEST_SCALE, self.value * 2)
