import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.shaping import (
    SEGMENT_BYTES,
    LinkSettings,
    Passage,
    Shaper,
    format_duration,
    format_rate,
    next_cut,
    parse_duration,
    parse_rate,
)
from shared.errors import ConfigError

SETTINGS = st.builds(
    LinkSettings,
    rate=st.one_of(st.floats(1e3, 1e9), st.just(math.inf)),
    rtt=st.floats(0, 1),
    jitter=st.floats(0, 0.2),
    loss=st.floats(0, 0.5),
    seed=st.integers(0, 2**63 - 1),
)
SENDS = st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 200_000)), min_size=1, max_size=50)
"""(seconds since the last send, bytes)"""


def stream(shaper: Shaper, sends: list[tuple[float, int]]) -> list[tuple[float, int, Passage]]:
    """What one connection sends and when, with each chunk's passage."""
    now, after, passed = 0.0, -math.inf, []
    for gap, nbytes in sends:
        now += gap
        passage = shaper.send(now, nbytes, after)
        after = passage.arrives
        passed.append((now, nbytes, passage))
    return passed


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8bit", 1),
        ("8kbit", 1e3),
        ("50mbit", 6.25e6),
        ("50 Mbit", 6.25e6),
        ("50mbit/s", 6.25e6),
        ("1.5gbit", 187.5e6),
        (".5Gbit", 62.5e6),
        ("900B", 900),
        ("800kB", 800e3),
        ("800KB", 800e3),
        ("6MB/s", 6e6),
        ("1GB", 1e9),
    ],
)
def test_rate_is_read_in_bits_and_in_bytes(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    "text",
    ["", "50", "mbit", "50mb", "50Mb", "50mbps", "-1mbit", "0mbit", "1e3kbit", "50 mbit of it", "9" * 400 + "mbit"],
)
def test_rate_that_could_mean_two_things_is_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(ConfigError, match=r"kbit, mbit, gbit, kB, MB or GB: 50mbit"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250us", 250e-6), ("80ms", 0.08), ("1.5s", 1.5), ("2m", 120), ("0s", 0), ("30 s", 30)]
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "80", "ms", "80MS", "-80ms", "1h", "1s30ms", "80ms/s", "infs", "9" * 400 + "s"])
def test_duration_that_cannot_be_read_is_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(ConfigError, match=r"us, ms, s or m \(minutes\): 80ms"):
        parse_duration(text)


@given(st.integers(1, 999_999), st.sampled_from(["bit", "kbit", "mbit", "gbit"]))
def test_rate_is_shown_as_it_is_read(number: int, unit: str) -> None:
    rate = parse_rate(f"{number}{unit}")
    assert parse_rate(format_rate(rate)) == pytest.approx(rate, rel=1e-5)


@given(st.integers(0, 999_999), st.sampled_from(["us", "ms", "s", "m"]))
def test_duration_is_shown_as_it_is_read(number: int, unit: str) -> None:
    seconds = parse_duration(f"{number}{unit}")
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


def test_settings_are_shown_in_the_words_of_the_command_line() -> None:
    assert str(LinkSettings(rate=6.25e6, rtt=0.08)) == "50mbit 80ms"
    assert str(LinkSettings()) == "unlimited 0s"
    lossy = LinkSettings(rate=125e6, rtt=1.5, jitter=0.0005, loss=0.01, cut_every=30)
    assert str(lossy) == "1gbit 1.5s jitter 500us loss 0.01 cut 30s"


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"rtt": -0.1}, "rtt"),
        ({"rtt": math.inf}, "rtt"),
        ({"jitter": -0.1}, "jitter"),
        ({"loss": 1.0}, "loss"),
        ({"loss": -0.1}, "loss"),
        ({"cut_every": 0.0}, "cut"),
    ],
)
def test_impossible_setting_is_refused_by_name(wrong: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*: "):
        LinkSettings(**wrong)  # type: ignore[arg-type]


def test_buffer_is_about_one_bandwidth_delay_product() -> None:
    assert LinkSettings(rate=6.25e6, rtt=0.08).buffer_bytes == 500_000
    assert LinkSettings(rate=6.25e6, rtt=0.08, jitter=0.02).buffer_bytes == pytest.approx(625_000, abs=1)
    assert LinkSettings(rate=1e5, rtt=0.01).buffer_bytes == 65_536
    assert LinkSettings().buffer_bytes == 16 << 20


def test_chunks_are_four_milliseconds_of_the_link() -> None:
    assert LinkSettings(rate=6.25e6).chunk_bytes == 25_000
    assert LinkSettings(rate=1e5).chunk_bytes == SEGMENT_BYTES
    assert LinkSettings().chunk_bytes == 65_536


def test_chunk_takes_its_time_at_the_bottleneck_and_half_a_round_trip() -> None:
    shaper = Shaper(LinkSettings(rate=1000, rtt=0.5), "up")
    assert shaper.send(10.0, 500) == Passage(leaves=10.5, arrives=10.75)


def test_chunk_queues_behind_the_chunks_of_all_connections() -> None:
    shaper = Shaper(LinkSettings(rate=1000, rtt=0.5), "up")
    shaper.send(10.0, 500)
    other_connection = -math.inf
    assert shaper.send(10.25, 250, other_connection) == Passage(leaves=10.75, arrives=11.0)


def test_idle_time_is_not_saved_up_for_a_burst() -> None:
    shaper = Shaper(LinkSettings(rate=1000), "up")
    shaper.send(0.0, 1)
    assert [shaper.send(100.0, 1000).leaves for _ in range(3)] == [101.0, 102.0, 103.0]


def test_room_is_when_the_queue_is_down_to_the_buffer() -> None:
    settings = LinkSettings(rate=65_536)  # the buffer is one second
    shaper = Shaper(settings, "up")
    assert shaper.room_at(5.0) == 5.0
    shaper.send(5.0, 65_536)
    assert shaper.room_at(5.0) == 5.0
    shaper.send(5.0, 65_536)
    assert shaper.room_at(5.0) == 6.0
    assert shaper.room_at(6.5) == 6.5


def test_unlimited_link_only_delays() -> None:
    shaper = Shaper(LinkSettings(rtt=0.5), "up")
    assert shaper.send(1.0, 1 << 40) == Passage(leaves=1.0, arrives=1.25)
    assert shaper.room_at(1.0) == 1.0


def test_lost_segment_is_late_by_one_round_trip() -> None:
    settings = LinkSettings(rate=1e6, rtt=0.5, loss=0.3)
    shaper = Shaper(settings, "up")
    late = [passage.arrives - passage.leaves for passage in (shaper.send(n, SEGMENT_BYTES) for n in range(10_000))]
    assert {round(delay, 6) for delay in late} == {0.25, 0.75}
    assert sum(delay > 0.5 for delay in late) / len(late) == pytest.approx(0.3, abs=0.02)


def test_loss_strikes_each_segment_of_a_chunk() -> None:
    shaper = Shaper(LinkSettings(rate=1e6, rtt=0.5, loss=0.1), "up")
    passages = [shaper.send(n, 10 * SEGMENT_BYTES - 1) for n in range(10_000)]
    lost = sum(passage.arrives - passage.leaves > 0.5 for passage in passages)
    assert lost / len(passages) == pytest.approx(1 - 0.9**10, abs=0.02)


def test_retransmission_holds_up_its_own_connection_and_no_other() -> None:
    settings = LinkSettings(rate=1e9, rtt=0.5, loss=0.5, seed=3)
    shaper = Shaper(settings, "up")
    lost = next(passage for n in range(100) if (passage := shaper.send(n, 1)).arrives - passage.leaves > 0.5)
    same = shaper.send(lost.leaves, 1, after=lost.arrives)
    others = [shaper.send(lost.leaves, 1) for _ in range(20)]
    assert same.arrives >= lost.arrives
    assert min(other.arrives for other in others) < lost.arrives


def test_jitter_is_spread_over_its_range() -> None:
    shaper = Shaper(LinkSettings(rate=1e9, rtt=0.1, jitter=0.02), "up")
    extra = [shaper.send(n, 1).arrives - n - 0.05 for n in range(5_000)]
    assert min(extra) == pytest.approx(0, abs=1e-3)
    assert max(extra) == pytest.approx(0.02, abs=1e-3)
    assert sum(extra) / len(extra) == pytest.approx(0.01, abs=1e-3)


@given(SETTINGS, SENDS)
def test_link_is_never_faster_than_its_rate(settings: LinkSettings, sends: list[tuple[float, int]]) -> None:
    passed = stream(Shaper(settings, "up"), sends)
    for first, (sent, _, _) in enumerate(passed):
        total = 0
        for _, nbytes, passage in passed[first:]:
            total += nbytes
            assert passage.leaves - sent >= total / settings.rate - 1e-9


@given(SETTINGS, SENDS)
def test_bottleneck_is_never_idle_while_bytes_wait(settings: LinkSettings, sends: list[tuple[float, int]]) -> None:
    busy_until = 0.0
    for sent, nbytes, passage in stream(Shaper(settings, "up"), sends):
        busy_until = max(busy_until, sent) + nbytes / settings.rate
        assert passage.leaves == pytest.approx(busy_until)


@given(SETTINGS, SENDS)
def test_bytes_of_a_connection_leave_and_arrive_in_order(
    settings: LinkSettings, sends: list[tuple[float, int]]
) -> None:
    passages = [passage for _, _, passage in stream(Shaper(settings, "up"), sends)]
    assert passages == sorted(passages)
    assert [passage.arrives for passage in passages] == sorted(passage.arrives for passage in passages)


@given(SETTINGS, SENDS)
def test_no_byte_arrives_before_half_a_round_trip(settings: LinkSettings, sends: list[tuple[float, int]]) -> None:
    for sent, _, passage in stream(Shaper(settings, "up"), sends):
        assert passage.leaves >= sent
        assert passage.arrives - passage.leaves >= settings.rtt / 2 - 1e-9


@given(SETTINGS, SENDS)
def test_chunk_is_late_by_no_more_than_jitter_and_one_retransmission(
    settings: LinkSettings, sends: list[tuple[float, int]]
) -> None:
    shaper = Shaper(settings, "up")
    for gap, nbytes in sends:
        passage = shaper.send(gap, nbytes)
        assert passage.arrives - passage.leaves <= 1.5 * settings.rtt + settings.jitter + 1e-9


@given(SETTINGS, SENDS)
def test_equal_seeds_give_equal_links(settings: LinkSettings, sends: list[tuple[float, int]]) -> None:
    assert stream(Shaper(settings, "up"), sends) == stream(Shaper(settings, "up"), sends)


def test_seed_and_direction_decide_the_chances() -> None:
    sends = [(0.1, 1000)] * 20
    one, two = (LinkSettings(rate=1e6, rtt=0.1, jitter=0.05, seed=seed) for seed in (1, 2))
    shapers = [Shaper(one, "up"), Shaper(two, "up"), Shaper(one, "down")]
    assert len({tuple(stream(shaper, sends)) for shaper in shapers}) == 3


def test_loss_does_not_change_the_jitter() -> None:
    calm, lossy = (Shaper(LinkSettings(rate=1e6, rtt=1, jitter=0.1, loss=loss, seed=5), "up") for loss in (0.0, 0.3))
    late = [lossy.send(n, 1000).arrives - calm.send(n, 1000).arrives for n in range(50)]
    assert {round(delay, 6) for delay in late} == {0.0, 1.0}


def test_cuts_come_as_often_as_asked_and_out_of_step() -> None:
    random, times = Random(7), [0.0]
    for _ in range(5_000):
        times.append(next_cut(times[-1], 30.0, random))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= 15
    assert max(gaps) <= 45
    assert len(set(gaps)) > 1
    assert sum(gaps) / len(gaps) == pytest.approx(30, rel=0.02)


def test_equal_seeds_cut_at_equal_times() -> None:
    assert next_cut(5.0, 30.0, Random(1)) == next_cut(5.0, 30.0, Random(1))
