"""Sections are compressed where that is sooner over this link with this processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shared.compression import AGAIN, LEVELS, USUAL, Compression, Trial, best_level

QUICK, THOROUGH = Trial(1, 0.6, 5e8), Trial(3, 0.5, 1e8)


@pytest.mark.parametrize(
    ("link", "level"),
    [
        (1e9, 0),  # a nanosecond a byte as it is, and 2.6 with compression
        (1.9e8, 1),  # 5.3 against 2 + 3.2
        (2.1e8, 0),
        (1e7, 3),  # 10 + 50 against 2 + 60
        (1.3e7, 1),
        (1e3, 3),
    ],
)
def test_the_level_is_the_one_under_which_a_byte_is_soonest(link: float, level: int) -> None:
    assert best_level([QUICK, THOROUGH], link) == level


def test_what_does_not_get_smaller_is_sent_as_it_is() -> None:
    assert best_level([Trial(1, 1.0, 1e9), Trial(3, 1.01, 1e8)], 1.0) == 0


@pytest.mark.parametrize("claim", [1.0, 1e-3, 1e-300, 5e-324])
def test_a_claim_of_no_link_at_all_costs_no_more_than_the_slowest_trial(claim: float) -> None:
    """Levels that are not tried, however small they make things, nobody can bring about."""
    assert best_level([QUICK, THOROUGH], claim) == THOROUGH.level == max(LEVELS)
    assert best_level([Trial(1, 1.0, 5e8), Trial(3, 1.0, 1e8)], claim) == 0, "what is not smaller is not bought"


def ticking(seconds: float) -> Callable[[], float]:
    times: Iterator[float] = iter(np.arange(10_000) * seconds)
    return lambda: float(next(times))


def test_a_level_that_is_stated_is_kept() -> None:
    sample = np.zeros(1000, np.uint8)
    assert [Compression(wanted).level(sample, 1e3) for wanted in (0, 1, 7)] == [0, 1, 7]


def test_nothing_is_tried_before_anything_is_known_of_the_link() -> None:
    compression = Compression("auto", ticking(1.0))
    assert compression.level(np.zeros(1000, np.uint8), None) == USUAL


def test_a_trial_is_repeated_once_in_a_while() -> None:
    clock, tried = ticking(1e-6), 0

    def counted() -> float:
        nonlocal tried
        tried += 1
        return clock()

    compression, sample = Compression("auto", counted), np.zeros(100_000, np.uint8)
    assert {compression.level(sample, 1e6) for _ in range(AGAIN)} == {1}
    assert tried == 2 * len(LEVELS)
    compression.level(np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8), 1e6)
    assert tried == 4 * len(LEVELS)
    assert compression.level(sample, 1e6) == 0, "what it is like by now cannot be compressed"
