"""A site's copy of the model: what was lost of a contribution goes with the next one, once."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from shared.codecs import codec_named
from shared.config import UploadCodec, WireTable
from shared.errors import FaultError
from shared.fragments import CHUNK_ELEMENTS, F32, Chunk, Layout
from site_agent.training import encoders
from site_agent.training import replica as module
from site_agent.training.replica import DivergedError, Part
from tests.support.vectors import Vectors

SIZE = 200
RNG = np.random.default_rng(0)


def vectors(wire: WireTable, size: int = SIZE) -> Vectors:
    return Vectors(Layout.from_wire([[("w", [size])]]), wire)


def normal() -> F32:
    return RNG.normal(size=SIZE).astype(np.float32)


def decoded(sections: Any, wire: WireTable) -> F32:
    return codec_named(wire.upload_codec).decode(sections[0], SIZE)


def at(theta: F32, wire: WireTable, residual: F32 | None = None) -> Vectors:
    """A replica with a contribution to make of these weights."""
    replica = vectors(wire)
    replica.write(0, torch.from_numpy(theta))
    replica.snapshot(0)
    if residual is not None:
        replica.residuals[0] = torch.from_numpy(residual)
    return replica


def test_a_contribution_is_the_anchor_less_the_snapshot() -> None:
    wire, theta, anchor = WireTable(upload="fp32"), normal(), normal()
    replica = at(theta, wire)
    replica.write(0, torch.zeros(SIZE))  # trained on since
    assert np.array_equal(decoded(replica.encode(0, anchor), wire), anchor - theta)


@pytest.mark.parametrize("feedback", [True, False])
def test_what_was_lost_so_far_is_sent_whether_or_not_more_is_kept(feedback: bool) -> None:
    wire, residual = WireTable(upload="fp32", error_feedback=feedback), normal()
    replica = at(np.ones(SIZE, np.float32), wire, residual)
    assert np.array_equal(decoded(replica.encode(0, np.ones(SIZE, np.float32)), wire), residual)
    replica.settle(0, delivered=True)
    assert (0 in replica.residuals) == feedback


@pytest.mark.parametrize("delivered", [True, False])
def test_what_an_accepted_contribution_held_is_not_sent_again(delivered: bool) -> None:
    """Also with a contribution whose encoding was another's: what that one left out is not known."""
    wire, residual = WireTable(), normal()
    replica = at(normal(), wire, residual)
    sections = replica.encode(0, normal())
    replica.settle(0, delivered=delivered)
    if not delivered:
        assert 0 not in replica.residuals
        return
    assert not np.array_equal(replica.residuals[0].numpy(), residual)
    assert np.abs(replica.residuals[0].numpy()).max() < np.abs(decoded(sections, wire)).max()


def test_a_refused_contribution_leaves_the_feedback_as_it_was() -> None:
    residual = normal()
    replica = at(normal(), WireTable(), residual)
    replica.encode(0, normal())
    replica.take_up(0, "rebase", normal(), normal())
    assert np.array_equal(replica.residuals[0].numpy(), residual)
    replica.settle(0, delivered=True)  # of nothing
    assert 0 not in replica.residuals


@pytest.mark.parametrize("codec", get_args(UploadCodec))
def test_the_same_training_leaves_the_same_bits(codec: UploadCodec) -> None:
    wire, anchor, replica = WireTable(upload=codec), normal(), at(normal(), WireTable(upload=codec), normal())
    delivered = decoded(replica.encode(0, anchor), wire)
    left = replica._left[0].clone()
    replica.leave(0, anchor, delivered)
    assert torch.equal(replica._left[0], left)


@pytest.mark.parametrize(("keys", "kept"), [({}, 1.0), ({"upload": "topk2"}, 0.95), ({"feedback_decay": 0.5}, 0.5)])
def test_what_was_not_sent_is_kept_by_its_decay(keys: dict[str, Any], kept: float) -> None:
    """e ← βe + Δ − q: of a Δ of zero, β of what there was of it, less what is sent of that."""
    wire, residual = WireTable(**keys), normal()
    replica = at(np.zeros(SIZE, np.float32), wire, residual)
    sent = decoded(replica.encode(0, np.zeros(SIZE, np.float32)), wire)
    replica.settle(0, delivered=True)
    np.testing.assert_allclose(replica.residuals[0].numpy() + sent, kept * residual, rtol=1e-6)


def test_another_training_of_the_same_steps_leaves_what_is_not_in_the_body() -> None:
    wire, second, zeros = WireTable(upload="int4"), normal(), np.zeros(SIZE, np.float32)
    delivered = decoded(at(normal(), wire).encode(0, zeros), wire)
    replica = at(second, wire)
    replica.leave(0, zeros, delivered)
    replica.settle(0, delivered=True)
    np.testing.assert_allclose(replica.residuals[0].numpy() + delivered, -second, atol=1e-6)


@pytest.mark.parametrize("way", ["numba", "torch"])
def test_weights_that_are_not_finite_are_not_sent(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr(encoders, "encoder", lambda codec, device: encoders.torch_operations(codec))
    theta = normal()
    theta[7] = np.nan
    with pytest.raises(DivergedError, match=r"fragment 0 have diverged .*NaN or infinite.* lower \[inner\] lr"):
        at(theta, WireTable()).encode(0, normal())


def test_a_device_without_memory_for_an_encoding_is_a_fault_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")

    monkeypatch.setattr(module, "encode_sections", full)
    with pytest.raises(FaultError, match="tried to allocate 3 GiB; lower"):
        at(normal(), WireTable()).encode(0, normal())


def test_parts_of_a_fragment_are_encoded_as_the_whole_is() -> None:
    """Chunks are sections: whoever has some of them makes just these."""
    size, wire = 2 * CHUNK_ELEMENTS + 70, WireTable()
    flat, anchor = (RNG.normal(size=size).astype(np.float32) for _ in range(2))
    replica = vectors(wire, size)
    replica.write(0, torch.from_numpy(flat))
    replica.snapshot(0)
    together = replica.encode(0, anchor)
    alone = []
    for start, stop, chunks in (
        (0, CHUNK_ELEMENTS, [Chunk(0, CHUNK_ELEMENTS)]),
        (CHUNK_ELEMENTS, size, [Chunk(0, CHUNK_ELEMENTS), Chunk(CHUNK_ELEMENTS, CHUNK_ELEMENTS + 70)]),
    ):
        replica.parts[0] = Part(start, stop, tuple(chunks))
        replica.snapshots[0] = torch.from_numpy(flat[start:stop])
        alone += replica.encode(0, anchor[start:stop])
    assert [section.tobytes() for section in alone] == [section.tobytes() for section in together]


def test_what_is_kept_comes_back_from_a_checkpoint() -> None:
    replica = at(normal(), WireTable(), normal())
    other = vectors(WireTable())
    other.keep({name: tensor.clone() for name, tensor in replica.kept()})
    assert torch.equal(other.snapshots[0], replica.snapshots[0])
    assert torch.equal(other.residuals[0], replica.residuals[0])
