"""Plain NumPy forms of the kernels, written from their definitions; tests compare the two bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
BLOCK = 64


def _padded(x: F32) -> F32:
    return np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def bf16_round_up(x: F32) -> F32:
    """The smallest bf16 value ≥ x, for x ≥ 0."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0xFFFF) >> 16) << 16).astype(np.uint32).view(np.float32)


def block_scales(x: F32, levels: int) -> F32:
    """max|block| / levels, rounded up to bf16; 0 where that is below the normal range. fp32 (blocks,)"""
    scale = bf16_round_up(np.abs(_padded(x)).max(axis=1) / np.float32(levels)) if x.size else np.zeros(0, np.float32)
    return np.where(scale >= np.float32(2.0**-126), scale, np.float32(0)).astype(np.float32)


def quantise(x: F32, levels: int) -> tuple[F32, NDArray[np.int8]]:
    """Scales (blocks,) and integers (n,) of a symmetric block quantiser."""
    scale = block_scales(x, levels)
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale > 0)
    q = np.clip(np.rint(_padded(x) * inverse[:, None]), -levels, levels).astype(np.int8)
    return scale, q.reshape(-1)[: x.size]


def dequantise(scale: F32, q: NDArray[np.int8]) -> F32:
    """q · scale, one rounding. fp32 (n,)"""
    return (q.astype(np.float32) * np.repeat(scale, BLOCK)[: q.size]).astype(np.float32)


def pack_int4(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Offset-8 nibbles, the even element low; an odd count is padded with a zero value."""
    nibbles = (np.append(q, np.zeros(q.size % 2, np.int8)) + 8).astype(np.uint8)
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def round_bf16(x: F32) -> F32:
    """x at bf16 precision, halves to even, clipped to the largest finite bf16."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    overflow = (rounded & 0x7FFF) >= 0x7F80
    rounded = np.where(overflow, (rounded & 0x8000) | 0x7F7F, rounded).astype(np.uint32)
    return (rounded << np.uint32(16)).view(np.float32)
