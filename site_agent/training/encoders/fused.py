"""int8 and int4 as one Triton kernel: scales, rounding, packing and what is lost, in one pass and one launch.

The torch form (`dense`) reads and writes the vector some fifteen times. Only the order of the sum of squares differs
from it, so that with a coarse grid a block's scale may be another by its rounding; everything else has its bits, which
needs the divisions and roots that round correctly and no fused multiply-add.

Triton comes with torch's CUDA builds and is imported nowhere else. With TRITON_INTERPRET=1 the kernel runs on the CPU,
for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.codecs import Codec, Dense, kernels
from shared.codecs.kernels import BLOCK, U8
from shared.fragments import Chunk
from site_agent.training.encoders.dense import split

ROWS = 32
"""Blocks of a tile, which is what one program encodes."""
BLOCK_ = tl.constexpr(BLOCK)
NOT_FINITE, TOO_LARGE = tl.constexpr(kernels.NOT_FINITE), tl.constexpr(kernels.TOO_LARGE)
TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to and taken from an fp32 below 2²² it is the nearest integer, halves to even."""


@triton.jit
def _encode_tiles(
    x_ptr, raw_ptr, flaw_ptr, tiles_ptr, step, LEVELS: tl.constexpr, COARSE: tl.constexpr, ROWS: tl.constexpr
):
    """Program t encodes tile t: `tiles` are int64 (tiles, 4), of each where its elements begin in `x`, how many they
    are, and where its scales and its payload begin in `raw`."""
    tile = tiles_ptr + 4 * tl.program_id(0)
    start, count = tl.load(tile), tl.load(tile + 1)
    row = tl.arange(0, ROWS)
    at = row[:, None] * BLOCK_ + tl.arange(0, BLOCK_)[None, :]  # (ROWS, 64)
    inside = at < count
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0)

    # Of finite values the order of bits is the order of values, and NaN and infinity come out on top.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((ROWS,), LEVELS, tl.float32))
    if COARSE:
        elements = tl.minimum(tl.maximum(count - row * BLOCK_, 1), BLOCK_).to(tl.float32)
        wide = step * tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=1), elements))
        scale = tl.maximum(scale, tl.minimum(wide, LEVELS * scale))
    bf16 = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16  # rounded up
    flaw = tl.max(tl.where(largest >= 0x7F800000, NOT_FINITE, tl.where(bf16 >= 0x7C00, TOO_LARGE, 0)), axis=0)
    if flaw > 0:
        tl.atomic_max(flaw_ptr, flaw)
    bf16 = tl.where(bf16 >= 0x0080, bf16, 0)  # below the normal range: all zeros
    scale = (bf16 << 16).to(tl.float32, bitcast=True)
    inverse = tl.where(bf16 > 0, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale), 0.0)

    near = (x * inverse[:, None] + TO_INTEGER) - TO_INTEGER
    tl.store(x_ptr + start + at, x - near * scale[:, None], mask=inside)
    scales, payload = raw_ptr + tl.load(tile + 2), raw_ptr + tl.load(tile + 3)
    there = row * BLOCK_ < count
    tl.store(scales + 2 * row, (bf16 & 0xFF).to(tl.uint8), mask=there)
    tl.store(scales + 2 * row + 1, (bf16 >> 8).to(tl.uint8), mask=there)
    code = near.to(tl.int32)
    if LEVELS == 7:
        low, high = tl.split(tl.reshape(code + 8, (ROWS, BLOCK_ // 2, 2)))
        byte_at = row[:, None] * (BLOCK_ // 2) + tl.arange(0, BLOCK_ // 2)[None, :]
        tl.store(payload + byte_at, (low | (high << 4)).to(tl.uint8), mask=2 * byte_at < count)
    else:
        tl.store(payload + at, (code & 0xFF).to(tl.uint8), mask=inside)


def encode(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
    """An encoder of int8 and int4; see `site_agent.training.encoders`."""
    if not isinstance(codec, Dense) or codec.kind not in (kernels.INT8, kernels.INT4):
        raise TypeError(f"{codec.name} is encoded elsewhere")
    sizes = [codec.size(chunk.size) for chunk in chunks]
    raw = torch.empty(sum(sizes) + 1, dtype=torch.uint8, device=x.device)
    flaw = torch.zeros(1, dtype=torch.int32, device=x.device)
    tiles = _tiles(codec, chunks, sizes)
    with torch.cuda.device_of(x):  # Triton launches on the current device, and each thread has its own
        _encode_tiles[(len(tiles),)](
            x,
            raw,
            flaw,
            torch.from_numpy(tiles).to(x.device),
            float(codec.step),
            LEVELS=int(kernels.levels_of(codec.kind)),
            COARSE=bool(codec.step > 0),
            ROWS=ROWS,
            enable_fp_fusion=False,
        )
    raw[-1:] = flaw
    return split(codec, raw, sizes)


def _tiles(
    codec: Dense, chunks: Sequence[Chunk], sizes: Sequence[int]
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The kernel's table. A tile never holds elements of two chunks."""
    rows, section = [], 0
    for chunk, size in zip(chunks, sizes, strict=True):
        at = np.arange(0, chunk.size, ROWS * BLOCK)
        payload, _ = kernels.payload_range(codec.kind, ROWS * BLOCK, 0)
        rows.append(
            np.stack(
                [
                    chunk.start + at,
                    np.minimum(ROWS * BLOCK, chunk.size - at),
                    section + at // BLOCK * 2,
                    section + codec.cut(chunk.size) + at // (ROWS * BLOCK) * payload,
                ],
                axis=1,
            )
        )
        section += size
    return np.concatenate(rows)
