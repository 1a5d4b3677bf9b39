"""CPU kernels of the codecs: numba loops, each beside a plain form in `reference.py` that tests compare with.

`fastmath` is off: LLVM then neither reorders nor fuses, so that every operation rounds once, and a
version is the same bits on every make of CPU (design, invariant 3). `nogil` lets chunks run in
parallel threads.

A chunk is worked through in tiles whose scratch stays in the first-level cache, a stage at a time: each stage is
a loop over whole blocks with a constant trip count, which is what makes it vectorise. Nibbles are widened to
bytes before they meet a float for the same reason (twice as fast as both at once, `benchmarks/codec`).

`kind` says which codec, because one compiled function that branches once a tile is simpler to warm up than one
for each, and lets the outer step encode its tile while it is hot. A chunk's raw bytes come as `scales` (bf16
bits, one per block; empty for the float codecs) and `payload`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

BLOCK = 64
TILE = 4096
FP32, BF16, FP16, INT8, INT4, E3M0 = range(6)
SOUND, NOT_FINITE, NEGATIVE, TOO_LARGE, LEVELS_CROSS, OUT_OF_ORDER, OUT_OF_RANGE, BAD_MODE, WRONG_LENGTH = range(9)
"""What a screening or an encoding found."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]

LARGEST_SCALE = np.finfo(np.float32).max / np.float32(128)
"""The largest that is encoded: small enough that no value or sum of values overflows."""
LARGEST_VALUE = np.float32(2.0**20)
"""The largest magnitude that passes a screening. What is screened is a difference of weights. Those of a model that
trains are of the order of 1, outliers of a few hundred included, and near 2²⁰ fp32 keeps three binary digits behind the
point: where one weight has moved by more, the model is lost whatever is merged. So no contribution of use is refused,
and a sum of as many as there may be is far from where fp32 overflows. A scale counts as the largest value that it could
make, which on the coarsest grid (int8 with steps of 3 root mean squares) refuses blocks from a root mean square of 2700
on: lost as well. Decoding has no such bound: what was accepted once decodes for ever, and so do weights."""
SMALLEST_NORMAL = np.float32(2.0**-126)
_TO_INTEGER = np.float32(1.5 * 2**23)
"""Added to and taken from an fp32 below 2²² it is the nearest integer, halves to even; unlike rint it vectorises."""
_INFINITY = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST_VALUE_BITS = np.uint32(LARGEST_VALUE.view(np.uint32))
_WIDE = 16

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def levels_of(kind: int) -> np.float32:
    """The largest integer of a block codec's grid: what the block's largest magnitude is mapped to."""
    if kind == INT8:
        return np.float32(127)
    return np.float32(7) if kind == INT4 else np.float32(64)


@_jit
def reach_of(kind: int) -> np.float32:
    """The largest magnitude, in scales, that a block codec's payload can say. Two's complement has one more below zero
    than an encoder uses."""
    if kind == INT8:
        return np.float32(128)
    return np.float32(8) if kind == INT4 else np.float32(64)


# -- decoding


@_jit
def _values_of_scales(bits: U16, out: U32) -> None:
    """bf16 bits as fp32 bits."""
    for b in range(bits.size):
        out[b] = np.uint32(bits[b]) << np.uint32(16)


@_jit
def _integers(kind: int, payload: U8, q: I8) -> None:
    """The integers of a tile, one byte each. Of two nibbles the even element is the low one."""
    half = q.size // 2
    if kind == INT8:
        for i in range(q.size):
            q[i] = np.int8(payload[i])
    elif kind == INT4:
        for j in range(half):
            q[2 * j] = np.int8(payload[j] & np.uint8(15)) - np.int8(8)
            q[2 * j + 1] = np.int8(payload[j] >> np.uint8(4)) - np.int8(8)
        if q.size % 2:
            q[2 * half] = np.int8(payload[half] & np.uint8(15)) - np.int8(8)
    else:
        for j in range(half):
            q[2 * j] = np.int8(payload[j] & np.uint8(15))
            q[2 * j + 1] = np.int8(payload[j] >> np.uint8(4))
        if q.size % 2:
            q[2 * half] = np.int8(payload[half] & np.uint8(15))
        for i in range(q.size):
            code = np.int32(q[i])
            magnitude = (np.int32(1) << (code & np.int32(7))) >> np.int32(1)
            q[i] = np.int8(magnitude if code < 8 else -magnitude)


@_jit
def _add_integers(q: I8, scale: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · (q · scale), rounded after each of the three operations."""
    whole = q.size // BLOCK
    for b in range(whole):
        s = scale[b]
        for i in range(BLOCK):
            acc[b * BLOCK + i] += weight * (np.float32(q[b * BLOCK + i]) * s)
    for i in range(whole * BLOCK, q.size):
        acc[i] += weight * (np.float32(q[i]) * scale[whole])


@_jit
def _float_bits(kind: int, payload: U8, out: U32) -> None:
    """The values of a float codec as fp32 bits."""
    if kind == FP32:
        words = payload.view(np.uint32)
        for i in range(out.size):
            out[i] = words[i]
        return
    halves = payload.view(np.uint16)
    if kind == BF16:
        for i in range(out.size):
            out[i] = np.uint32(halves[i]) << np.uint32(16)
        return
    # Exponent and mantissa in fp32's places; the exponent's bias (15 for 127) and its subnormals by an exact product.
    values = out.view(np.float32)
    for i in range(out.size):
        out[i] = np.uint32(halves[i] & np.uint16(0x7FFF)) << np.uint32(13)
    for i in range(out.size):
        values[i] *= np.float32(2.0**112)
    for i in range(out.size):
        # What was infinite or NaN must stay so, to be found.
        special = _INFINITY if (halves[i] & np.uint16(0x7C00)) == np.uint16(0x7C00) else np.uint32(0)
        out[i] |= special | (np.uint32(halves[i] & np.uint16(0x8000)) << np.uint32(16))


@_jit
def _width(kind: int) -> int:
    return 4 if kind == FP32 else 2


@_jit
def payload_range(kind: int, start: int, stop: int) -> tuple[int, int]:
    """Where elements `start` (even) to `stop` lie in the payload."""
    if kind == INT8:
        return start, stop
    if kind in (INT4, E3M0):
        return start // 2, (stop + 1) // 2
    return _width(kind) * start, _width(kind) * stop


@_jit
def new_scratch() -> tuple[U32, U32, F32, I8]:
    """What `accumulate_tile` and `encode_tile` work in."""
    blocks = TILE // BLOCK
    return np.empty(TILE, np.uint32), np.empty(blocks, np.uint32), np.empty(blocks, np.float32), np.empty(TILE, np.int8)


@_jit
def accumulate_tile(
    kind: int,
    scales: U16,
    payload: U8,
    start: int,
    weight: np.float32,
    acc: F32,
    scratch: tuple[U32, U32, F32, I8],
) -> None:
    """acc += weight · decoded, in place, for the acc.size elements (TILE at most) from `start` on (a whole number of
    tiles); of each element one rounding for each operation."""
    bits, scale_bits, _, narrow = scratch
    stop = start + acc.size
    first, last = payload_range(kind, start, stop)
    if kind >= INT8:
        q = narrow[: acc.size]
        _values_of_scales(scales[start // BLOCK : (stop + BLOCK - 1) // BLOCK], scale_bits)
        _integers(kind, payload[first:last], q)
        _add_integers(q, scale_bits.view(np.float32), weight, acc)
        return
    _float_bits(kind, payload[first:last], bits[: acc.size])
    values = bits.view(np.float32)
    for i in range(acc.size):
        acc[i] += weight * values[i]


@_jit
def accumulate(kind: int, scales: U16, payload: U8, weight: np.float32, acc: F32) -> None:
    """`accumulate_tile` of a whole chunk."""
    scratch = new_scratch()
    for start in range(0, acc.size, TILE):
        accumulate_tile(kind, scales, payload, start, weight, acc[start : start + TILE], scratch)


@_jit
def sum_tile(
    kind: int, cut: int, raws: U8, weights: F32, start: int, acc: F32, scratch: tuple[U32, U32, F32, I8]
) -> None:
    """acc += Σ weights[n] · decoded raws[n], as `accumulate_tile`; `raws` are the raw bytes of the same chunk from
    several contributions, uint8 (contributions, bytes), whose payload begins at `cut`."""
    for n in range(weights.size):
        scales = raws[n, :cut].view(np.uint16)
        accumulate_tile(kind, scales, raws[n, cut:], start, weights[n], acc, scratch)


@_jit
def sum_chunk(kind: int, cut: int, raws: U8, weights: F32, acc: F32) -> None:
    """`sum_tile` of a whole chunk."""
    scratch = new_scratch()
    for start in range(0, acc.size, TILE):
        sum_tile(kind, cut, raws, weights, start, acc[start : start + TILE], scratch)


@_jit
def accumulate_fp32(values: F32, weight: np.float32, acc: F32) -> None:
    """acc += weight · values."""
    for i in range(acc.size):
        acc[i] += weight * values[i]


# -- screening


@_jit
def square_sum(x: F32) -> float:
    """Σ x² in double precision: as many interleaved sums as a block has elements, then those pairwise, so that it
    vectorises, in one order."""
    lanes = np.zeros(BLOCK, np.float64)
    whole = x.size // BLOCK
    for b in range(whole):
        for i in range(BLOCK):
            value = np.float64(x[b * BLOCK + i])
            lanes[i] += value * value
    for i in range(whole * BLOCK, x.size):
        value = np.float64(x[i])
        lanes[i - whole * BLOCK] += value * value
    return _sum_pairwise(lanes)


@_jit
def _sum_pairwise(lanes: F64) -> float:
    """The sum of BLOCK values, halved and halved again; in place."""
    half = BLOCK // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return float(lanes[0])


@_jit
def _largest_bits(bits: U32) -> np.uint32:
    """The largest magnitude, as fp32 bits: for finite values their integer order is the float order, and NaN or
    infinity come out at 0x7F800000 or above."""
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@_jit
def _flaw_of_scales(kind: int, scales: U16) -> tuple[int, float]:
    """(what is wrong, the largest scale); where one of them cannot be, it says nothing."""
    largest, signs = np.uint16(0), np.uint16(0)
    for b in range(scales.size):
        largest = max(largest, scales[b] & np.uint16(0x7FFF))
        signs |= scales[b]
    if largest >= np.uint16(0x7F80):
        return NOT_FINITE, 0.0
    if signs & np.uint16(0x8000):
        return NEGATIVE, 0.0
    scale = _value_of(np.uint32(largest) << np.uint32(16))
    return TOO_LARGE if scale > LARGEST_VALUE / reach_of(kind) else SOUND, float(scale)


@_jit
def _value_of(bits: np.uint32) -> np.float32:
    """fp32 bits as the value that they are."""
    one = np.empty(1, np.uint32)
    one[0] = bits
    return np.float32(one.view(np.float32)[0])


@_jit
def screen(kind: int, scales: U16, payload: U8, elements: int) -> tuple[int, float]:
    """(what is wrong, Σ decoded²) of a chunk, in one pass over its raw bytes. The sum is in double precision; where
    something is too large it is this scale or magnitude instead, and where something else is wrong it says nothing.
    Too large is a scale with which any value could be beyond LARGEST_VALUE, whether or not one is."""
    total = 0.0
    flaw, scale_found = _flaw_of_scales(kind, scales)  # a float codec has none, and they are sound
    if flaw != SOUND:
        return flaw, scale_found
    bits = np.empty(TILE, np.uint32)
    values = bits.view(np.float32)
    q = np.empty(TILE, np.int8)
    scale_bits = np.empty(TILE // BLOCK, np.uint32)
    scale = scale_bits.view(np.float32)
    for start in range(0, elements, TILE):
        stop = min(start + TILE, elements)
        size = stop - start
        first, last = payload_range(kind, start, stop)
        if kind >= INT8:
            _values_of_scales(scales[start // BLOCK : (stop + BLOCK - 1) // BLOCK], scale_bits)
            _integers(kind, payload[first:last], q[:size])
            values[:size] = np.float32(0)
            _add_integers(q[:size], scale, np.float32(1), values[:size])
        else:
            _float_bits(kind, payload[first:last], bits[:size])
            largest = _largest_bits(bits[:size])
            if largest > _LARGEST_VALUE_BITS:
                return NOT_FINITE if largest >= _INFINITY else TOO_LARGE, float(_value_of(largest))
        total += square_sum(values[:size])
    return SOUND, total


# -- encoding


@_jit
def _root_mean_square(x: F32, lanes: F32) -> np.float32:
    """√(Σ x²/n) in fp32; sixteen interleaved sums, so that it vectorises, in one order."""
    lanes[:] = np.float32(0)
    whole = x.size // _WIDE
    for j in range(whole):
        for i in range(_WIDE):
            lanes[i] += x[j * _WIDE + i] * x[j * _WIDE + i]
    for i in range(whole * _WIDE, x.size):
        lanes[i - whole * _WIDE] += x[i] * x[i]
    for half in (8, 4, 2, 1):
        for i in range(half):
            lanes[i] += lanes[i + half]
    return np.float32(np.sqrt(lanes[0] / np.float32(x.size)))


@_jit
def _coarsen(levels: np.float32, step: np.float32, x: F32, largest: U32) -> None:
    """Makes no scale less than `step` times the root mean square of its block, but none more than the block's largest
    value either (which also holds where the squares overflow)."""
    scale, lanes = largest.view(np.float32), np.empty(_WIDE, np.float32)
    for b in range((x.size + BLOCK - 1) // BLOCK):
        block = x[b * BLOCK : (b + 1) * BLOCK]
        scale[b] = max(scale[b], min(step * _root_mean_square(block, lanes), levels * scale[b]))


@_jit
def _block_scales(levels: np.float32, step: np.float32, x: F32, largest: U32, inverse: F32, scales: U16) -> int:
    """Of each block its scale, the larger of max|block| / levels and `step`·rms(block), rounded up to bf16 (0 below the
    normal range): as bf16 bits in `scales`, as fp32 in `largest` and its inverse in `inverse`. What is wrong with the
    values, if anything."""
    bits = x.view(np.uint32)
    whole, blocks = bits.size // BLOCK, scales.size
    for b in range(whole):
        most = np.uint32(0)
        for i in range(BLOCK):
            most = max(most, bits[b * BLOCK + i] & _MAGNITUDE)
        largest[b] = most
    if blocks > whole:
        largest[whole] = _largest_bits(bits[whole * BLOCK :])
    highest = np.uint32(0)
    for b in range(blocks):
        highest = max(highest, largest[b])
    if highest >= _INFINITY:
        return NOT_FINITE
    scale = largest.view(np.float32)
    for b in range(blocks):
        scale[b] /= levels
    if step > np.float32(0):
        _coarsen(levels, step, x, largest)
    for b in range(blocks):
        largest[b] = ((largest[b] + np.uint32(0xFFFF)) >> np.uint32(16)) << np.uint32(16)
    flaw = SOUND
    for b in range(blocks):
        if scale[b] > LARGEST_SCALE:
            flaw = TOO_LARGE
        if scale[b] < SMALLEST_NORMAL:
            scale[b] = np.float32(0)
            inverse[b] = np.float32(0)
        else:
            inverse[b] = np.float32(1) / scale[b]
        scales[b] = np.uint16(largest[b] >> np.uint32(16))
    return flaw


@_jit
def _round_integers(x: F32, inverse: F32, q: I8) -> None:
    """q = x / scale, halves to even. No value is beyond its levels, because the scale was rounded up."""
    whole = x.size // BLOCK
    for b in range(whole):
        inv = inverse[b]
        for i in range(BLOCK):
            near = (x[b * BLOCK + i] * inv + _TO_INTEGER) - _TO_INTEGER
            q[b * BLOCK + i] = np.int8(np.int32(near))
    for i in range(whole * BLOCK, x.size):
        near = (x[i] * inverse[whole] + _TO_INTEGER) - _TO_INTEGER
        q[i] = np.int8(np.int32(near))


@_jit
def _round_powers(x: F32, inverse: F32, scratch: U32, q: I8) -> None:
    """q = the nearest of 0, ±1, ±2, ±4 … ±64 to x / scale, halves away from zero."""
    values = scratch.view(np.float32)
    whole = x.size // BLOCK
    for b in range(whole):
        inv = inverse[b]
        for i in range(BLOCK):
            values[b * BLOCK + i] = x[b * BLOCK + i] * inv
    for i in range(whole * BLOCK, x.size):
        values[i] = x[i] * inverse[whole]
    for i in range(x.size):
        magnitude = scratch[i] & _MAGNITUDE
        # Half a mantissa more lifts what is at 1.5 · 2ⁿ or above into the next exponent; 0.5 to 0.75 is nearest to 1.
        power = np.int32((magnitude + np.uint32(0x00400000)) >> np.uint32(23)) - np.int32(127)
        level = np.int32(1) << max(power, np.int32(0))
        level = level if magnitude >= np.uint32(0x3F000000) else np.int32(0)
        q[i] = np.int8(level if scratch[i] == magnitude else -level)


@_jit
def _pack(kind: int, q: I8, payload: U8) -> None:
    """The integers of a tile as payload bytes; an odd count is padded with a zero value."""
    half = q.size // 2
    if kind == INT8:
        for i in range(q.size):
            payload[i] = np.uint8(q[i])
    elif kind == INT4:
        for j in range(half):
            payload[j] = np.uint8(q[2 * j] + np.int8(8)) | (np.uint8(q[2 * j + 1] + np.int8(8)) << np.uint8(4))
        if q.size % 2:
            payload[half] = np.uint8(q[2 * half] + np.int8(8)) | np.uint8(8 << 4)
    else:
        for j in range(half):
            payload[j] = _power_code(q[2 * j]) | (_power_code(q[2 * j + 1]) << np.uint8(4))
        if q.size % 2:
            payload[half] = _power_code(q[2 * half])


@_jit
def _power_code(q: np.int8) -> np.uint8:
    """Sign and exponent of 0, ±1, ±2 … ±64: 0 for 0, n + 1 for 2ⁿ."""
    m = np.uint8(q) if q >= 0 else np.uint8(-q)
    code = np.uint8(m > 0) + np.uint8(m > 1) + np.uint8(m > 2) + np.uint8(m > 4) + np.uint8(m > 8) + np.uint8(m > 16)
    return np.uint8(code + np.uint8(m > 32)) | (np.uint8(8) if q < 0 else np.uint8(0))


@_jit
def _round_floats(kind: int, x: U32, scratch: F32, payload: U8) -> None:
    """fp32 bits in the payload's format, halves to even; what would round to infinity stays at the largest value."""
    n = x.size
    if kind == FP32:
        words = payload.view(np.uint32)
        for i in range(n):
            words[i] = x[i]
        return
    halves = payload.view(np.uint16)
    if kind == BF16:
        for i in range(n):
            rounded = (x[i] + np.uint32(0x7FFF) + ((x[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            over = (rounded & np.uint32(0x7FFF)) >= np.uint32(0x7F80)
            halves[i] = np.uint16((rounded & np.uint32(0x8000)) | np.uint32(0x7F7F) if over else rounded)
        return
    magnitude = scratch.view(np.uint32)
    for i in range(n):
        magnitude[i] = min(x[i] & _MAGNITUDE, np.uint32(0x477FE000))  # 65504
    for i in range(n):
        # Below 2⁻¹⁴ fp16 steps by 2⁻²⁴, which is what fp32 does from 0.5 to 1.
        scratch[i] = scratch[i] + np.float32(0.5) if scratch[i] < np.float32(2.0**-14) else scratch[i]
    for i in range(n):
        small = magnitude[i] - np.uint32(0x3F000000)
        even = np.uint32(0xFFF) + ((magnitude[i] >> np.uint32(13)) & np.uint32(1))
        large = (magnitude[i] + even - np.uint32(112 << 23)) >> np.uint32(13)
        tiny = (x[i] & _MAGNITUDE) < np.uint32(0x38800000)  # 2⁻¹⁴
        halves[i] = np.uint16((small if tiny else large) | ((x[i] >> np.uint32(16)) & np.uint32(0x8000)))


@_jit
def encode_tile(
    kind: int,
    step: np.float32,
    x: F32,
    scales: U16,
    payload: U8,
    target: F32,
    sign: np.float32,
    scratch: tuple[U32, U32, F32, I8],
) -> int:
    """Encodes at most TILE elements, and adds `sign` times what they decode to to `target` (empty: to nothing; it
    may be `x` itself). `step` is the least one of an integer grid, in root mean squares of its block. What is wrong
    with them, if anything is."""
    wide, largest, inverse, narrow = scratch
    bits, n = x.view(np.uint32), x.size
    if kind < INT8:
        if _largest_bits(bits) >= _INFINITY:
            return NOT_FINITE
        _round_floats(kind, bits, wide.view(np.float32)[:n], payload)
        if target.size:
            _float_bits(kind, payload, wide[:n])
            values = wide.view(np.float32)
            for i in range(n):
                target[i] += sign * values[i]
        return SOUND
    flaw = _block_scales(levels_of(kind), np.float32(0) if kind == E3M0 else step, x, largest, inverse, scales)
    if flaw != SOUND:
        return flaw
    q = narrow[:n]
    if kind == E3M0:
        _round_powers(x, inverse, wide[:n], q)
    else:
        _round_integers(x, inverse, q)
    _pack(kind, q, payload)
    if target.size:
        _add_integers(q, largest.view(np.float32), sign, target)
    return SOUND


@_jit
def encode(kind: int, step: np.float32, x: F32, scales: U16, payload: U8, target: F32, sign: np.float32) -> int:
    """`encode_tile` of a whole chunk."""
    scratch = new_scratch()
    for start in range(0, x.size, TILE):
        stop = min(start + TILE, x.size)
        first, last = payload_range(kind, start, stop)
        blocks = scales[start // BLOCK : (stop + BLOCK - 1) // BLOCK] if kind >= INT8 else scales[:0]
        flaw = encode_tile(
            kind,
            step,
            x[start:stop],
            blocks,
            payload[first:last],
            target[start:stop] if target.size else target,
            sign,
            scratch,
        )
        if flaw != SOUND:
            return flaw
    return SOUND
