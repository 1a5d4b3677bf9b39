"""A contribution as it leaves a site: the pseudo-gradient of one fragment, packed for the wire, with error feedback."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.codecs import grid
from shared.compression import Compression
from shared.config import WireTable
from shared.errors import FaultError
from shared.fragments import CHUNK_ELEMENTS, F32, Fragment
from shared.wire import Header, encode_sections, open_container, pack_container, pack_section, tensor_table


class DivergedError(FaultError):
    """The weights are no longer finite; a checkpoint of them would be worth nothing."""


@dataclass(frozen=True)
class Anchor:
    """A published version at this site: fp32 (fragment.size,), never written to."""

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

    `progress` is that of leased data as of the snapshot. `number` is its place in the outbox. `recorded`: it was sent
    before a restart, and is sent again as it was.
    """

    fragment: int
    anchor: Anchor
    snapshot: F32
    residual: F32 | None
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
) -> tuple[bytes, F32 | None]:
    """The container of Δ = Θ̂ − θ_s plus the error feedback so far, and the feedback once it is accepted: what the codec
    lost of it, fp32 (fragment.size,), or None where the run keeps none. `compression` decides for a link of so many
    bytes per second. Raises DivergedError where Δ is not finite."""
    delta, fragment = _delta(parcel, wire), to.fragment
    left = np.empty_like(delta) if wire.error_feedback else None
    try:
        sections = encode_sections(grid(wire.upload_codec, wire.upload_grid), fragment, delta, left)
    except ValueError as error:
        raise DivergedError(
            f"the weights of fragment {parcel.fragment} have diverged ({error}); lower [inner] lr and start anew"
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
    return pack_container(header, [pack_section(section, level) for section in sections]), left


def left_of(parcel: Parcel, fragment: Fragment, wire: WireTable, body: bytes) -> F32:
    """What is left of Δ = Θ̂ − θ_s plus the error feedback so far, once `body` is delivered, which was made of another
    training of the same steps: fp32 (fragment.size,). The bits of `encode`'s where both came to the same."""
    left = _delta(parcel, wire)
    with open_container(body, fragment) as container:
        for section, chunk in enumerate(container.chunks):
            container.accumulate(section, -1.0, left[chunk.start : chunk.stop])
    return left


def _delta(parcel: Parcel, wire: WireTable) -> F32:
    """Δ + βe, fp32 (fragment.size,)."""
    delta = parcel.anchor.flat - parcel.snapshot
    if parcel.residual is not None:
        # (Where the config has dropped error feedback since, what there is of it goes out once, whole.)
        decay = wire.feedback or 1.0
        delta += parcel.residual if decay == 1.0 else np.float32(decay) * parcel.residual
    return delta
