"""Learning-rate schedules over the run's token budget, so that all sites are at the same point of one schedule."""

from __future__ import annotations

import math
from typing import Literal

FLOOR = 0.1
"""Share of the peak rate that the cosine ends at (DiLoCo's inner schedule decays to a tenth, arXiv 2311.08105)."""
DECAY = 0.2
"""Share of the budget in which wsd comes down from the peak to zero (warmup-stable-decay)."""


def lr_factor(schedule: Literal["constant", "cosine", "wsd"], tokens: float, budget: int, warmup: int) -> float:
    """The share of the peak learning rate at `tokens` merged run tokens, from 0 to 1."""
    if tokens < warmup:
        return (tokens + 1) / (warmup + 1)
    done = min(1.0, (tokens - warmup) / max(1, budget - warmup))
    if schedule == "cosine":
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        return min(1.0, (1 - done) / DECAY)
    return 1.0
