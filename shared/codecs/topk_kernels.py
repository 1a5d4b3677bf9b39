"""CPU kernels of topk2; `fastmath` off and bit for bit the NumPy form in `reference`, as those in `kernels`."""

from __future__ import annotations

import numba
import numpy as np

from shared.codecs.kernels import (
    BAD_MODE,
    F32,
    I32,
    LARGEST_VALUE,
    LEVELS_CROSS,
    NEGATIVE,
    NOT_FINITE,
    OUT_OF_ORDER,
    OUT_OF_RANGE,
    SOUND,
    TOO_LARGE,
    U8,
    U16,
    U32,
    WRONG_LENGTH,
)

BLOCK = 4096
INDEX_BITS, MOST_RICE, PLAIN = 12, 11, 255
FITTINGS = 4
"""Rounds of Lloyd's algorithm for the two levels; from the mean on, more change nothing that matters."""
LARGEST = np.uint32(0x7F000000)
"""The fp32 bits of 2¹²⁷: below it a level rounds to a finite bf16."""
LARGEST_LEVEL = np.uint16(0x7F00)
"""The bf16 bits of 2¹²⁷, the largest that is decoded."""
_LARGEST_SCREENED = np.uint16(LARGEST_VALUE.view(np.uint32) >> np.uint32(16))
"""Those of the largest that passes a screening."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_HIGH_BITS, _LOW_BITS = 11, 9

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def kept(k: int, elements: int) -> int:
    """How many of a block of `elements` are sent."""
    return (k * elements + BLOCK - 1) // BLOCK


# -- encoding


@_jit
def _bin_of_rank(histogram: I32, rank: int) -> tuple[int, int]:
    """The bin, counted from the largest, in which the element of this rank (from 1) lies, and how many are above it."""
    above, at = 0, histogram.size - 1
    while above + histogram[at] < rank:
        above += histogram[at]
        at -= 1
    return at, above


@_jit
def _threshold(magnitudes: U32, rank: int, histogram: I32) -> tuple[np.uint32, int]:
    """The magnitude (fp32 bits) of rank `rank`, and how many are larger: a radix selection, 11, 11 and 9 bits."""
    shift = np.uint32(_HIGH_BITS + _LOW_BITS)
    histogram[:] = 0
    for i in range(magnitudes.size):
        histogram[magnitudes[i] >> shift] += 1
    high, larger = _bin_of_rank(histogram, rank)
    histogram[:] = 0
    for i in range(magnitudes.size):
        if magnitudes[i] >> shift == np.uint32(high):
            histogram[(magnitudes[i] >> np.uint32(_LOW_BITS)) & np.uint32(2047)] += 1
    middle, above = _bin_of_rank(histogram, rank - larger)
    larger += above
    found = (np.uint32(high) << np.uint32(_HIGH_BITS)) | np.uint32(middle)
    histogram[:] = 0
    for i in range(magnitudes.size):
        if magnitudes[i] >> np.uint32(_LOW_BITS) == found:
            histogram[magnitudes[i] & np.uint32(511)] += 1
    low, above = _bin_of_rank(histogram[:512], rank - larger)
    return (found << np.uint32(_LOW_BITS)) | np.uint32(low), larger + above


@_jit
def _choose(magnitudes: U32, rank: int, histogram: I32, indices: I32) -> None:
    """The places of the `rank` largest, in order; of equals, those that come first."""
    threshold, larger = _threshold(magnitudes, rank, histogram)
    ties, n = rank - larger, 0
    for i in range(magnitudes.size):
        if magnitudes[i] >= threshold:
            if magnitudes[i] == threshold:
                if ties == 0:
                    continue
                ties -= 1
            indices[n] = i
            n += 1


@_jit
def _bf16(x: np.float32, scratch: F32) -> np.uint32:
    """The nearest bf16, halves to even, as its bits."""
    scratch[0] = x
    bits = scratch.view(np.uint32)[0]
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_jit
def _fit(values: F32) -> tuple[np.float32, np.float32]:
    """The two magnitudes that fit best: Lloyd's algorithm, from the mean."""
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
    low = high = total / values.size
    for _ in range(FITTINGS):
        middle = (low + high) / 2
        below = above = 0.0
        count = 0
        for i in range(values.size):
            if np.float64(values[i]) > middle:
                above += np.float64(values[i])
                count += 1
            else:
                below += np.float64(values[i])
        if count == 0 or count == values.size:
            break
        low, high = below / (values.size - count), above / count
    return np.float32(low), np.float32(high)


@_jit
def _rice_bits(indices: I32, r: int) -> int:
    total, before = indices.size * (r + 1), -1
    for n in range(indices.size):
        total += (indices[n] - before - 1) >> r
        before = indices[n]
    return total


@_jit
def _best_mode(indices: I32) -> int:
    """The Rice parameter that takes fewest bits, or PLAIN where none beats plain indices."""
    best, fewest = PLAIN, INDEX_BITS * indices.size
    for r in range(MOST_RICE + 1):
        bits = _rice_bits(indices, r)
        if bits < fewest:
            best, fewest = r, bits
    return best


@_jit
def _write_indices(indices: I32, mode: int, out: U8) -> int:
    """Writes the indices of a block; the bytes that they take."""
    held, filled, at, before = np.uint64(0), 0, 0, -1
    for n in range(indices.size):
        if mode == PLAIN:
            held |= np.uint64(indices[n]) << np.uint64(filled)
            filled += INDEX_BITS
        else:
            gap = indices[n] - before - 1
            before = indices[n]
            ones = gap >> mode
            while ones >= 8:
                held |= np.uint64(255) << np.uint64(filled)
                filled += 8
                ones -= 8
                while filled >= 8:
                    out[at] = np.uint8(held & np.uint64(255))
                    held >>= np.uint64(8)
                    at, filled = at + 1, filled - 8
            held |= ((np.uint64(1) << np.uint64(ones)) - np.uint64(1)) << np.uint64(filled)
            filled += ones + 1
            held |= np.uint64(gap & ((1 << mode) - 1)) << np.uint64(filled)
            filled += mode
        while filled >= 8:
            out[at] = np.uint8(held & np.uint64(255))
            held >>= np.uint64(8)
            at, filled = at + 1, filled - 8
    if filled > 0:
        out[at] = np.uint8(held)
        at += 1
    return at


@_jit
def _places(k: int, elements: int) -> tuple[int, int, int]:
    """(blocks, where their values begin, where their indices begin) in the raw bytes of a chunk."""
    blocks = (elements + BLOCK - 1) // BLOCK
    if blocks == 0:
        return 0, 0, 0
    last = kept(k, elements - (blocks - 1) * BLOCK)
    return blocks, 5 * blocks, 5 * blocks + (blocks - 1) * ((k + 3) // 4) + (last + 3) // 4


@_jit
def _new_scratch() -> tuple[U32, F32]:
    """What `_write_block` works in."""
    return np.empty(2, np.uint32), np.empty(1, np.float32)


@_jit
def _write_block(
    indices: I32, values: F32, levels: U16, codes: U8, coded: U8, decoded: F32, scratch: tuple[U32, F32]
) -> tuple[int, int, int]:
    """Writes what is kept of a block, `values` at `indices` in order, as its two `levels`, two bits of each in `codes`
    and `coded` indices: (what is wrong with the values, the mode, the bytes that the indices take). `decoded` is what
    they decode to."""
    level_bits, one = scratch
    level, bits = level_bits.view(np.float32), values.view(np.uint32)
    largest = np.uint32(0)
    for n in range(values.size):
        largest = max(largest, bits[n] & _MAGNITUDE)
        decoded[n] = abs(values[n])
    if largest >= LARGEST:
        return NOT_FINITE if largest >= _INFINITY else TOO_LARGE, 0, 0
    low, high = _fit(decoded)
    for n, fitted in enumerate((low, high)):
        level_bits[n] = _bf16(fitted, one)
        levels[n] = np.uint16(level_bits[n])
        level_bits[n] <<= np.uint32(16)
    middle = (np.float64(level[0]) + np.float64(level[1])) / 2
    for n in range(values.size):
        code = np.uint8(np.float64(decoded[n]) > middle)
        negative = bits[n] > _MAGNITUDE
        decoded[n] = -level[code] if negative else level[code]
        code |= np.uint8(2) if negative else np.uint8(0)
        if n % 4 == 0:
            codes[n // 4] = np.uint8(0)
        codes[n // 4] |= code << np.uint8(2 * (n % 4))
    mode = _best_mode(indices)
    return SOUND, mode, _write_indices(indices, mode, coded)


@_jit
def encode(k: int, x: F32, raw: U8, target: F32, sign: np.float32) -> tuple[int, int]:
    """Encodes a chunk into `raw`, and adds `sign` times what it decodes to to `target` (empty: to nothing; it may be
    `x` itself): (what is wrong with the values, the bytes taken)."""
    blocks, value_at, index_at = _places(k, x.size)
    levels, bits, scratch = raw[: 4 * blocks].view(np.uint16), x.view(np.uint32), _new_scratch()
    magnitudes, histogram = np.empty(BLOCK, np.uint32), np.empty(2048, np.int32)
    indices, values, decoded = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for b in range(blocks):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, x.size)
        size, count = stop - start, kept(k, stop - start)
        for i in range(size):
            magnitudes[i] = bits[start + i] & _MAGNITUDE
        _choose(magnitudes[:size], count, histogram, indices)
        for n in range(count):
            values[n] = x[start + indices[n]]
        flaw, mode, used = _write_block(
            indices[:count],
            values[:count],
            levels[2 * b : 2 * b + 2],
            raw[value_at:],
            raw[index_at:],
            decoded[:count],
            scratch,
        )
        if flaw != SOUND:
            return flaw, 0
        raw[4 * blocks + b] = np.uint8(mode)
        value_at, index_at = value_at + (count + 3) // 4, index_at + used
        if target.size:
            for n in range(count):
                target[start + indices[n]] += sign * decoded[n]
    return SOUND, index_at


@_jit
def write(k: int, elements: int, indices: I32, values: F32, raw: U8, decoded: F32) -> tuple[int, int]:
    """`encode` of a chunk of which others have chosen what is kept: of each block the places, in order, and the values,
    int32 and fp32 (blocks, k). `decoded` (blocks, k) becomes what they decode to; of a short last block the rest of the
    row says nothing, and is 0 there."""
    blocks, value_at, index_at = _places(k, elements)
    levels, scratch = raw[: 4 * blocks].view(np.uint16), _new_scratch()
    for b in range(blocks):
        count = kept(k, min(BLOCK, elements - b * BLOCK))
        decoded[b, count:] = np.float32(0)
        flaw, mode, used = _write_block(
            indices[b, :count],
            values[b, :count],
            levels[2 * b : 2 * b + 2],
            raw[value_at:],
            raw[index_at:],
            decoded[b, :count],
            scratch,
        )
        if flaw != SOUND:
            return flaw, 0
        raw[4 * blocks + b] = np.uint8(mode)
        value_at, index_at = value_at + (count + 3) // 4, index_at + used
    return SOUND, index_at


# -- decoding


@_jit
def _read_indices(coded: U8, mode: int, size: int, indices: I32) -> tuple[int, int]:
    """Reads the indices of a block of `size` elements: (what is wrong with them, the bytes that they took)."""
    held, filled, at, before = np.uint64(0), 0, 0, -1
    for n in range(indices.size):
        wanted = INDEX_BITS if mode == PLAIN else mode
        index = before + 1
        if mode != PLAIN:
            one = True
            while one:
                if filled == 0:
                    if at == coded.size:
                        return WRONG_LENGTH, at
                    held = np.uint64(coded[at])
                    at, filled = at + 1, 8
                one = (held & np.uint64(1)) != np.uint64(0)
                held >>= np.uint64(1)
                filled -= 1
                if one:
                    index += 1 << mode
                    if index >= size:
                        return OUT_OF_RANGE, at
        while filled < wanted:
            if at == coded.size:
                return WRONG_LENGTH, at
            held |= np.uint64(coded[at]) << np.uint64(filled)
            at, filled = at + 1, filled + 8
        low = int(held & np.uint64((1 << wanted) - 1))
        held >>= np.uint64(wanted)
        filled -= wanted
        index = low if mode == PLAIN else index + low
        if index >= size:
            return OUT_OF_RANGE, at
        if index <= before:
            return OUT_OF_ORDER, at
        indices[n] = index
        before = index
    return SOUND, at


@_jit
def _flaw_of_levels(low: np.uint16, high: np.uint16, largest: np.uint16) -> int:
    for level in (low, high):
        if (level & np.uint16(0x7FFF)) >= np.uint16(0x7F80):
            return NOT_FINITE
        if level & np.uint16(0x8000):
            return NEGATIVE
    if max(low, high) > largest:
        return TOO_LARGE
    return LEVELS_CROSS if low > high else SOUND


@_jit
def _decode(k: int, raw: U8, elements: int, weight: np.float32, acc: F32, largest: np.uint16) -> tuple[int, float]:
    """acc += weight · decoded (to nothing where it is empty): (what is wrong, Σ decoded²). `largest` are the bf16 bits
    of the largest level there may be; of one that is larger the sum is the value instead."""
    blocks, value_at, index_at = _places(k, elements)
    if raw.size < index_at:
        return WRONG_LENGTH, 0.0
    indices = np.empty(k, np.int32)
    level_bits = np.empty(2, np.uint32)
    level = level_bits.view(np.float32)
    total = 0.0
    for b in range(blocks):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, elements)
        count = kept(k, stop - start)
        for n in range(2):
            at = 4 * b + 2 * n
            level_bits[n] = np.uint32(raw[at]) | (np.uint32(raw[at + 1]) << np.uint32(8))
        flaw = _flaw_of_levels(np.uint16(level_bits[0]), np.uint16(level_bits[1]), largest)
        for n in range(2):
            level_bits[n] <<= np.uint32(16)
        if flaw != SOUND:
            return flaw, float(max(level[0], level[1])) if flaw == TOO_LARGE else 0.0
        mode = int(raw[4 * blocks + b])
        if mode > MOST_RICE and mode != PLAIN:
            return BAD_MODE, 0.0
        flaw, used = _read_indices(raw[index_at:], mode, stop - start, indices[:count])
        if flaw != SOUND:
            return flaw, 0.0
        index_at += used
        squares = (np.float64(level[0]) ** 2, np.float64(level[1]) ** 2)
        for n in range(count):
            code = raw[value_at + n // 4] >> np.uint8(2 * (n % 4))
            value = level[code & np.uint8(1)]
            total += squares[code & np.uint8(1)]
            if acc.size:
                acc[start + indices[n]] += weight * (-value if code & np.uint8(2) else value)
        value_at += (count + 3) // 4
    return SOUND if index_at == raw.size else WRONG_LENGTH, total


@_jit
def accumulate(k: int, raw: U8, weight: np.float32, acc: F32) -> int:
    """acc += weight · decoded, in place; elements that were not sent are not touched. What is wrong, if anything is;
    `acc` is of no use then."""
    flaw, _ = _decode(k, raw, acc.size, weight, acc, LARGEST_LEVEL)
    return flaw


@_jit
def screen(k: int, raw: U8, elements: int) -> tuple[int, float]:
    """(what is wrong, Σ decoded²) of a chunk; of a level beyond LARGEST_VALUE the sum is this level instead."""
    return _decode(k, raw, elements, np.float32(0), np.empty(0, np.float32), _LARGEST_SCREENED)
