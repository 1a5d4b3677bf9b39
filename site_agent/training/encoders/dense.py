"""Encoders of the codecs that have a few bits for every element, in torch operations.

Each operation rounds as the numba kernel's does and sums are taken in its order (`shared.codecs.kernels`), so that
both come to the same bytes. Divisors are tensors on the device: CUDA multiplies by the reciprocal of a Python number,
which is another value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.codecs import Codec, Dense, kernels
from shared.codecs.kernels import BLOCK, U8
from shared.fragments import Chunk
from site_agent.training.encoders.tiling import block_counts, from_blocks, sizes_of_blocks, slabs, to_blocks

SLAB_ELEMENTS = 1 << 24
"""64 MiB of fp32: a pass takes an accelerator longer than its launch, and there are never more than a handful of such
vectors at once."""
WIDE = 16


def encode(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
    """An encoder; see `site_agent.training.encoders`."""
    if not isinstance(codec, Dense):
        raise TypeError(f"{codec.name} is encoded elsewhere")
    sizes = [codec.size(chunk.size) for chunk in chunks]
    raw = torch.empty(sum(sizes) + 1, dtype=torch.uint8, device=x.device)
    flaws, at = [], 0
    for slab in slabs(chunks, SLAB_ELEMENTS):
        size = sum(codec.size(chunk.size) for chunk in slab)
        encode_slab = _integers_or_powers if codec.kind >= kernels.INT8 else _floats
        flaws.append(encode_slab(codec, x, slab, raw[at : at + size]))
        at += size
    # What is wrong travels with the bytes, so that the device is waited for once.
    raw[-1] = torch.stack(flaws).amax()
    return split(codec, raw, sizes)


def split(codec: Dense, raw: Tensor, sizes: Sequence[int]) -> list[U8]:
    """The sections in `raw`, on the host; its last byte says what was wrong. Raises ValueError."""
    host: U8 = raw.cpu().numpy()
    codec.require_sound(int(host[-1]))
    sections, at = [], 0
    for size in sizes:
        sections.append(host[at : at + size])
        at += size
    return sections


def _floats(codec: Dense, x: Tensor, slab: Sequence[Chunk], out: Tensor) -> Tensor:
    """Encodes the chunks `slab` of `x` into `out`, and takes what was encoded from them: what is wrong, uint8 ()."""
    x = x[slab[0].start : slab[-1].stop]
    flaw = _flaw(~torch.isfinite(x).all(), kernels.NOT_FINITE)
    kind = {kernels.FP32: torch.float32, kernels.BF16: torch.bfloat16, kernels.FP16: torch.float16}[codec.kind]
    largest = torch.finfo(kind).max
    rounded = x.clamp(-largest, largest).to(kind)
    out.copy_(rounded.view(torch.uint8))
    x.sub_(rounded)
    return flaw


def _integers_or_powers(codec: Dense, x: Tensor, slab: Sequence[Chunk], out: Tensor) -> Tensor:
    """The same of the codecs with a scale to each block."""
    blocks = to_blocks(x, slab, BLOCK)  # (B, 64)
    scale, inverse, flaw = _scales(codec, blocks, slab)
    relative = blocks * inverse[:, None]
    if codec.kind == kernels.E3M0:
        codes, integers = _powers(relative)
    else:
        integers = relative.round_()  # halves to even
        codes = integers if codec.kind == kernels.INT8 else integers + 8
    payload = codes.to(torch.int8).view(torch.uint8)
    if codec.kind != kernels.INT8:
        payload = payload[:, 0::2] | (payload[:, 1::2] << 4)
    _lay_out(codec, slab, scale, payload.reshape(-1), out)
    x[slab[0].start : slab[-1].stop].sub_(from_blocks(integers * scale[:, None], slab))
    return flaw


def _lay_out(codec: Dense, slab: Sequence[Chunk], scale: Tensor, payload: Tensor, out: Tensor) -> None:
    """Of each chunk its scales, then its payload."""
    # (bf16 is the upper half of fp32, and a scale has no sign.)
    bits = (scale.view(torch.int32) >> 16).to(torch.int16).view(torch.uint8)
    of_block = payload.numel() // scale.numel()
    pieces, block = [], 0
    for chunk, count in zip(slab, block_counts(slab, BLOCK), strict=True):
        at, size = block * of_block, codec.size(chunk.size) - codec.cut(chunk.size)
        pieces += [bits[2 * block : 2 * (block + count)], payload[at : at + size]]
        block += count
    torch.cat(pieces, out=out)


def _scales(codec: Dense, blocks: Tensor, slab: Sequence[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block its scale and the inverse of it, fp32 (B,); see `kernels._block_scales`. And what is wrong."""
    low, high = blocks.aminmax(dim=1)
    largest = torch.maximum(high, -low)
    levels = float(kernels.levels_of(codec.kind))
    scale = largest / torch.full_like(largest, levels)
    if codec.step > 0 and codec.kind != kernels.E3M0:
        wide = float(codec.step) * _root_mean_squares(blocks, slab)
        scale = torch.maximum(scale, torch.minimum(wide, levels * scale))
    bits = scale.view(torch.int32)
    scale = (((bits + 0xFFFF) >> 16) << 16).view(torch.float32)
    flaw = torch.where(
        torch.isfinite(largest).all(),
        _flaw((scale > float(kernels.LARGEST_SCALE)).any(), kernels.TOO_LARGE),
        kernels.NOT_FINITE,
    ).to(torch.uint8)
    normal = scale >= float(kernels.SMALLEST_NORMAL)
    return torch.where(normal, scale, 0.0), torch.where(normal, scale.reciprocal(), 0.0), flaw


def _root_mean_squares(blocks: Tensor, slab: Sequence[Chunk]) -> Tensor:
    """√(Σ x²/n) of each block, fp32 (B,): sixteen interleaved sums, then those by halves."""
    squares = blocks.square().view(-1, BLOCK // WIDE, WIDE)
    lanes = squares[:, 0] + squares[:, 1]
    for column in range(2, BLOCK // WIDE):
        lanes += squares[:, column]
    half = WIDE // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half:]
        half //= 2
    return (lanes[:, 0] / sizes_of_blocks(slab, BLOCK, blocks.device)).sqrt_()


def _powers(relative: Tensor) -> tuple[Tensor, Tensor]:
    """e3m0's codes, int32, and what they stand for in scales, fp32; see `kernels._round_powers`."""
    magnitude = relative.view(torch.int32) & 0x7FFFFFFF
    # Half a mantissa more lifts what is at 1.5 · 2ⁿ or above into the next exponent; 0.5 to 0.75 is nearest to 1.
    power = ((magnitude + 0x00400000) >> 23) - 127
    code = torch.where(magnitude >= 0x3F000000, power.clamp_(min=0) + 1, 0)
    value = torch.copysign(((1 << code) >> 1).to(torch.float32), relative)
    return torch.where(value < 0, code + 8, code), value


def _flaw(found: Tensor, what: int) -> Tensor:
    return found.to(torch.uint8) * what
