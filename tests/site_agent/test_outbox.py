"""The outbox: what was sent is there as it was, comes up again in order, and is delivered once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import UploadCodec, WireTable
from shared.files import DISK
from shared.fragments import Layout
from shared.wire import open_container
from site_agent.contribution import Address, Anchor, Parcel, encode, left_of
from site_agent.outbox import Outbox, Record, Replays

LAYOUT = Layout.from_wire([[("w", [200])], [("v", [64])]])
FRAGMENT = LAYOUT.fragments[0]
ADDRESSES = [Address("run", fragment) for fragment in LAYOUT.fragments]
RNG = np.random.default_rng(0)


def normal() -> Tensor:
    return torch.from_numpy(RNG.normal(size=200).astype(np.float32))


def parcel(snapshot: Tensor, residual: Tensor | None = None, fragment: int = 0, base: int = 3) -> Parcel:
    anchor = Anchor(base, "0" * 32, 0, np.zeros(len(snapshot), np.float32))
    return Parcel(fragment, anchor, snapshot, residual, tokens=80, steps=5)


def body(run: str = "run", fragment: int = 0, base: int = 3) -> bytes:
    size = LAYOUT.fragments[fragment].size
    sent = parcel(torch.ones(size), fragment=fragment, base=base)
    return encode(sent, Address(run, LAYOUT.fragments[fragment]), WireTable(), "eu")[0]


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


@pytest.mark.parametrize("codec", get_args(UploadCodec))
def test_the_same_training_leaves_the_same_bits(codec: UploadCodec) -> None:
    snapshot, residual = normal(), normal()
    sent, wire = parcel(snapshot, residual), WireTable(upload=codec)
    data, left = encode(sent, ADDRESSES[0], wire, "eu")
    assert left is not None
    assert torch.equal(left_of(sent, FRAGMENT, wire, data), left)


@pytest.mark.parametrize(("keys", "kept"), [({}, 1.0), ({"upload": "topk2"}, 0.95), ({"feedback_decay": 0.5}, 0.5)])
def test_what_was_not_sent_is_kept_by_its_decay(keys: dict[str, Any], kept: float) -> None:
    """e ← βe + Δ − q: of a Δ of zero, β of what there was of it, less what is sent of that."""
    residual = normal()
    wire = WireTable(**keys)
    data, left = encode(parcel(torch.zeros(200), residual), ADDRESSES[0], wire, "eu")
    with open_container(data, FRAGMENT) as container:
        assert left is not None
        np.testing.assert_allclose(left.numpy() + container.decode(), kept * residual.numpy(), rtol=1e-6)


def test_another_training_of_the_same_steps_leaves_what_is_not_in_the_body() -> None:
    first, second = normal(), normal()
    wire = WireTable(upload="int4")
    data, _ = encode(parcel(first), ADDRESSES[0], wire, "eu")
    with open_container(data, FRAGMENT) as container:
        delivered = container.decode()
    left = left_of(parcel(second), FRAGMENT, wire, data).numpy()
    np.testing.assert_allclose(left + delivered, -second.numpy(), atol=1e-6)
