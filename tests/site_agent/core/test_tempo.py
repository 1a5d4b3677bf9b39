from __future__ import annotations

from site_agent.core.tempo import Tempo


def measured(steps: list[float], trips: list[float]) -> Tempo:
    tempo = Tempo()
    for seconds in steps:
        tempo.stepped(seconds)
    for seconds in trips:
        tempo.synced(seconds)
    return tempo


def test_nothing_measured_is_zero() -> None:
    assert Tempo().step_seconds == 0.0
    assert Tempo().sync_seconds == 0.0


def test_a_step_is_the_median_of_the_last_64() -> None:
    tempo = measured([1.0, 5.0, 2.0], [])
    assert tempo.step_seconds == 2.0
    for _ in range(64):
        tempo.stepped(0.5)
    assert tempo.step_seconds == 0.5


def test_a_sync_is_the_median_of_the_last_16() -> None:
    tempo = Tempo()
    for seconds in [100.0] * 16 + [3.0, 1.0, 2.0] + [2.0] * 13:
        tempo.synced(seconds)
    assert tempo.sync_seconds == 2.0


def test_a_stated_overlap_is_kept_whatever_was_measured() -> None:
    assert Tempo().overlap(0) == 0
    assert measured([1.0], [100.0]).overlap(2) == 2


def test_unbounded_has_no_overlap_in_steps() -> None:
    assert measured([1.0], [1.0]).overlap("unbounded") is None


def test_auto_has_no_bound_before_a_round_trip_and_a_step_are_measured() -> None:
    assert Tempo().overlap("auto") is None
    assert measured([1.0], []).overlap("auto") is None
    assert measured([], [1.0]).overlap("auto") is None
    assert measured([0.0], [1.0]).overlap("auto") is None


def test_auto_covers_the_slowest_recent_trip_there_and_back_half_as_much_more_and_a_step() -> None:
    assert measured([0.5], [1.0]).overlap("auto") == 7  # 1 + 3 s of steps
    assert measured([0.5], [0.5, 1.1, 0.1]).overlap("auto") == 8  # 1 + 6.6, rounded up
    assert measured([10.0], [0.001]).overlap("auto") == 2
    tempo = measured([0.5], [100.0])
    for _ in range(16):
        tempo.synced(1.0)
    assert tempo.overlap("auto") == 7
