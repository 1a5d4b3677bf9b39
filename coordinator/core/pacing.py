"""Pacing: how many inner steps each site takes, so that sites of unequal speed are due at the same time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

FASTEST = 64.0
"""No site is believed to be faster than so many times the lower median of all: one absurd report would otherwise leave
the others a step a cycle."""


def speed_bound(speeds: Mapping[str, float]) -> float:
    """The largest believable speed among `speeds`."""
    return FASTEST * statistics.median_low(speeds.values()) if speeds else math.inf


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
