"""What is usual among the sites, of which each has one voice however many learners it has: a site that could add
voices of its own would be its own witness."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from shared.names import by_site


def middle(values: Mapping[str, float]) -> float:
    """The lower median over the sites of the lower medians of their own participants; 0 where there is none."""
    voices = [statistics.median_low(of_one) for of_one in by_site(values).values()]
    return statistics.median_low(voices) if voices else 0.0
