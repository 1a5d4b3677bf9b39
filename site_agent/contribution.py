"""A contribution as it leaves a site: the pseudo-gradient of one fragment, packed for the wire, with error feedback.

It is made and encoded on the device that holds the weights; see `site_agent.training.encoders`. The anchor, which is
on the CPU, is copied there for it, and of what comes back nothing is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.codecs import grid
from shared.codecs.kernels import U8
from shared.compression import Compression
from shared.config import WireTable
from shared.errors import FaultError
from shared.fragments import CHUNK_ELEMENTS, F32, Fragment
from shared.wire import Header, encode_sections, open_container, pack_container, pack_sections, tensor_table
from site_agent.training import encoders


class DivergedError(FaultError):
    """The weights are no longer finite; a checkpoint of them would be worth nothing."""


@dataclass(frozen=True)
class Anchor:
    """A published version at this site: fp32 (fragment.size,) on the CPU, never written to."""

    version: int
    digest: str
    tokens: int
    flat: F32


@dataclass(frozen=True)
class Address:
    """What containers name a fragment of the run by: the run of its coordinator, and the fragment as that one numbers
    it."""

    run: str
    fragment: Fragment


@dataclass(frozen=True)
class Parcel:
    """A contribution to send: the anchor it starts from, the snapshot θ_s, and the error feedback so far (or None).

    Snapshot and feedback are fp32 (fragment.size,) on the device that holds the weights, and never written to.

    `progress` is that of leased data as of the snapshot. `number` is its place in the outbox. `recorded`: it was sent
    before a restart, and is sent again as it was.
    """

    fragment: int
    anchor: Anchor
    snapshot: Tensor
    residual: Tensor | None
    tokens: int
    steps: int
    number: int = 0
    recorded: bool = False
    progress: tuple[tuple[int, int, int], ...] = ()


def encode(
    parcel: Parcel,
    to: Address,
    wire: WireTable,
    site: str,
    compression: Compression | None = None,
    link: float | None = None,
) -> tuple[bytes, Tensor | None]:
    """The container of Δ = Θ̂ − θ_s plus the error feedback so far, and the feedback once it is accepted: what the codec
    lost of it, fp32 (fragment.size,) on the device of the weights, or None where the run keeps none. `compression`
    decides for a link of so many bytes per second. Raises DivergedError where Δ is not finite, FaultError where the
    device's memory is too small."""
    fragment = to.fragment
    try:
        sections, left = _sections(fragment, _delta(parcel, wire), wire)
    except ValueError as error:
        raise DivergedError(
            f"the weights of fragment {parcel.fragment} have diverged ({error}); lower [inner] lr and start anew"
        ) from None
    except torch.OutOfMemoryError as error:
        raise FaultError(
            f"the device has too little memory to encode a contribution: {str(error).splitlines()[0]}; lower [inner] "
            "batch_size, or raise [rounds] fragments"
        ) from None
    level = (compression or Compression(wire.zstd_level)).level(sections[len(sections) // 2], link)
    header = Header(
        kind="contribution",
        run=to.run,
        site=site,
        fragment=fragment.index,
        base_version=parcel.anchor.version,
        version=parcel.anchor.version,
        digest=parcel.anchor.digest,
        codec=wire.upload_codec,
        zstd=level > 0,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(fragment),
        tokens=parcel.tokens,
        steps=parcel.steps,
        sizes=[],
        progress=list(parcel.progress),
    )
    return pack_container(header, pack_sections(fragment, sections, level)), left


def _sections(fragment: Fragment, delta: Tensor, wire: WireTable) -> tuple[list[U8], Tensor | None]:
    """The raw bytes of `delta`, encoded where it is, and the error feedback after it; `delta` is used up. Raises
    ValueError."""
    codec, chunks = grid(wire.upload_codec, wire.upload_grid), fragment.chunks()
    encode = encoders.encoder(codec, delta.device)
    if encode is not None and chunks:
        return encode(codec, delta, chunks), delta if wire.error_feedback else None
    flat = delta.cpu()
    x = flat.numpy()
    sections = encode_sections(codec, fragment, x, x if wire.error_feedback else None)
    return sections, flat.to(delta.device) if wire.error_feedback else None


def left_of(parcel: Parcel, fragment: Fragment, wire: WireTable, body: bytes) -> Tensor:
    """What is left of Δ = Θ̂ − θ_s plus the error feedback so far, once `body` is delivered, which was made of another
    training of the same steps: fp32 (fragment.size,) on the device of the weights. The bits of `encode`'s where both
    came to the same. Decoded on the CPU, because it is for restarts alone."""
    delta = _delta(parcel, wire)
    left = delta.cpu()
    with open_container(body, fragment) as container:
        container.add_to(left.numpy(), -1.0)
    return left.to(delta.device)


def _delta(parcel: Parcel, wire: WireTable) -> Tensor:
    """Δ + βe, fp32 (fragment.size,), of which each operation rounds once."""
    delta = on_device_of(parcel.snapshot, parcel.anchor.flat) - parcel.snapshot
    if parcel.residual is not None:
        # (Where the config has dropped error feedback since, what there is of it goes out once, whole.)
        decay = wire.feedback or 1.0
        delta += parcel.residual if decay == 1.0 else decay * parcel.residual
    return delta


def on_device_of(tensor: Tensor, flat: F32) -> Tensor:
    """`flat` on the device of `tensor`; on the CPU the same memory."""
    return torch.from_numpy(flat).to(tensor.device)
