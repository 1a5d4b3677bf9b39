"""A contribution is Δ = Θ̂ − θ_s + βe, encoded where the weights are, and every way to it makes the same bytes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import UploadCodec, WireTable
from shared.fragments import F32, Layout
from shared.wire import Bytes, encode_flat, open_container, read_header
from site_agent.contribution import Address, Anchor, Parcel, pack
from site_agent.training import encoders
from tests.support.vectors import Vectors

FRAGMENT = Layout.from_wire([[("a", [300, 31]), ("b", [64]), ("c", [1]), ("d", [4097])]]).fragments[0]
RNG = np.random.default_rng(0)
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([ACCELERATOR] if ACCELERATOR else [])]
every_codec = pytest.mark.parametrize("codec", get_args(UploadCodec))


def normal() -> F32:
    return RNG.normal(size=FRAGMENT.size).astype(np.float32)


ANCHOR, SNAPSHOT, RESIDUAL = Anchor(3, "0" * 32, 0, normal()), normal(), normal()


def replica(wire: WireTable, device: torch.device = DEVICES[0], *, residual: bool = True) -> Vectors:
    made = Vectors(Layout((FRAGMENT,)), wire, device=device)
    made.write(0, torch.from_numpy(SNAPSHOT))
    made.snapshot(0)
    if residual:
        made.residuals[0] = torch.from_numpy(RESIDUAL).to(device)
    return made


def sent(made: Vectors) -> tuple[bytes, Tensor | None]:
    """The container, and the error feedback once it is accepted."""
    parcel = Parcel(0, ANCHOR, made.encode(0, ANCHOR.flat), tokens=80, steps=5)
    body = pack(parcel, Address("run", FRAGMENT), made.wire, "eu")
    made.settle(0, delivered=True)
    return body, made.residuals.get(0)


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for an accelerator."""
    monkeypatch.setattr(encoders, "encoder", lambda codec, device: encoders.torch_operations(codec))


@every_codec
@pytest.mark.parametrize("residual", [True, False])
def test_on_the_cpu_its_bits_are_those_of_the_definition(codec: UploadCodec, residual: bool) -> None:
    wire = WireTable(upload=codec, zstd_level=1)
    body, left = sent(replica(wire, residual=residual))
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
    body, left = sent(replica(wire))
    request.getfixturevalue("torch_operations")
    again, also_left = sent(replica(wire))
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
    made = replica(wire, device)
    body, left = sent(made)
    with open_container(body, FRAGMENT, [wire.upload_codec]) as container:
        decoded = container.decode()
        assert container.screen() == pytest.approx(float(np.sum(decoded.astype(np.float64) ** 2)))
    assert left is not None
    assert left.device.type == device.type
    flat = ANCHOR.flat - SNAPSHOT + np.float32(wire.feedback) * RESIDUAL
    np.testing.assert_allclose(left.cpu().numpy() + decoded, flat, atol=2e-6)
    assert torch.equal(made.snapshots[0].cpu(), torch.from_numpy(SNAPSHOT)), "a checkpoint may be reading it"
    again = replica(wire, device)
    again.leave(0, ANCHOR.flat, decoded)
    again.settle(0, delivered=True)
    assert torch.equal(again.residuals[0], left)
