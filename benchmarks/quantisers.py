"""Quantisers of a few bits in plain NumPy, for the search of `benchmarks.variants`: what production has, and what it
could have had.

A chunk is normalised by a scale for each block and becomes codes, small integers, which stand for levels times the
scale. What the scale goes by, which levels there are and how a value finds its level are three choices that can be
combined. Scales are bf16 and come first, then codes, two a byte where they fit into four bits: the layout of
production, so that zstd sees what it would see there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.codecs import Codec, Dense
from shared.codecs.kernels import F32, F64, U8
from shared.codecs.reference import bf16_round_up

Codes = NDArray[np.uint8]
Generator = np.random.Generator
Scale = Callable[[F32, int], F32]
"""Blocks, padded with zeros, fp32 (blocks, block), and the largest level, to a scale for each, fp32 (blocks,)."""

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""Quantiles of a normal distribution between its ends, zero among them (QLoRA, arXiv 2305.14314, appendix E)."""
CLIPS = np.linspace(0.3, 1.0, 15, dtype=np.float32)
FIT_SAMPLE, FIT_ROUNDS = 1 << 18, 200
SMALLEST_SCALE = np.float32(2.0**-126)


@dataclass(frozen=True)
class Encoded:
    """A chunk as it would be sent: the bytes that zstd is given, a frame for each piece, the bits that it takes without
    an entropy coder and behind an ideal one of order 0, and what it decodes to, fp32 (n,)."""

    frames: tuple[U8, ...]
    raw_bits: int
    ideal_bits: float
    decoded: F32


Quantiser = Callable[[F32, Generator], Encoded]
"""fp32 (n,) to what is sent of it; only stochastic rounding draws from the generator."""


@dataclass(frozen=True)
class Codebook:
    """Levels in rising order, and the bounds between each and the next: a value on a bound has the upper one."""

    levels: F32
    bounds: F32

    def nearest(self, v: F32) -> Codes:
        """The codes of normalised values; of the shape of `v`."""
        return np.searchsorted(self.bounds, v, side="right").astype(np.uint8)


def entropy_bits(symbols: NDArray[np.unsignedinteger]) -> float:
    """What an ideal coder of order 0 needs for all of `symbols`, in bits, its table not counted."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(np.sum(counts * np.log2(symbols.size / counts)))


# -- scales


def largest(step: float = 0.0) -> Scale:
    """Production's: the block's largest magnitude has the largest level, or the grid is `step` root mean squares of the
    block wide, if that is wider and the block holds so much."""

    def scale(blocks: F32, levels: int) -> F32:
        finest: F32 = np.abs(blocks).max(axis=1) / np.float32(levels)
        if step:
            finest = np.maximum(finest, np.minimum(np.float32(step) * _rms(blocks), np.float32(levels) * finest))
        return finest

    return scale


def fixed(step: float) -> Scale:
    """`step` root mean squares of the block, whatever is beyond the largest level then."""
    return lambda blocks, levels: (np.float32(step) * _rms(blocks)).astype(np.float32)


def clipped(blocks: F32, levels: int) -> F32:
    """Of several parts of the largest magnitude the one whose grid, clipping the rest, has the least squared error."""
    finest: F32 = np.abs(blocks).max(axis=1) / np.float32(levels)
    best, least = finest, np.full(finest.shape, np.inf, np.float32)
    for part in CLIPS:
        scale = finest * part
        lost = np.sum((blocks - _on_grid(blocks, scale, levels) * scale[:, None]) ** 2, axis=1)
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return best


def _rms(blocks: F32) -> F32:
    mean: F32 = np.sqrt(np.mean(blocks**2, axis=1))
    return mean


def _on_grid(blocks: F32, scale: F32, levels: int) -> F32:
    on_grid: F32 = np.clip(np.rint(blocks * _inverse(scale)[:, None]), -levels, levels)
    return on_grid


def _inverse(scale: F32) -> F32:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)


# -- how a value on an even grid finds its level


def nearest(v: F32, random: Generator) -> F32:
    """The level that is nearest, halves to even."""
    level: F32 = np.rint(v)
    return level


def stochastic(v: F32, random: Generator) -> F32:
    """One of the two levels around, so that the mean is the value itself."""
    level: F32 = np.floor(v + random.random(v.shape, dtype=np.float32))
    return level


def toward_zero(v: F32, random: Generator) -> F32:
    """The nearest level, or where the smaller one is nearly as near, that one: what small codes are more frequent, an
    entropy coder makes use of."""
    level: F32 = np.copysign(np.floor(np.abs(v) + np.float32(0.4)), v)
    return level


Rounding = Callable[[F32, Generator], F32]


def even(bits: int, block: int, scale: Scale | None = None, rounding: Rounding = nearest) -> Quantiser:
    """A symmetric even grid: 2^bits − 1 levels."""
    levels, scale_of = (1 << (bits - 1)) - 1, scale or largest()

    def encode(x: F32, random: Generator) -> Encoded:
        scales, v = _normalised(x, block, scale_of, levels)
        q = np.clip(rounding(v, random), -levels, levels)
        return _encoded(x.size, bits, scales, (q + levels).astype(np.uint8), q)

    return encode


def by_codebook(book: Codebook, block: int, scale: Scale) -> Quantiser:
    """Any levels."""
    bits = (book.levels.size - 1).bit_length()

    def encode(x: F32, random: Generator) -> Encoded:
        scales, v = _normalised(x, block, scale, 1)
        codes = book.nearest(v)
        return _encoded(x.size, bits, scales, codes, book.levels[codes])

    return encode


def _normalised(x: F32, block: int, scale: Scale, levels: int) -> tuple[F32, F32]:
    """Scales fp32 (blocks,), rounded up to bf16, and the values in scales, fp32 (blocks, block)."""
    # (Padding counts in a mean square: little of it in the last of many blocks, too much where there is but one.)
    block = min(block, x.size)
    blocks = np.pad(x, (0, -x.size % block)).reshape(-1, block)
    scales = bf16_round_up(scale(blocks, levels).astype(np.float32))
    scales = np.where(scales >= SMALLEST_SCALE, scales, np.float32(0))
    return scales, blocks * _inverse(scales)[:, None]


def _encoded(elements: int, bits: int, scales: F32, codes: Codes, values: F32) -> Encoded:
    """Of codes and the levels that they stand for, both (blocks, block); padding is cut off."""
    stored, codes = (scales.view(np.uint32) >> 16).astype("<u2"), codes.reshape(-1)[:elements]
    payload = codes
    if bits <= 4:
        nibbles = np.append(codes, np.zeros(elements % 2, np.uint8))
        payload = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    return Encoded(
        (np.concatenate((stored.view(np.uint8), payload)),),
        16 * stored.size + bits * elements,
        entropy_bits(stored) + entropy_bits(codes),
        (values * scales[:, None]).reshape(-1)[:elements].astype(np.float32),
    )


# -- codebooks


def middles(levels: F32) -> Codebook:
    """Each value has the nearest level."""
    return Codebook(levels, ((levels[1:] + levels[:-1]) / 2).astype(np.float32))


def fit(values: F32, count: int, price: float = 0.0) -> Codebook:
    """The `count` levels that represent `values` with the least squared error, from an even grid on (Lloyd 1982, Max
    1960). With a `price`, in squared error for a bit of an ideal entropy coder, the least sum of error and cost (Chou,
    Lookabaugh and Gray 1989); levels that nothing has any more are dropped."""
    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    levels: F64 = np.linspace(ordered[0], ordered[-1], 2 * count + 1)[1::2]
    bounds = (levels[1:] + levels[:-1]) / 2
    for _ in range(FIT_ROUNDS):
        cuts = np.concatenate(([0], np.searchsorted(ordered, np.maximum.accumulate(bounds)), [ordered.size]))
        counts = np.diff(cuts)
        kept = counts > 0
        levels, counts = np.diff(sums[cuts])[kept] / counts[kept], counts[kept]
        bits = np.log2(ordered.size / counts)
        bounds = (levels[1:] + levels[:-1]) / 2 + price * np.diff(bits) / np.diff(levels) / 2
    return Codebook(levels.astype(np.float32), np.maximum.accumulate(bounds).astype(np.float32))


def fitted(x: F32, count: int, block: int, scale: Scale, price: float = 0.0) -> Quantiser:
    """The quantiser whose codebook fits what blocks of `x` are like, normalised; `price` as for `fit`."""
    v = _normalised(x, block, scale, 1)[1].reshape(-1)[: x.size]
    sample = v if v.size <= FIT_SAMPLE else np.random.default_rng(0).choice(v, FIT_SAMPLE, replace=False)
    return by_codebook(fit(sample, count, price), block, scale)


# -- production


def production(codec: Codec) -> Quantiser:
    """The codec itself. Symbols are its codes, or, of topk2, whose sections are bit strings, their bytes."""

    def encode(x: F32, random: Generator) -> Encoded:
        raw = codec.encode(x)
        ideal = entropy_bits(raw)
        if isinstance(codec, Dense):
            scales, payload = codec.split(raw, x.size)
            codes = payload
            if payload.size < x.size:
                codes = np.stack((payload & 15, payload >> 4), axis=1).reshape(-1)[: x.size]
            ideal = entropy_bits(scales) + entropy_bits(codes)
        return Encoded((raw,), 8 * raw.size, ideal, codec.decode(raw, x.size))

    return encode


def scales_apart(codec: Dense) -> Quantiser:
    """The codec, but scales are a frame of their own, all low bytes before all high ones: a frame has one table of
    code lengths for up to 128 KiB, and what is frequent among scales is not what is frequent among codes."""
    whole = production(codec)

    def encode(x: F32, random: Generator) -> Encoded:
        encoded = whole(x, random)
        scales, payload = codec.split(encoded.frames[0], x.size)
        planes = np.ascontiguousarray(scales.view(np.uint8).reshape(-1, 2).T).reshape(-1)
        return replace(encoded, frames=(planes, payload))

    return encode
