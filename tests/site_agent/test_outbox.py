"""The outbox: what was sent is there as it was, comes up again in order, and is delivered once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.codecs import codec_named
from shared.config import WireTable
from shared.files import DISK
from shared.fragments import Layout
from shared.wire import encode_sections
from site_agent.contribution import Address, Anchor, Parcel, pack
from site_agent.outbox import Outbox, Record, Replays

LAYOUT = Layout.from_wire([[("w", [200])], [("v", [64])]])
ADDRESSES = [Address("run", fragment) for fragment in LAYOUT.fragments]


def body(run: str = "run", fragment: int = 0, base: int = 3) -> bytes:
    """A contribution of ones."""
    to, wire = LAYOUT.fragments[fragment], WireTable()
    sections = encode_sections(codec_named(wire.upload_codec), to.chunks(), np.ones(to.size, np.float32))
    anchor = Anchor(base, "0" * 32, 0, np.zeros(to.size, np.float32))
    return pack(Parcel(fragment, anchor, sections, tokens=80, steps=5), Address(run, to), wire, "eu")


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox", DISK)


def test_what_was_put_is_found_again_in_order(outbox: Outbox) -> None:
    assert outbox.load(ADDRESSES) == []
    outbox.put(11, 0, body(base=4))
    outbox.put(9, 1, body(fragment=1, base=2))
    assert outbox.load(ADDRESSES) == [Record(9, 1, 2, 80, 5), Record(11, 0, 4, 80, 5)]
    assert outbox.read(11, 0) == body(base=4)
    assert outbox.read(11, 1) is None


def test_what_is_dropped_or_pruned_is_gone(outbox: Outbox) -> None:
    for number in (1, 2, 3):
        outbox.put(number, 0, body())
    outbox.drop(3, 0)
    outbox.prune(2)
    assert [record.number for record in outbox.load(ADDRESSES)] == [2]


def test_damaged_files_and_those_of_another_run_are_dropped(outbox: Outbox, tmp_path: Path) -> None:
    for number, data in enumerate((body(), body("other"), body()[:-9], b"", body(fragment=1))):
        outbox.put(number, 0, data)
    flipped = bytearray(body())
    flipped[-3] ^= 1
    outbox.put(5, 0, bytes(flipped))
    (tmp_path / "outbox" / "stray.isthmus").write_bytes(b"")
    outbox.put(6, 7, body())
    assert [record.number for record in outbox.load(ADDRESSES)] == [0]
    assert len(list((tmp_path / "outbox").iterdir())) == 1


def test_what_was_sent_after_a_checkpoint_comes_up_again_by_fragment(outbox: Outbox) -> None:
    replays = Replays()
    records = [Record(number, number % 2, 0, 1, 1) for number in (4, 5, 6, 7, 8)]
    replays.restore(records, {"next_number": 7, "pending": {"0": [4]}})
    assert [record.number for record in replays.pending(0)] == [4, 8]
    assert [record.number for record in replays.pending(1)] == [7]
    assert replays.number() == 9
    first = replays.take(0)
    assert first is not None
    assert first.number == 4
    assert replays.state() == {"next_number": 10, "pending": {"0": [8], "1": [7]}}
    replays.forget(1)
    assert replays.take(1) is None
