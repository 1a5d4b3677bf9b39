"""How fast sites receive what is published, so that it is compressed as far as their links are worth."""

from __future__ import annotations

from collections import OrderedDict

LEAST_BYTES = 1 << 20
"""What is smaller fits the kernel's buffers, whatever the link behind them does."""
REMEMBERED = 256


class Readers:
    """The last rate of each site that has received anything large."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, float] = OrderedDict()

    def received(self, site: str, size: int, seconds: float) -> None:
        """`size` bytes have gone to the site in so many seconds."""
        if size < LEAST_BYTES:
            return
        self._rates[site] = size / max(seconds, 1e-3)
        self._rates.move_to_end(site)
        if len(self._rates) > REMEMBERED:
            self._rates.popitem(last=False)

    @property
    def slowest(self) -> float | None:
        """Bytes per second of the slowest of them, for whom a round lasts longest; None where nothing is known."""
        return min(self._rates.values(), default=None)
