"""What sites say that they trained, bounded by what can be: counts decide weights, shares and the end of the run.

An inner step has the run's batch size at every site, so a task that knows how long its sequences are knows the most
tokens that a step can count, and nothing above that is believed. Where it does not, the others are the measure once
there are three: the middle one of three is honest if two are; of two that differ nobody can tell which one lies.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from coordinator.core.rounds import Contribution

LONGEST_CYCLES = 16
"""Cycles that one contribution may stand for. One is the rule; after an outage or a refusal it holds more."""
WITNESSES, APART = 3, 8.0
"""So many other sites are a measure, and so many times their middle one is believed."""
REACH = 3.0
"""So many times what the fastest site can have trained meanwhile is believed."""
LONGEST_SEQUENCE = 1 << 20
"""Tokens; the bound while nothing else is known."""


@dataclass
class Claims:
    """Counts per site, from contributions as they were believed. `steps` is H; `sequence_tokens` the most tokens
    that a sequence can count, None where the task does not say."""

    steps: int
    batch_size: int
    sequence_tokens: int | None = None
    _rates: dict[str, float] = field(default_factory=dict)
    _cycles: dict[str, int] = field(default_factory=dict)

    def credible(self, claimed: Contribution, reach: float | None = None) -> Contribution:
        """The contribution with its counts bounded. `reach`: how many inner steps the fastest site can have taken since
        this one's last contribution; None where that is not known."""
        most = LONGEST_CYCLES * self.steps
        if reach is not None:
            # Measured speeds lag behind; a site that has just become faster must not be cut short.
            most = min(most, math.ceil(REACH * reach) + 2)
        steps = min(claimed.steps, most)
        return replace(
            claimed, steps=steps, tokens=min(claimed.tokens, int(max(1, steps) * self._most_tokens(claimed.site)))
        )

    def note(self, believed: Contribution) -> None:
        """Remembers an accepted contribution."""
        if believed.steps > 0:
            self._rates[believed.site] = believed.tokens / believed.steps
            self._cycles[believed.site] = believed.steps

    def tokens_per_step(self, site: str) -> float:
        """Of the site's last contribution; of a site without one, the middle one of the others. 0: nothing known."""
        return self._rates.get(site) or _middle(self._rates.values())

    def steps_per_cycle(self, site: str) -> float:
        """Of the site's last contribution, or H."""
        return float(self._cycles.get(site, self.steps))

    def _most_tokens(self, site: str) -> float:
        if self.sequence_tokens is not None:
            return self.batch_size * self.sequence_tokens
        others = [rate for other, rate in self._rates.items() if other != site]
        if len(others) >= WITNESSES and (middle := _middle(others)) > 0:
            return APART * middle
        return self.batch_size * LONGEST_SEQUENCE


def _middle(values: Collection[float]) -> float:
    return statistics.median_low(values) if values else 0.0
