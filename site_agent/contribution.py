"""A contribution as it leaves a site: the encoded pseudo-gradient of one fragment, packed for the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.codecs.kernels import U8
from shared.compression import Compression
from shared.config import WireTable
from shared.fragments import CHUNK_ELEMENTS, F32, Fragment
from shared.wire import Header, pack_container, pack_sections, tensor_table


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
    """A contribution to send: the anchor that it starts from, and the raw bytes of every chunk; or the container that
    was sent of it before a restart, which is sent again as it was.

    `progress` is that of leased data as of the snapshot. `number` is its place in the outbox. `recorded`: it may have
    been sent before a restart.
    """

    fragment: int
    anchor: Anchor
    content: Sequence[U8] | bytes
    tokens: int
    steps: int
    number: int = 0
    recorded: bool = False
    progress: tuple[tuple[int, int, int], ...] = ()


def pack(
    parcel: Parcel,
    to: Address,
    wire: WireTable,
    site: str,
    compression: Compression | None = None,
    link: float | None = None,
) -> bytes:
    """The container; `compression` decides for a link of so many bytes per second."""
    if isinstance(parcel.content, bytes):
        return parcel.content
    fragment, sections = to.fragment, parcel.content
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
    return pack_container(header, pack_sections(fragment, sections, level))
