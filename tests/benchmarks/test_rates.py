"""What is counted as tokens per second of processes that train at the same time."""

from __future__ import annotations

import pytest

from benchmarks.rates import Sample, Seen, of_sites, steady, together
from shared.errors import FaultError


def training(begin: int, end: int, speed: float) -> list[Sample]:
    """A sample a second."""
    return [Sample(at, speed * (at - begin)) for at in range(begin, end + 1)]


def test_only_the_time_counts_in_which_all_of_them_train() -> None:
    late = training(10, 40, 100.0)
    # The first one was ten times as fast as long as it had the device to itself.
    early = [Sample(at, 1000.0 * at) for at in range(10)] + [
        Sample(at, 9000.0 + 100.0 * (at - 9)) for at in range(10, 31)
    ]
    rate = together([early, late])
    assert rate.seconds == 20
    assert rate.whole == pytest.approx(200.0)
    assert rate.median == pytest.approx(200.0)
    assert rate.spread == pytest.approx(0.0)


def test_one_slow_window_is_in_the_whole_and_not_in_the_median() -> None:
    steps = [100.0] * 60
    steps[25:30] = [0.0] * 5
    samples = [Sample(at, sum(steps[:at])) for at in range(61)]
    rate = together([samples])
    assert rate.whole == pytest.approx(100.0 * 55 / 60)
    assert rate.median == pytest.approx(100.0)
    assert rate.spread == pytest.approx(0.5)


def test_few_samples_are_windows_of_their_own() -> None:
    assert together([[Sample(0.0, 0.0), Sample(2.0, 50.0)]]).median == pytest.approx(25.0)


def test_processes_that_never_trained_together_have_no_rate() -> None:
    with pytest.raises(FaultError, match="give more --seconds"):
        together([training(0, 5, 1.0), training(6, 9, 1.0)])
    with pytest.raises(FaultError, match="give more --seconds"):
        together([training(0, 60, 1.0), [Sample(0, 0), Sample(1, 1), Sample(100, 100)]])


def seen(at: float, *tokens: float, merged: tuple[int, ...] = (0, 0)) -> Seen:
    return Seen(at, tokens, merged, (0.9,) * len(tokens))


def test_a_run_is_steady_from_the_end_of_the_first_cycle_until_a_fragment_is_complete() -> None:
    course = [
        seen(0, 0, 0),
        seen(1, 100, 40),
        seen(2, 200, 100, merged=(50, 0)),
        seen(3, 300, 150, merged=(400, 100)),
        seen(4, 400, 200, merged=(500, 100)),
        seen(5, 500, 250, merged=(500, 500)),
    ]
    kept = steady(course, first=100, budget=500)
    assert [one.at for one in kept] == [2, 3]
    assert of_sites(kept) == [[Sample(2, 200), Sample(3, 300)], [Sample(2, 100), Sample(3, 150)]]


def test_a_run_that_never_is_steady_is_no_measurement() -> None:
    with pytest.raises(FaultError, match="give more --seconds"):
        steady([seen(0, 0, 0), seen(1, 500, 500, merged=(500, 500))], first=100, budget=500)
