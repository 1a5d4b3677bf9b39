"""CPU kernels of the codecs: numba loops, each beside a plain reference in `reference.py`.

`fastmath` is off: LLVM then neither reorders nor fuses, so that every operation rounds once, and a
version is the same bits on every make of CPU (design, invariant 3). `nogil` lets chunks run in
parallel threads. Loops over whole blocks have a constant trip count, which is what makes them
vectorise; the last, partial block goes through the same body with its own bounds.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

BLOCK = 64
F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def block_max_bits(bits: U32, out: U32) -> None:
    """The largest magnitude of each block, as fp32 bits. For finite values their integer order is the float
    order, and NaN or infinity come out at 0x7F800000 or above: one integer maximum does both jobs."""
    for b in range(out.size):
        start = b * BLOCK
        largest = np.uint32(0)
        for i in range(start, min(start + BLOCK, bits.size)):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        out[b] = largest


@_jit
def quantise_int8(x: F32, inverse: F32, out: I8) -> None:
    """out = clip(round(x / scale), ±127), halves to even."""
    for b in range(inverse.size):
        start = b * BLOCK
        inv = inverse[b]
        for i in range(start, min(start + BLOCK, x.size)):
            q = np.rint(x[i] * inv)
            out[i] = np.int8(min(max(q, np.float32(-127)), np.float32(127)))


@_jit
def accumulate_int8(q: I8, scale: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · (q · scale), rounded after each of the three operations."""
    for b in range(scale.size):
        start = b * BLOCK
        s = scale[b]
        for i in range(start, min(start + BLOCK, acc.size)):
            acc[i] += weight * (np.float32(q[i]) * s)


@_jit
def quantise_int4(x: F32, inverse: F32, out: U8) -> None:
    """Two values a byte, the even element in the low nibble; a nibble is clip(round(x / scale), ±7) + 8."""
    n = x.size
    for b in range(inverse.size):
        start = b * BLOCK
        inv = inverse[b]
        for j in range(start // 2, min(start + BLOCK, n) // 2):
            low = min(max(np.rint(x[2 * j] * inv), np.float32(-7)), np.float32(7))
            high = min(max(np.rint(x[2 * j + 1] * inv), np.float32(-7)), np.float32(7))
            out[j] = np.uint8(np.int32(low) + 8) | np.uint8((np.int32(high) + 8) << 4)
    if n % 2:
        last = min(max(np.rint(x[n - 1] * inverse[-1]), np.float32(-7)), np.float32(7))
        out[n // 2] = np.uint8(np.int32(last) + 8) | np.uint8(8 << 4)


@_jit
def accumulate_int4(packed: U8, scale: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · ((nibble − 8) · scale), rounded after each of the three operations."""
    n = acc.size
    for b in range(scale.size):
        start = b * BLOCK
        s = scale[b]
        for j in range(start // 2, min(start + BLOCK, n) // 2):
            byte = np.int32(packed[j])
            acc[2 * j] += weight * (np.float32((byte & 15) - 8) * s)
            acc[2 * j + 1] += weight * (np.float32((byte >> 4) - 8) * s)
    if n % 2:
        acc[n - 1] += weight * (np.float32((np.int32(packed[n // 2]) & 15) - 8) * scale[-1])


@_jit
def accumulate_fp32(values: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · values."""
    for i in range(acc.size):
        acc[i] += weight * values[i]


@_jit
def encode_bf16(bits: U32, out: U16) -> None:
    """fp32 bits to bf16 bits, halves to even; what would round to infinity stays at the largest finite value."""
    for i in range(bits.size):
        rounded = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        if rounded & np.uint32(0x7FFF) >= np.uint32(0x7F80):
            rounded = (rounded & np.uint32(0x8000)) | np.uint32(0x7F7F)
        out[i] = np.uint16(rounded)


@_jit
def accumulate_bf16(bits: U16, scratch: U32, values: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · values, where `scratch` and `values` are one buffer seen as bits and as numbers."""
    for i in range(acc.size):
        scratch[i] = np.uint32(bits[i]) << np.uint32(16)
    for i in range(acc.size):
        acc[i] += weight * values[i]


@_jit
def square_sum(x: F32) -> float:
    """Σ x² in double precision."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total
