"""Pacing: how many inner steps each site takes, so that sites of unequal speed are due at the same time."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordinator.core.membership import Membership, Report
from coordinator.core.voices import middle
from shared.names import by_site

FASTEST = 64.0
"""No site is believed to be faster than so many times the lower median of all: one absurd report would otherwise leave
the others a step a cycle."""
LEAST_STEP = 1e-9
"""No inner step takes less, or more than one over it, in seconds: a speed is a finite number."""
MOST_PEERS = 1e6
"""A site that calls itself slower than this against the run is taken at it."""


def speed_bound(speeds: Mapping[str, float]) -> float:
    """The largest believable speed among `speeds`."""
    return FASTEST * middle(speeds) if speeds else math.inf


def believable(speeds: Mapping[str, float]) -> dict[str, float]:
    """The speeds that are no more than the bound."""
    bound = speed_bound(speeds)
    return {site: speed for site, speed in speeds.items() if speed <= bound}


def dylu(speeds: Mapping[str, float], steps: int) -> dict[str, int]:
    """DyLU (Async Local-SGD, arXiv 2401.09135): max(1, ⌊speed/fastest · H⌋) inner steps for each site."""
    return {site: max(1, math.floor(pace)) for site, pace in paces(speeds, steps).items()}


def paces(speeds: Mapping[str, float], steps: int) -> dict[str, float]:
    """speed/fastest · H before rounding; `speeds` in inner steps per second, H = `steps`.

    The fastest is the fastest that is believable; whoever claims more takes H steps, and the others theirs. A site
    carries the fraction into its next cycle. Rounded down for good, a site with H = 4 would be early by up to a quarter
    of every cycle and spend it waiting.
    """
    fastest = max(believable(speeds).values(), default=0.0)
    return {site: steps * min(1.0, speed / fastest) if fastest > 0 else float(steps) for site, speed in speeds.items()}


class Pacer:
    """The paces of a run's sites, from the speeds that they report.

    `steps` is H; with `equal_time` sites take steps in proportion to their speed, else all take H. With `everyone`
    rounds wait for all sites.
    """

    def __init__(self, members: Membership, steps: int, *, equal_time: bool, everyone: bool) -> None:
        self.reports: dict[str, Report] = {}
        self._members = members
        self._steps, self._equal_time, self._everyone = steps, equal_time, everyone

    def speeds(self) -> dict[str, float]:
        """Inner steps per second of the sites that have measured theirs, and deliver what they train."""
        measured = self._members.in_state("ready", "training")
        return {
            member.site: 1.0 / min(max(member.report.step_seconds, LEAST_STEP), 1 / LEAST_STEP)
            for member in measured
            if member.report.step_seconds > 0 and not member.stalled
        }

    def fastest(self) -> float | None:
        """The largest speed, as far as it is believable, in inner steps per second; None where none has been measured,
        or where of two nobody can tell which one is right."""
        speeds = self.speeds()
        if not speeds or (len(believable(speeds)) < len(speeds) and len(by_site(speeds)) <= 2):
            return None
        return min(max(speeds.values()), speed_bound(speeds))

    def absurd(self) -> list[str]:
        """The sites whose reported speeds are too far apart to be believed: those that pacing bounds. Of two, both,
        because nobody can tell which one is right."""
        speeds = self.speeds()
        absurd = sorted(speeds.keys() - believable(speeds).keys())
        return sorted(speeds) if absurd and len(by_site(speeds)) <= 2 else absurd

    def paces(self) -> dict[str, float] | None:
        """The pace of each site that is ready or trains; None where one has not been heard of since a restart, and the
        first to report would pass for the fastest. One that reports no speed takes H steps, and is no measure for the
        others."""
        taking_part = [member.site for member in self._members.in_state("ready", "training")]
        if not self._equal_time:
            return dict.fromkeys(taking_part, float(self._steps))
        if any(site not in self.reports for site in taking_part):
            return None
        measured = paces(self.speeds(), self._steps)
        return {site: max(1.0, measured.get(site, float(self._steps))) for site in taking_part}

    def pace(self, site: str) -> float | None:
        """Inner steps of this site's next cycle, with a fraction that it carries on. None: as it was."""
        return float(self._steps) if not self._equal_time else (self.paces() or {}).get(site)

    def cycle_seconds(self) -> dict[str, float]:
        """How long the cycle of each site takes that has measured its speed."""
        speeds, paces_ = self.speeds(), self.paces() or {}
        return {site: paces_[site] / speed for site, speed in speeds.items() if site in paces_}

    def peers(self, site: str) -> float | None:
        """How many inner steps the run takes for each one of this site, at the paces of now; at least 1. None: as it
        was."""
        if (taken := self.paces()) is None:
            return None
        # Where rounds wait for everyone all take their pace; where they do not, each trains as fast as it can.
        rates = taken if self._everyone else paces(self.speeds(), self._steps)
        if rates.get(site, 0.0) <= 0:
            return float(max(1, len(self._members.live)))
        return min(MOST_PEERS, max(1.0, sum(rates.values()) / rates[site]))
