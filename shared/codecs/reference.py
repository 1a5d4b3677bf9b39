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


def root_mean_squares(x: F32) -> F32:
    """Of each block √(Σ x²/n) in fp32: sixteen interleaved sums, then those pairwise. fp32 (blocks,)"""
    lanes = np.zeros((-(-x.size // BLOCK), 16), np.float32)
    with np.errstate(over="ignore"):
        for column in range(0, BLOCK, 16):
            lanes += _padded(x)[:, column : column + 16] ** 2
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half:]
    counts = np.minimum(BLOCK, x.size - BLOCK * np.arange(lanes.shape[0])).astype(np.float32)
    root: F32 = np.sqrt(lanes[:, 0] / counts)
    return root


def block_scales(x: F32, levels: int, step: float = 0.0) -> F32:
    """The larger of max|block| / levels and step · rms(block), rounded up to bf16; 0 where that is below the normal
    range. fp32 (blocks,)"""
    if not x.size:
        return np.zeros(0, np.float32)
    scale = np.abs(_padded(x)).max(axis=1) / np.float32(levels)
    if step:
        wide = np.minimum(np.float32(step) * root_mean_squares(x), np.float32(levels) * scale)
        scale = np.maximum(scale, wide)
    scale = bf16_round_up(scale)
    return np.where(scale >= np.float32(2.0**-126), scale, np.float32(0)).astype(np.float32)


def quantise(x: F32, levels: int, step: float = 0.0) -> tuple[F32, NDArray[np.int8]]:
    """Scales (blocks,) and integers (n,) of a symmetric block quantiser."""
    scale = block_scales(x, levels, step)
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale > 0)
    q = np.clip(np.rint(_padded(x) * inverse[:, None]), -levels, levels).astype(np.int8)
    return scale, q.reshape(-1)[: x.size]


def dequantise(scale: F32, q: NDArray[np.int8]) -> F32:
    """q · scale, one rounding. fp32 (n,)"""
    return (q.astype(np.float32) * np.repeat(scale, BLOCK)[: q.size]).astype(np.float32)


def pack_nibbles(codes: NDArray[np.int8], zero: int) -> NDArray[np.uint8]:
    """Codes from 0 to 15, two a byte, the even element low; an odd count is padded with the code `zero`."""
    nibbles = np.append(codes, np.full(codes.size % 2, zero, np.int8)).astype(np.uint8)
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def quantise_e3m0(x: F32) -> tuple[F32, NDArray[np.int8]]:
    """Scales (blocks,) and codes (n,): the nearest of 0 and ±2ⁿ · scale, n from 0 to 6, halves away from zero."""
    scale = block_scales(x, 64)
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale > 0)
    v = np.abs((_padded(x) * inverse[:, None]).reshape(-1)[: x.size]).astype(np.float64)
    bounds = [0.5, *(1.5 * 2.0**n for n in range(6))]
    codes = np.searchsorted(bounds, v, side="right")
    return scale, np.where(np.signbit(x) & (codes > 0), codes + 8, codes).astype(np.int8)


def e3m0_integers(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """What codes stand for, in scales."""
    magnitude = np.where(codes & 7, 2.0 ** ((codes & 7) - 1), 0)
    return np.where(codes & 8, -magnitude, magnitude).astype(np.int8)


def square_sum(x: F32) -> float:
    """Σ x²: 64 interleaved sums, then those by halves."""
    lanes = np.zeros(BLOCK)
    for row in _padded(x).astype(np.float64) ** 2:
        lanes += row
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def round_bf16(x: F32) -> F32:
    """x at bf16 precision, halves to even, clipped to the largest finite bf16."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    overflow = (rounded & 0x7FFF) >= 0x7F80
    rounded = np.where(overflow, (rounded & 0x8000) | 0x7F7F, rounded).astype(np.uint32)
    return (rounded << np.uint32(16)).view(np.float32)


def topk_bits(indices: list[int], mode: int) -> str:
    """The indices of a block of topk2 as characters 0 and 1, first bit first."""
    if mode == 255:
        return "".join(_low_first(index, 12) for index in indices)
    gaps = [index - before - 1 for before, index in zip([-1, *indices], indices, strict=False)]
    return "".join("1" * (gap >> mode) + "0" + _low_first(gap, mode) for gap in gaps)


def _low_first(value: int, bits: int) -> str:
    return "".join(str(value >> bit & 1) for bit in range(bits))


def topk_levels(magnitudes: F32) -> F32:
    """The two bf16 levels of a block's kept magnitudes, in the order of their places: four rounds of Lloyd's algorithm
    from the mean."""
    low = high = _ordered_sum(magnitudes) / magnitudes.size
    for _ in range(4):
        above = magnitudes.astype(np.float64) > (low + high) / 2
        if not above.any() or above.all():
            break
        low = _ordered_sum(magnitudes[~above]) / int((~above).sum())
        high = _ordered_sum(magnitudes[above]) / int(above.sum())
    return round_bf16(np.array([low, high], dtype=np.float32))


def _ordered_sum(x: F32) -> float:
    return float(np.add.accumulate(x.astype(np.float64))[-1])


def encode_topk(x: F32, k: int) -> tuple[NDArray[np.uint8], F32]:
    """A chunk in topk2, and what it decodes to."""
    levels, modes, values, coded, decoded = [], [], b"", b"", np.zeros_like(x)
    for start in range(0, x.size, 4096):
        block = x[start : start + 4096]
        kept = -(-k * block.size // 4096)
        order = np.lexsort((np.arange(block.size), -np.abs(block.astype(np.float64))))
        indices = np.sort(order[:kept])
        chosen = block[indices]
        pair = topk_levels(np.abs(chosen))
        is_high = np.abs(chosen).astype(np.float64) > (float(pair[0]) + float(pair[1])) / 2
        codes = is_high.astype(np.uint8) | (np.signbit(chosen).astype(np.uint8) << 1)
        padded = np.append(codes, np.zeros(-kept % 4, np.uint8)).reshape(-1, 4)
        lengths = {mode: len(topk_bits(indices.tolist(), mode)) for mode in range(12)}
        mode = min(lengths, key=lambda mode: (lengths[mode], mode))
        mode = mode if lengths[mode] < 12 * kept else 255
        bits = topk_bits(indices.tolist(), mode)
        levels.append((pair.view(np.uint32) >> 16).astype("<u2").tobytes())
        modes.append(mode)
        values += (padded << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1).astype(np.uint8).tobytes()
        coded += np.packbits([int(bit) for bit in bits], bitorder="little").tobytes()
        decoded[start + indices] = np.where(np.signbit(chosen), -pair[is_high.astype(int)], pair[is_high.astype(int)])
    return np.frombuffer(b"".join(levels) + bytes(modes) + values + coded, np.uint8), decoded
