"""What sites say that they trained, bounded by what can be: counts decide weights, shares and the end of the run.

An inner step has the run's batch size at every site, so a task that knows how long its sequences are knows the most
tokens that a step can count, and nothing above that is believed. Where it does not, the others are the measure once
there are three: the middle one of three is honest if two are; of two that differ nobody can tell which one lies. The
learners of one site are one witness, and none against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from coordinator.core.rounds import Contribution
from coordinator.core.voices import middle
from shared.names import by_site, site_of

LONGEST_CYCLES = 16
"""Cycles that one contribution may stand for. One is the rule; after an outage or a refusal it holds more."""
WITNESSES, APART = 3, 8.0
"""So many other sites are a measure, and so many times their middle one is believed."""
REACH = 3.0
"""A site earns credit for so many times the steps of the fastest one: measured speeds lag behind, and a site that has
just become faster must not be cut short."""
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
    _credit: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    def credible(self, claimed: Contribution, now: float, fastest: float | None) -> Contribution:
        """The contribution with its counts bounded by its site's credit, which is full at first; without steps there
        are no tokens. `fastest`: the inner steps per second of the fastest site; None where nobody can tell."""
        steps = min(claimed.steps, math.floor(self._credit_of(claimed, now, fastest)))
        return replace(claimed, steps=steps, tokens=min(claimed.tokens, int(steps * self._most_tokens(claimed.site))))

    def spend(self, believed: Contribution, now: float, fastest: float | None) -> None:
        """Takes an accepted contribution from its site's credit. What an upload was late by is credit still, and what
        the next one holds is paid from it."""
        left = self._credit_of(believed, now, fastest) - believed.steps
        self._credit[believed.site, believed.fragment] = (max(0.0, left), now)

    def note(self, believed: Contribution) -> None:
        """Remembers an accepted contribution."""
        if believed.steps > 0:
            self._rates[believed.site] = believed.tokens / believed.steps
            self._cycles[believed.site] = believed.steps

    def tokens_per_step(self, site: str) -> float:
        """Of the site's last contribution; of a site without one, the middle one of the others. 0: nothing known."""
        return self._rates.get(site) or middle(self._rates)

    def steps_per_cycle(self, site: str) -> float | None:
        """Of the site's last contribution; None of a site without one."""
        return self._cycles.get(site)

    def _credit_of(self, contribution: Contribution, now: float, fastest: float | None) -> float:
        """In inner steps, for one fragment."""
        most = float(LONGEST_CYCLES * self.steps)
        held, since = self._credit.get((contribution.site, contribution.fragment), (most, now))
        return most if fastest is None else min(most, held + REACH * fastest * (now - since))

    def _most_tokens(self, site: str) -> float:
        if self.sequence_tokens is not None:
            return self.batch_size * self.sequence_tokens
        others = {other: rate for other, rate in self._rates.items() if site_of(other) != site_of(site)}
        if len(by_site(others)) >= WITNESSES and (usual := middle(others)) > 0:
            return APART * usual
        return self.batch_size * LONGEST_SEQUENCE
