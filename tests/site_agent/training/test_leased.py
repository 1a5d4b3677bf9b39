"""Leased data at a site: in the order of the leases, each sequence once, the same after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import DataOrders, ShardLease
from shared.task import Manifest
from site_agent.training.leased import LeasedStream, order_of

SIZES = [6, 4, 10]


class Recording:
    """A task whose batches are the sequences themselves."""

    def leased_batch(self, sequences: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return list(sequences)


def stream(directory: Path, batch_size: int = 4) -> LeasedStream:
    return LeasedStream(Recording(), Manifest("0" * 32, SIZES), batch_size, 7, directory)


def orders(*leases: tuple[int, int, int, int], withdrawn: tuple[int, ...] = (), next_number: int = 99) -> DataOrders:
    return DataOrders(
        next_number=next_number,
        leases=[ShardLease(number=n, epoch=epoch, shard=shard, start=start) for n, epoch, shard, start in leases],
        withdrawn=list(withdrawn),
    )


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 1000), st.integers(0, 10**6))
def test_the_order_of_a_shard_has_each_sequence_once(size: int, seed: int, epoch: int, shard: int) -> None:
    offset, stride = order_of(size, seed, epoch, shard)
    assert sorted((offset + k * stride) % size for k in range(size)) == list(range(size))


def test_the_order_is_what_it_has_always_been() -> None:
    """Another site trains the rest of a shard: it must mean the same by a position, whatever its version."""
    assert [order_of(size, 7, epoch, 3) for size, epoch in ((1, 0), (127, 0), (127, 1), (4096, 2))] == PINNED


PINNED = [(0, 1), (25, 80), (87, 91), (2767, 2647)]


def test_leases_are_trained_in_their_order_and_across_their_ends(tmp_path: Path) -> None:
    data = stream(tmp_path)
    assert not data.ready
    data.obey(orders((0, 0, 1, 0), (1, 0, 0, 2)))
    assert data.ready
    batches = [next(data), next(data)]
    assert [len(batch) for batch in batches] == [4, 4]
    assert sorted(batches[0]) == [(1, index) for index in range(4)]
    assert {shard for shard, _ in batches[1]} == {0}
    assert len(set(batches[1])) == 4, "from where it was left, without what came before"
    assert not data.ready


def test_what_is_trained_is_reported_until_the_model_holds_it(tmp_path: Path) -> None:
    data = stream(tmp_path)
    data.obey(orders((4, 0, 1, 0), (6, 0, 2, 0)))
    next(data)
    next(data)
    assert data.progress() == [(0, 1, 4), (0, 2, 4)]
    report = data.report()
    assert (report.holding, report.finished) == ([6], [4])
    data.obey(orders((6, 0, 2, 0)))
    assert data.progress() == [(0, 2, 4)]
    assert data.report().finished == []


def test_what_went_to_another_site_is_given_up(tmp_path: Path) -> None:
    data = stream(tmp_path)
    data.obey(orders((0, 0, 2, 0), (1, 0, 1, 0)))
    next(data)
    data.obey(orders((1, 0, 1, 0), withdrawn=(0,)))
    assert {shard for shard, _ in next(data)} == {1}


def test_orders_that_are_overtaken_bring_nothing_back_and_take_nothing_away(tmp_path: Path) -> None:
    data = stream(tmp_path)
    data.obey(early := orders((0, 0, 1, 0), next_number=1))
    next(data)
    data.obey(orders((3, 0, 0, 0), next_number=4))
    assert data.report().finished == [], "the first is in the model"
    next(data)
    data.obey(orders((3, 0, 0, 0), (4, 0, 2, 0), next_number=5))
    next(data)
    before = data.state_dict()
    assert data.report().finished == [3]
    data.obey(early)
    assert data.state_dict() == before


def test_a_restart_goes_on_at_the_next_sequence_with_the_leases_since(tmp_path: Path) -> None:
    """What was leased after the checkpoint was written down: the second training is on the data of the first."""
    data = stream(tmp_path)
    data.obey(orders((0, 0, 2, 0)))
    next(data)
    saved = data.state_dict()
    rest = [next(data)]
    data.obey(orders((0, 0, 2, 0), (1, 0, 0, 0), (2, 0, 1, 0)))
    rest += [next(data) for _ in range(3)]
    assert not data.ready

    again = stream(tmp_path)
    again.load_state_dict(saved)
    # The coordinator has all of shard 2 by now, and the leases that came later as they were.
    again.obey(orders((1, 0, 0, 0), (2, 0, 1, 0)))
    assert [next(again) for _ in range(4)] == rest
    assert not again.ready
    again.obey(orders((2, 0, 1, 0), (3, 1, 0, 0)))
    assert again.ready


def test_a_site_without_a_checkpoint_asks_again(tmp_path: Path) -> None:
    data = stream(tmp_path)
    data.obey(orders((5, 0, 2, 0)))
    next(data)
    fresh = stream(tmp_path)
    fresh.begin()
    assert not fresh.ready
    fresh.obey(orders((5, 0, 2, 3)))
    assert fresh.progress() == [(0, 2, 3)]


def test_after_a_restore_nothing_comes_up_again_that_was_leased_before_it(tmp_path: Path) -> None:
    """The coordinator is back at an earlier time, and gives numbers out again."""
    data = stream(tmp_path)
    data.obey(orders((5, 0, 2, 0), (6, 0, 1, 0)))
    after = stream(tmp_path)
    after.begin()
    saved = after.state_dict()
    after.obey(orders((4, 0, 0, 1)))
    again = stream(tmp_path)
    again.load_state_dict(saved)
    assert again.progress() == [(0, 0, 1)]


@pytest.mark.parametrize("spoilt", [b"", b"{", b'[{"number": 1}]', b"0" * 64 + b"\n[]\n", b"\xff"])
def test_a_damaged_list_of_leases_is_done_without(
    tmp_path: Path, spoilt: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "leases.json").write_bytes(spoilt)
    data = stream(tmp_path)
    assert "cannot be read" in caplog.text
    data.obey(orders((0, 0, 2, 0)))
    assert data.ready


def test_a_bit_that_changes_in_the_list_of_leases_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream(tmp_path).obey(orders((0, 0, 2, 0)))
    whole = (tmp_path / "leases.json").read_bytes()
    stream(tmp_path)
    assert not caplog.text
    for at in range(len(whole) - 1):
        caplog.clear()
        (tmp_path / "leases.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        stream(tmp_path)
        assert "cannot be read" in caplog.text, at


def test_a_disk_that_refuses_does_not_stop_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    data = stream(tmp_path / "file")
    data.obey(orders((0, 0, 2, 0)))
    assert data.ready
    assert "cannot be written" in caplog.text


def test_it_wants_what_it_trains_in_the_time_and_at_least_a_batch(tmp_path: Path) -> None:
    data: Any = stream(tmp_path)
    data.want(0)
    assert data.report().want == data.report().least == 4
    data.want(99.5)
    assert data.report().want == 100
    data.want(float("1e300"))
    assert data.report().want == 10**12
    data.obey(orders((3, 0, 2, 4), (5, 0, 0, 0)))
    next(data)
    report = data.report()
    assert (report.left, report.newest, report.holding, report.finished) == (8, 5, [3, 5], [])


def test_what_is_written_down_goes_back_to_the_oldest_kept_checkpoint(tmp_path: Path) -> None:
    """However much that is; and no further."""
    settled = -1
    data = LeasedStream(Recording(), Manifest("0" * 32, SIZES), 4, 7, tmp_path, run="r.1", settled=lambda: settled)
    saved = data.state_dict()
    data.obey(orders(*((number, number, 0, 0) for number in range(3000))))
    again = LeasedStream(Recording(), Manifest("0" * 32, SIZES), 4, 7, tmp_path, run="r.1")
    again.load_state_dict(saved)
    assert len(again.report().holding) == 3000
    settled = 2900
    data.obey(orders((3000, 3000, 0, 0)))
    again = LeasedStream(Recording(), Manifest("0" * 32, SIZES), 4, 7, tmp_path, run="r.1")
    again.load_state_dict(saved)
    assert again.report().holding == list(range(2901, 3001))
    other = LeasedStream(Recording(), Manifest("0" * 32, SIZES), 4, 7, tmp_path, run="r.2")
    other.load_state_dict(saved)
    assert other.report().holding == [], "what was leased in a run that was undone"


def test_a_shard_that_is_leased_anew_is_trained_from_there(tmp_path: Path) -> None:
    data = stream(tmp_path)
    data.obey(orders((3, 0, 1, 0), (4, 0, 2, 0)))
    next(data)
    next(data)
    assert data.report().finished == [3]
    data.obey(orders((3, 0, 1, 0), (8, 0, 2, 1), (9, 0, 1, 2)))
    assert data.progress() == [(0, 2, 1), (0, 1, 2)]


def test_a_shard_that_was_given_up_and_leased_again_is_trained_once(tmp_path: Path) -> None:
    data = stream(tmp_path)
    saved = data.state_dict()
    data.obey(orders((0, 0, 2, 0)))
    data.obey(orders(withdrawn=(0,)))
    data.obey(orders((1, 0, 2, 6)))
    again = stream(tmp_path)
    again.load_state_dict(saved)
    assert again.progress() == [(0, 2, 6)]
