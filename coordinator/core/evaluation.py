"""Which site evaluates the published weights, and when: one at a time, about `EVALUATIONS` times over the budget."""

from __future__ import annotations

from collections.abc import Collection

EVALUATIONS = 20
"""How often a run's published weights are evaluated over its token budget."""
EVALUATION_LEASE_SECONDS = 300.0


class Evaluations:
    """The lease of the evaluation, and the merged tokens of the newest weights that were evaluated (−1: none)."""

    def __init__(self, budget: int, newest: int = -1) -> None:
        self._step = max(1, budget // EVALUATIONS)
        self._newest = newest
        self._holder: str | None = None
        self._until = 0.0
        self._asked: set[str] = set()

    def ask(self, site: str, tokens: int, live: Collection[str], now: float, finished: bool) -> bool:
        """Whether this willing site should evaluate the weights at `tokens` now; it then holds the lease."""
        due = self._newest < 0 or tokens >= self._newest + (1 if finished else self._step)
        # At the end the holder may be told again: it asks once more before it leaves, and an order that crossed the end
        # of its training was never read.
        free = self._holder not in live or self._until <= now or (finished and self._holder == site)
        if not (due and free):
            return False
        self._holder, self._until = site, now + EVALUATION_LEASE_SECONDS
        self._asked.add(site)
        return True

    def report(self, site: str, tokens: int, merged: int) -> bool:
        """Whether an evaluation of the weights at `tokens` counts, of `merged` that there are: it was asked of this
        site (whose lease may have run out since), and is of weights that are newer than the last ones."""
        if site not in self._asked:
            return False
        self._asked.remove(site)
        if self._holder == site:
            self._holder = None
        if not self._newest < tokens <= merged:
            # The initial weights, at 0 tokens, are above the −1 of a run that was never evaluated.
            return False
        self._newest = tokens
        return True
