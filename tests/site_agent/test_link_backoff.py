from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from site_agent.link import BACKOFF_FIRST, BACKOFF_LONGEST, backoff

chances = st.floats(0, 1)


@given(st.integers(1, 10**9), chances)
def test_a_wait_is_never_negative_and_never_longer_than_the_longest(attempt: int, chance: float) -> None:
    assert 0 <= backoff(attempt, chance) <= BACKOFF_LONGEST


@given(st.integers(1, 100), chances)
def test_waits_do_not_shrink_as_attempts_go_on(attempt: int, chance: float) -> None:
    assert backoff(attempt, chance) <= backoff(attempt + 1, chance)


def test_waits_double_until_the_longest() -> None:
    bounds = [backoff(attempt, 1.0) for attempt in range(1, 12)]
    assert all(later == min(2 * earlier, BACKOFF_LONGEST) for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] == BACKOFF_LONGEST
    assert BACKOFF_FIRST <= bounds[0] <= 1.0


def test_jitter_is_full() -> None:
    """Sites that lost their coordinator together must not come back together."""
    assert backoff(5, 0.0) == 0.0
    assert backoff(5, 0.5) == backoff(5, 1.0) / 2
