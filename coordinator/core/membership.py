"""Who takes part: sites, their sessions and their leases.

A site is *live* while its lease runs; heartbeats and arriving bytes renew it. A session is one start of
one agent: when a second agent joins under the same name the newest wins, and the older one is told that
it was superseded, because a restarted agent must get in at once and two must never both contribute.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

LEASE_SECONDS = 30.0
"""Long enough for several lost heartbeats, short enough that a dead site holds a round for half a minute."""

ENDED = 8
"""Sessions of each site that are remembered as ended by a newer one."""

State = Literal["preparing", "ready", "training"]


@dataclass(frozen=True)
class Report:
    """What a site says of itself with each heartbeat; seconds of 0 mean: not yet measured. `download_rate`: bytes per
    second."""

    state: State
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    overlap_seconds: float = 0.0
    sync_seconds: float = 0.0
    training_share: float = 0.0
    download_rate: float | None = None
    loss: float | None = None
    repairs: int = 0
    evaluates: bool = True


@dataclass
class Member:
    """A live site. `report` is its newest heartbeat, `seen` the time of its last sign of life; `stalled`: it should
    have contributed long ago."""

    site: str
    session: str
    lease_until: float
    report: Report
    seen: float
    stalled: bool = False


class Membership:
    """The live sites, by name."""

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self.lease_seconds = lease_seconds
        self.live: dict[str, Member] = {}
        self._ended: dict[str, deque[str]] = {}

    def join(self, site: str, session: str, now: float, state: State = "preparing") -> None:
        """`site` under a new session; an older session of that name ends here."""
        if (before := self.live.get(site)) is not None and before.session != session:
            self._ended.setdefault(site, deque(maxlen=ENDED)).append(before.session)
        self.live[site] = Member(site, session, now + self.lease_seconds, Report(state), now)

    def standing(self, site: str, session: str) -> Literal["member", "superseded", "unknown"]:
        """Superseded only where a newer session is known to have ended this one; one that is not known may have been
        forgotten by a restart."""
        member = self.live.get(site)
        if member is not None and member.session == session:
            return "member"
        return "superseded" if session in self._ended.get(site, ()) else "unknown"

    def renew(self, site: str, now: float) -> None:
        """A sign of life: a heartbeat, or bytes of an upload."""
        if (member := self.live.get(site)) is not None:
            member.lease_until = now + self.lease_seconds
            member.seen = now

    def remove(self, site: str) -> None:
        self.live.pop(site, None)

    def expire(self, now: float) -> list[str]:
        """Takes out the sites whose lease has run out, and names them in order."""
        gone = sorted(site for site, member in self.live.items() if member.lease_until <= now)
        for site in gone:
            del self.live[site]
        return gone

    def in_state(self, *states: State) -> list[Member]:
        """The live sites in any of `states`, in order of name."""
        return [self.live[site] for site in sorted(self.live) if self.live[site].report.state in states]

    def slowest_download(self) -> float | None:
        """Bytes per second that reach the slowest of the live sites that train, for whom a round lasts longest; None
        where none of them has said."""
        rates = (member.report.download_rate for member in self.in_state("training"))
        return min((rate for rate in rates if rate is not None), default=None)

    def next_expiry(self) -> float | None:
        return min((member.lease_until for member in self.live.values()), default=None)
