"""Tokens per second of several processes that train at the same time, from what each had trained when.

Times are of the machine's monotonic clock, which all processes share. Only what lies between two times at which all
of them train is counted: a device is never shared by fewer than it is said to be.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.errors import FaultError

WINDOWS = 6
"""How many windows a measurement is cut into."""


@dataclass(frozen=True)
class Sample:
    """Tokens that a process has trained since it began, at a time in seconds."""

    at: float
    tokens: float


@dataclass(frozen=True)
class Seen:
    """What all sites of a run had trained at one time; `merged` are the tokens in each fragment, `shares` the sites'
    shares of time in inner steps."""

    at: float
    tokens: tuple[float, ...]
    merged: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Rate:
    """Of all processes together: tokens per second over the whole time, the median over windows of it, and the
    distance of the fastest window from the slowest as a share of that; `seconds` is the whole time."""

    whole: float
    median: float
    spread: float
    seconds: float


def together(series: Sequence[Sequence[Sample]]) -> Rate:
    """The rate while all of them trained. Raises FaultError where that was no time at all."""
    begin, end = max(each[0].at for each in series), min(each[-1].at for each in series)
    cut = [[sample for sample in each if begin <= sample.at <= end] for each in series]
    thinned = [_thinned(each, (end - begin) / WINDOWS) if each else [] for each in cut]
    if any(len(each) < 2 for each in thinned):
        raise FaultError("they hardly trained at the same time; give more --seconds")
    windows = [[_rate(*ends) for ends in pairwise(each)] for each in thinned]
    # Windows of one place in time, summed over the processes: what one has less another may have more.
    sums = [sum(parts) for parts in zip(*windows, strict=False)]
    median = statistics.median(sums)
    whole = sum(_rate(each[0], each[-1]) for each in cut)
    return Rate(whole, median, (max(sums) - min(sums)) / median, end - begin)


def steady(seen: Sequence[Seen], first: float, budget: int) -> list[Seen]:
    """From when every site has trained `first` tokens (its first cycle, with all that is made then) until the first
    fragment is complete. Raises FaultError where nothing is left."""
    kept = [one for one in seen if min(one.tokens) >= first and max(one.merged) < budget]
    if len(kept) < 2:
        raise FaultError("the run was over before it was steady; give more --seconds")
    return kept


def of_sites(seen: Sequence[Seen]) -> list[list[Sample]]:
    """Each site's own samples."""
    return [[Sample(one.at, one.tokens[site]) for one in seen] for site in range(len(seen[0].tokens))]


def _rate(first: Sample, last: Sample) -> float:
    return (last.tokens - first.tokens) / (last.at - first.at)


def _thinned(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """The first one, and of the others those at least so far apart."""
    kept = [samples[0]]
    for sample in samples[1:]:
        if sample.at - kept[-1].at >= 0.99 * seconds:
            kept.append(sample)
    return kept
