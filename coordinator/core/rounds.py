"""Rounds: the collecting of contributions for one fragment until the policy closes it.

A fragment always has one open round. Closing it hands its contributions, in order of site name, to the
merge; while that runs the next round is already open and collecting. Rounds of different fragments know
nothing of each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared.names import site_of

Reason = Literal["complete", "quorum", "deadline"]
Weighting = Literal["uniform", "tokens", "tokens2-per-step"]

GRACE_FACTOR = 0.5
"""γ of the grace window (Decoupled DiLoCo, arXiv 2604.21428): what a site whose course is not known yet is given."""
SPARED = 0.75
"""The part of what a site can spare that a round takes of it: its next step may be slower than its last ones."""
STALE_CYCLES = 8
"""So many cycles of the slowest site old may a contribution be, where no other bound is set."""
UNEVEN = 64.0
"""A site whose cycle is longer than so many of another one's may find that its contributions are too old."""
LATE = 0.5
"""A contribution that is late by this part of its site's cycle is no surprise yet: speeds wander."""


@dataclass(frozen=True)
class Contribution:
    """An accepted contribution, by what the journal knows of it; its tensors stay on disk."""

    id: str
    site: str
    fragment: int
    base_version: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Policy:
    """When a round closes, and how its contributions count. `quorum` None: all sites that train; `grace_seconds` None:
    measured; `max_staleness` None: by the number of sites; `weight_cap` None: none."""

    quorum: int | None
    grace_seconds: float | None
    deadline_seconds: float
    max_staleness: int | None
    weighting: Weighting
    weight_cap: float | None = None
    staleness_decay: float = 0.0


def stalest(policy: Policy, sites: int, cycles: Collection[float] = ()) -> int:
    """The staleness, in versions, that a contribution may have in a run of so many sites; `cycles` are the seconds that
    theirs take, as far as measured.

    Versions are no measure of age by themselves: a cycle of everybody is one version with a full quorum, and with a
    quorum of one a version for each cycle that a site has within that of the slowest. A bound that is sound for four
    sites refuses most of what thirty send, and all of one that is twenty times slower.
    """
    if policy.max_staleness is not None:
        return policy.max_staleness
    if policy.quorum is None:
        return STALE_CYCLES
    contributions = math.fsum(min(UNEVEN, max(cycles) / cycle) for cycle in cycles)
    return STALE_CYCLES * max(1, math.ceil(max(sites, contributions) / policy.quorum))


@dataclass(frozen=True)
class Tempo:
    """Measured times of a live site, in seconds: what τ steps take, and what a send and receive take."""

    overlap: float
    sync: float


@dataclass(frozen=True)
class Expected:
    """When a site's next contribution to a fragment should come, and by when it would be no surprise yet."""

    due: float
    until: float


Missing = Sequence[Expected | None]
"""What is known of the sites that train and are not in a round; None of one whose course is not known yet."""


@dataclass
class OpenRound:
    """Contributions collected so far, by id; times are those of the first and of the K-th one, and of each site's."""

    contributions: dict[str, Contribution] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    opened_at: float | None = None
    quorum_at: float | None = None

    @property
    def sites(self) -> KeysView[str]:
        """Those who have contributed."""
        return self.arrived.keys()

    def add(self, contribution: Contribution, policy: Policy, now: float) -> None:
        self.contributions[contribution.id] = contribution
        self.arrived.setdefault(contribution.site, now)
        if self.opened_at is None:
            self.opened_at = now
        # Learners of one site are one: nobody is to be a quorum by himself.
        if self.quorum_at is None and policy.quorum is not None and len(set(map(site_of, self.sites))) >= policy.quorum:
            self.quorum_at = now

    def ordered(self) -> list[Contribution]:
        """In order of site, then base version: the merge must not depend on who arrived first."""
        return sorted(self.contributions.values(), key=lambda c: (c.site, c.base_version, c.id))


def reason_to_close(
    round_: OpenRound,
    training: Sequence[str],
    tempos: Mapping[str, Tempo],
    policy: Policy,
    now: float,
    missing: Missing = (None,),
) -> Reason | None:
    """Why the round closes now, or None while it goes on collecting."""
    if round_.opened_at is None:
        return None
    everyone = set(training) <= round_.sites
    late = now >= round_.opened_at + policy.deadline_seconds
    if policy.quorum is None:
        return "complete" if everyone else "deadline" if late else None
    if round_.quorum_at is None:
        return None
    if everyone:
        return "complete"
    if late:
        return "deadline"
    return "quorum" if now >= round_.quorum_at + grace(round_, tempos, policy, missing) else None


def closes_by(
    round_: OpenRound, tempos: Mapping[str, Tempo], policy: Policy, missing: Missing = (None,)
) -> float | None:
    """The time at which the round closes if nothing more arrives; None while only an arrival can close it."""
    if round_.opened_at is None:
        return None
    deadline = round_.opened_at + policy.deadline_seconds
    if policy.quorum is None:
        return deadline
    if round_.quorum_at is None:
        return None
    return min(deadline, round_.quorum_at + grace(round_, tempos, policy, missing))


def grace(round_: OpenRound, tempos: Mapping[str, Tempo], policy: Policy, missing: Missing = (None,)) -> float:
    """Seconds to go on collecting after the quorum.

    Who waits for a round is who is in it: a site can spare τ·t_step − t_sync after its contribution came (Decoupled
    DiLoCo, arXiv 2604.21428, with medians), and the round goes on while each of them can. One whose link takes all that
    it has would wait in any case, and is no measure. Within that time the round waits for those that are expected, and
    for nobody else; what comes later opens the next round. A site whose course is not known yet is given γ of the time.
    """
    if policy.grace_seconds is not None:
        return policy.grace_seconds
    if round_.quorum_at is None:
        return 0.0
    able = [
        at + SPARED * (tempos[site].overlap - tempos[site].sync)
        for site, at in round_.arrived.items()
        if site in tempos and tempos[site].overlap > tempos[site].sync
    ]
    spare = max(0.0, min(able, default=0.0) - round_.quorum_at)
    wait = 0.0
    for site in missing:
        if site is None:
            wait = max(wait, GRACE_FACTOR * spare)
        elif site.due <= round_.quorum_at + spare:
            wait = max(wait, min(spare, site.until - round_.quorum_at))
    return wait


def weights(contributions: Sequence[Contribution], policy: Policy, version: int) -> list[float]:
    """Weights that sum to 1, in a round that becomes `version`.

    Equal, by tokens, or by tokens²/steps (Decoupled DiLoCo, arXiv 2604.21428); none more than `weight_cap` times the
    round's lower median; then times (1 + staleness)^−decay.
    """
    if policy.weighting == "uniform":
        raw = [1.0] * len(contributions)
    elif policy.weighting == "tokens":
        raw = [float(c.tokens) for c in contributions]
    else:
        raw = [float(c.tokens) ** 2 / max(1, c.steps) for c in contributions]
    if policy.weight_cap is not None and raw and (middle := statistics.median_low(raw)) > 0:
        raw = [min(value, policy.weight_cap * middle) for value in raw]
    raw = [value * _freshness(c, policy, version) for value, c in zip(raw, contributions, strict=True)]
    total = sum(raw)
    if total <= 0:
        return [1.0 / len(contributions)] * len(contributions)
    return [value / total for value in raw]


def share(contributions: Sequence[Contribution], cycles: Mapping[str, float], policy: Policy, version: int) -> float:
    """The part of a full round that these contributions are worth, 0 to 1: what their sites train in a cycle, against
    what all sites of `cycles` (tokens by site) do, times the mean (1 + staleness)^−decay of the tokens.

    By who is here, not by how much they bring: a contribution of half a cycle has half the length already.
    """
    tokens = sum(contribution.tokens for contribution in contributions)
    if tokens == 0:
        return 0.0
    here = {contribution.site for contribution in contributions}
    order = sorted(here | cycles.keys())
    everyone = math.fsum(cycles.get(site, 0.0) for site in order)
    present = math.fsum(cycles.get(site, 0.0) for site in order if site in here)
    fresh = math.fsum(c.tokens * _freshness(c, policy, version) for c in contributions) / tokens
    return fresh * (present / everyone if everyone > 0 else 1.0)


def _freshness(contribution: Contribution, policy: Policy, version: int) -> float:
    """(1 + staleness)^−decay of a contribution to the round that becomes `version`."""
    staleness = max(0, version - 1 - contribution.base_version)
    return float((1.0 + staleness) ** -policy.staleness_decay)
