"""The lag that is shown is the longest of the last fifteen seconds."""

from __future__ import annotations

from coordinator.lag import WINDOW_SECONDS, LargestOf


def test_a_long_lag_is_shown_until_the_window_has_passed() -> None:
    recent = LargestOf()
    assert recent.add(0.0, 0.3) == 0.3
    assert recent.add(1.0, 0.1) == 0.3
    assert recent.add(2.0, 0.2) == 0.3
    assert recent.add(WINDOW_SECONDS, 0.0) == 0.3
    assert recent.add(WINDOW_SECONDS + 0.5, 0.0) == 0.2, "and then the longest since"
    assert recent.add(WINDOW_SECONDS + 2.5, 0.05) == 0.05
    assert recent.add(WINDOW_SECONDS + 2.6, 0.7) == 0.7
