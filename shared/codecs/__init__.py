"""Codecs: how a chunk of fp32 values becomes the raw bytes of a wire section, and back.

A codec sees one chunk at a time (fp32, contiguous, at most 2²⁰ elements) and knows nothing of
compression or framing. `accumulate` is the only decoder: the merge adds `weight ·` values into its sum,
and an anchor moves by `accumulate(raw, 1, anchor)`, the same arithmetic at the coordinator and every site.

    codec   raw bytes/element   scale                    largest error of an element
    fp32    4                   –                        0
    bf16    2                   –                        2⁻⁸ of it
    fp16    2                   –                        2⁻¹¹ of it (beyond ±65504: clipped)
    int8    1 + 1/32            bf16 per block of 64     half a step, max|block|/127 (rounded up to bf16)
    int4    1/2 + 1/32          bf16 per block of 64     half a step, max|block|/7 (rounded up to bf16)

The integer codecs are symmetric. Their scale is rounded *up* to bf16, so the block's largest value never
clips, and costs 2 bytes where fp32 would cost 4 for no measurable loss (tests/shared/codecs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from shared.codecs import kernels
from shared.codecs.kernels import BLOCK, F32, U8, U16
from shared.errors import FormatError

_INFINITY_BITS = np.uint32(0x7F800000)
_LARGEST_SCALE = np.finfo(np.float32).max / np.float32(128)
"""Beyond any weight that training could survive, and small enough that no value or sum of values overflows."""
_SMALLEST_NORMAL = np.float32(2.0**-126)


class Codec(ABC):
    """Raw bytes of a chunk. `encode` raises ValueError on NaN or infinity; `check` raises FormatError."""

    name: str

    @abstractmethod
    def size(self, elements: int) -> int:
        """Raw bytes of a chunk of `elements`."""

    @abstractmethod
    def encode(self, x: F32) -> U8:
        """fp32 (n,) to raw bytes (size(n),)."""

    @abstractmethod
    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        """acc += weight · decoded, in place; acc is fp32 (n,), raw has size(n) bytes."""

    @abstractmethod
    def check(self, raw: U8, elements: int) -> None:
        """Raises FormatError unless `raw` decodes to finite values only."""

    def decode(self, raw: U8, elements: int) -> F32:
        """Raw bytes to fp32 (elements,)."""
        out = np.zeros(elements, dtype=np.float32)
        self.accumulate(raw, 1.0, out)
        return out


class Fp32(Codec):
    name = "fp32"

    def size(self, elements: int) -> int:
        return 4 * elements

    def encode(self, x: F32) -> U8:
        _require_finite(x)
        return x.astype("<f4", copy=True).view(np.uint8)

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        kernels.accumulate_fp32(raw.view("<f4"), np.float32(weight), acc)

    def check(self, raw: U8, elements: int) -> None:
        _check_floats(raw.view("<u4"), np.uint32(_INFINITY_BITS))


class Bf16(Codec):
    name = "bf16"

    def size(self, elements: int) -> int:
        return 2 * elements

    def encode(self, x: F32) -> U8:
        _require_finite(x)
        out = np.empty(x.size, dtype="<u2")
        kernels.encode_bf16(x.view(np.uint32), out)
        return out.view(np.uint8)

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        scratch = np.empty(acc.size, dtype=np.uint32)
        kernels.accumulate_bf16(raw.view("<u2"), scratch, scratch.view(np.float32), np.float32(weight), acc)

    def check(self, raw: U8, elements: int) -> None:
        _check_floats(raw.view("<u2"), np.uint16(0x7F80))


class Fp16(Codec):
    name = "fp16"

    def size(self, elements: int) -> int:
        return 2 * elements

    def encode(self, x: F32) -> U8:
        _require_finite(x)
        return np.clip(x, -65504, 65504).astype("<f2").view(np.uint8)

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        kernels.accumulate_fp32(raw.view("<f2").astype(np.float32), np.float32(weight), acc)

    def check(self, raw: U8, elements: int) -> None:
        _check_floats(raw.view("<u2"), np.uint16(0x7C00))


class _Blocks(Codec):
    """Symmetric integers with one bf16 scale per block of 64; all scales first, then the integers."""

    levels: int

    def size(self, elements: int) -> int:
        return 2 * _blocks(elements) + self._payload(elements)

    @abstractmethod
    def _payload(self, elements: int) -> int: ...

    def _scales(self, x: F32) -> tuple[U16, F32]:
        """The scale of each block as bf16 bits, and its inverse; 0 and 0 for a block of (near) zeros."""
        largest = np.empty(_blocks(x.size), dtype=np.uint32)
        kernels.block_max_bits(x.view(np.uint32), largest)
        if largest.size and largest.max() >= _INFINITY_BITS:
            raise ValueError("a value to encode is NaN or infinite")
        scale = largest.view(np.float32) / np.float32(self.levels)
        bits = (scale.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
        scale = (bits << np.uint32(16)).view(np.float32)
        if scale.size and scale.max() > _LARGEST_SCALE:
            raise ValueError(f"a value to encode is too large for {self.name}")
        usable = scale >= _SMALLEST_NORMAL
        bits[~usable] = 0
        inverse = np.zeros_like(scale)
        np.divide(np.float32(1), scale, out=inverse, where=usable)
        return bits.astype("<u2"), inverse

    def _split(self, raw: U8, elements: int) -> tuple[F32, U8]:
        cut = 2 * _blocks(elements)
        return (raw[:cut].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32), raw[cut:]

    def check(self, raw: U8, elements: int) -> None:
        scale, _ = self._split(raw, elements)
        if not bool(np.isfinite(scale).all()):
            raise FormatError("a scale is NaN or infinite")
        if bool(np.signbit(scale).any()):
            raise FormatError("a scale is negative")
        if scale.size and scale.max() > _LARGEST_SCALE:
            raise FormatError("a scale is so large that its values overflow")


class Int8(_Blocks):
    name = "int8"
    levels = 127

    def _payload(self, elements: int) -> int:
        return elements

    def encode(self, x: F32) -> U8:
        bits, inverse = self._scales(x)
        q = np.empty(x.size, dtype=np.int8)
        kernels.quantise_int8(x, inverse, q)
        return np.concatenate([bits.view(np.uint8), q.view(np.uint8)])

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        scale, q = self._split(raw, acc.size)
        kernels.accumulate_int8(q.view(np.int8), scale, np.float32(weight), acc)


class Int4(_Blocks):
    name = "int4"
    levels = 7

    def _payload(self, elements: int) -> int:
        return (elements + 1) // 2

    def encode(self, x: F32) -> U8:
        bits, inverse = self._scales(x)
        packed = np.empty(self._payload(x.size), dtype=np.uint8)
        kernels.quantise_int4(x, inverse, packed)
        return np.concatenate([bits.view(np.uint8), packed])

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        scale, packed = self._split(raw, acc.size)
        kernels.accumulate_int4(packed, scale, np.float32(weight), acc)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Bf16(), Fp16(), Int8(), Int4())}


def warm_up() -> None:
    """Compile (or load from the cache) every kernel now, so that no round pays for it.

    A section comes from a file as read-only bytes, which numba compiles for by themselves.
    """
    x = np.ones(BLOCK + 1, dtype=np.float32)
    for codec in CODECS.values():
        raw = codec.encode(x)
        codec.decode(raw, x.size)
        codec.decode(np.frombuffer(raw.tobytes(), dtype=np.uint8), x.size)
    kernels.square_sum(x)


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _require_finite(x: F32) -> None:
    if not bool(np.isfinite(x).all()):
        raise ValueError("a value to encode is NaN or infinite")


def _check_floats(bits: U16 | np.typing.NDArray[np.uint32], infinity: np.uint16 | np.uint32) -> None:
    if bool(((bits & infinity) == infinity).any()):
        raise FormatError("a value is NaN or infinite")
