"""How an upload is cut follows what the link does."""

from __future__ import annotations

from shared.protocol import PART_BYTES, SMALLEST_PART_BYTES
from site_agent.core.upload_pace import AIM_SECONDS, FIRST_BYTES, MOST_CONNECTIONS, MOST_LANES, UploadPace


def after(rate: float, parts: int = 20) -> UploadPace:
    """The pace after some parts over a link of `rate` bytes a second."""
    pace = UploadPace()
    for _ in range(parts):
        pace.took(pace.part_bytes, pace.part_bytes * pace.lanes / rate)
    return pace


def test_a_fast_link_gets_the_largest_parts() -> None:
    assert (after(1e9).part_bytes, after(1e9).lanes) == (PART_BYTES, MOST_LANES)


def test_a_part_takes_seconds_at_any_rate() -> None:
    for rate in (2e4, 1e5, 5e5, 1e6):
        pace = after(rate)
        assert pace.part_bytes * pace.lanes / rate <= AIM_SECONDS


def test_a_link_that_hardly_carries_anything_has_one_lane_of_the_smallest_parts() -> None:
    assert (after(1e3).part_bytes, after(1e3).lanes) == (SMALLEST_PART_BYTES, 1)


def test_a_link_that_gets_better_is_used() -> None:
    pace = after(1e3)
    for _ in range(20):
        pace.took(pace.part_bytes, 0.01)
    assert (pace.part_bytes, pace.lanes) == (PART_BYTES, MOST_LANES)


def test_the_short_end_of_an_upload_says_nothing_of_the_link() -> None:
    pace = UploadPace()
    pace.took(100, 60.0)
    assert pace.part_bytes == FIRST_BYTES


def test_what_breaks_after_a_while_goes_in_smaller_parts_until_there_are_none() -> None:
    pace = UploadPace()
    assert not pace.broke(FIRST_BYTES, 0.1), "no connection is not a slow one"
    shapes = []
    while pace.broke(pace.part_bytes, 60.0):
        shapes.append((pace.part_bytes, pace.lanes))
    assert shapes == [(FIRST_BYTES // 4, 2), (SMALLEST_PART_BYTES, 1)]


def test_all_lanes_that_are_cut_at_once_are_one_cut() -> None:
    """And none keeps a part that is larger than what gets through."""
    pace = UploadPace()
    assert [pace.broke(FIRST_BYTES, 60.0) for _ in range(4)] == [True] * 4
    assert (pace.part_bytes, pace.lanes) == (FIRST_BYTES // 4, 2)
    pace.part_bytes, pace.lanes = SMALLEST_PART_BYTES, 1
    assert pace.broke(FIRST_BYTES, 60.0)


def test_more_connections_fill_a_long_fat_link() -> None:
    """100 MB/s and 200 ms hold 20 MB; four lanes of 4 MiB would leave them idle half of the time."""
    pace = after(1e8)
    assert pace.connections == MOST_LANES, "nothing is known of the round trip"
    pace.sent(1 << 30, (1 << 30) / 1e8)
    for seconds in (0.9, 0.2, 0.3):
        pace.answered(seconds)
    assert pace.round_trip == 0.2
    assert pace.connections == MOST_CONNECTIONS
    pace.sent(1 << 30, (1 << 30) / 1e6)
    for _ in range(9):
        pace.sent(1 << 30, (1 << 30) / 1e7)
    assert pace.connections == MOST_LANES


def test_a_slow_link_has_no_more_connections_than_lanes() -> None:
    pace = after(1e3)
    pace.sent(1 << 20, 1e3)
    pace.answered(10.0)
    assert pace.connections == 1


def test_a_short_message_says_nothing_of_how_much_the_link_carries() -> None:
    pace = UploadPace()
    pace.sent(100, 10.0)
    assert pace.bytes_per_second is None
