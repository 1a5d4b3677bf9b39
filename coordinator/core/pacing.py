"""Pacing: how many inner steps each site takes, so that sites of unequal speed are due at the same time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

FASTEST = 64.0
"""No site is taken to be faster than so many times the lower median of all: one absurd report would otherwise leave the
others a step a cycle."""


def speed_bound(speeds: Mapping[str, float]) -> float:
    """The largest believable speed among `speeds`."""
    return FASTEST * statistics.median_low(speeds.values()) if speeds else math.inf


def dylu(speeds: Mapping[str, float], steps: int) -> dict[str, int]:
    """DyLU (Async Local-SGD, arXiv 2401.09135): max(1, ⌊speed/fastest · H⌋) inner steps for each site."""
    return {site: max(1, math.floor(pace)) for site, pace in paces(speeds, steps).items()}


def paces(speeds: Mapping[str, float], steps: int) -> dict[str, float]:
    """speed/fastest · H before rounding; `speeds` in inner steps per second, H = `steps`.

    A site carries the fraction into its next cycle. Rounded down for good, a site with H = 4 would be early
    by up to a quarter of every cycle and spend it waiting.
    """
    bound = speed_bound(speeds)
    speeds = {site: min(speed, bound) for site, speed in speeds.items()}
    fastest = max(speeds.values(), default=0.0)
    return {site: steps * speed / fastest if fastest > 0 else float(steps) for site, speed in speeds.items()}
