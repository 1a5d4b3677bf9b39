"""Where the vectors of a fragment's state are: in memory, or where a subclass puts them (`coordinator.store.resting`).

A step is the same wherever they are: it is given plain arrays. Only who makes a state, and who knows that nobody
works on it for now, comes here.
"""

from __future__ import annotations

import numpy as np

from shared.fragments import F32


class Vectors:
    """The vectors of one fragment's state by name (master, published, and those of the optimizer), in memory."""

    def empty(self, name: str, size: int) -> F32:
        """An fp32 vector of `size` elements, whose content is whatever was there. One that this name had before is
        given up."""
        return np.empty(size, dtype=np.float32)

    def zeros(self, name: str, size: int) -> F32:
        """The same, all zero, and its pages there: the first touch of so much memory in a running round would hold up
        every thread that maps some."""
        values = self.empty(name, size)
        values.fill(0)
        return values

    def rest(self) -> None:
        """Nobody works on the fragment for now: its memory may be had by others. What the vectors hold stays."""
