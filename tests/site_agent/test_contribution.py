"""A contribution is Δ = Θ̂ − θ_s + βe, encoded where the weights are, and every way to it makes the same bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import UploadCodec, WireTable
from shared.fragments import F32, Layout
from shared.wire import Bytes, encode_flat, open_container, read_header
from site_agent import contribution
from site_agent.contribution import Address, Anchor, DivergedError, Parcel, encode, left_of
from site_agent.training import encoders

FRAGMENT = Layout.from_wire([[("a", [300, 31]), ("b", [64]), ("c", [1]), ("d", [4097])]]).fragments[0]
RNG = np.random.default_rng(0)
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([ACCELERATOR] if ACCELERATOR else [])]
every_codec = pytest.mark.parametrize("codec", get_args(UploadCodec))


def normal() -> F32:
    return RNG.normal(size=FRAGMENT.size).astype(np.float32)


ANCHOR, SNAPSHOT, RESIDUAL = Anchor(3, "0" * 32, 0, normal()), normal(), normal()


def parcel(device: torch.device = DEVICES[0], *, residual: bool = True) -> Parcel:
    snapshot, feedback = (torch.from_numpy(flat).to(device) for flat in (SNAPSHOT, RESIDUAL))
    return Parcel(0, ANCHOR, snapshot, feedback if residual else None, tokens=80, steps=5)


def sent(parcel: Parcel, wire: WireTable) -> tuple[bytes, Tensor | None]:
    return encode(parcel, Address("run", FRAGMENT), wire, "eu")


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for an accelerator."""
    monkeypatch.setattr(encoders, "encoder", lambda codec, device: encoders.torch_operations(codec))


@every_codec
@pytest.mark.parametrize("residual", [True, False])
def test_on_the_cpu_its_bits_are_those_of_the_definition(codec: UploadCodec, residual: bool) -> None:
    wire = WireTable(upload=codec, zstd_level=1)
    body, left = sent(parcel(residual=residual), wire)
    flat = ANCHOR.flat - SNAPSHOT
    if residual:
        flat += np.float32(wire.feedback) * RESIDUAL
    lost = np.empty_like(flat)
    header, _ = read_header(Bytes(body), len(body))
    assert body == encode_flat(header, FRAGMENT, flat, 1, lost, wire.upload_grid)
    assert left is not None
    assert left.numpy().tobytes() == lost.tobytes()


@every_codec
@pytest.mark.parametrize("zstd_level", [0, 1])
def test_torch_operations_make_the_same_container(
    codec: UploadCodec, zstd_level: int, request: pytest.FixtureRequest
) -> None:
    wire = WireTable(upload=codec, zstd_level=zstd_level)
    body, left = sent(parcel(), wire)
    request.getfixturevalue("torch_operations")
    again, also_left = sent(parcel(), wire)
    assert again == body
    assert left is not None
    assert also_left is not None
    assert torch.equal(also_left, left)


@every_codec
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.usefixtures("torch_operations")
def test_what_a_device_encodes_is_accepted_and_what_it_keeps_is_the_rest(
    codec: UploadCodec, device: torch.device
) -> None:
    wire = WireTable(upload=codec)
    whole = parcel(device)
    body, left = sent(whole, wire)
    with open_container(body, FRAGMENT, [wire.upload_codec]) as container:
        decoded = container.decode()
        assert container.screen() == pytest.approx(float(np.sum(decoded.astype(np.float64) ** 2)))
    assert left is not None
    assert left.device.type == device.type
    flat = ANCHOR.flat - SNAPSHOT + np.float32(wire.feedback) * RESIDUAL
    np.testing.assert_allclose(left.cpu().numpy() + decoded, flat, atol=2e-6)
    assert torch.equal(left_of(whole, FRAGMENT, wire, body), left)
    assert torch.equal(whole.snapshot.cpu(), torch.from_numpy(SNAPSHOT)), "a checkpoint may be reading it"


@pytest.mark.parametrize("way", ["numba", "torch"])
def test_weights_that_are_not_finite_are_told_of(way: str, request: pytest.FixtureRequest) -> None:
    if way == "torch":
        request.getfixturevalue("torch_operations")
    snapshot = torch.zeros(FRAGMENT.size)
    snapshot[7] = float("inf")
    with pytest.raises(DivergedError, match=r"fragment 0 have diverged .*NaN or infinite"):
        sent(replace(parcel(), snapshot=snapshot), WireTable())


@pytest.mark.usefixtures("torch_operations")
def test_without_error_feedback_nothing_is_kept() -> None:
    assert sent(parcel(), WireTable(upload="int8", error_feedback=False))[1] is None


def test_too_little_memory_on_the_device_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nMore of it")

    monkeypatch.setattr(contribution, "_sections", full)
    with pytest.raises(contribution.FaultError, match=r"too little memory .* Tried to allocate 2 GiB\.; lower"):
        sent(parcel(), WireTable())
