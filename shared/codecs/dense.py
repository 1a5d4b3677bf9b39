"""Codecs that have a few bits for every element."""

from __future__ import annotations

import numpy as np

from shared.codecs import kernels
from shared.codecs.codec import NOTHING, Codec, refuse_flaw
from shared.codecs.kernels import BLOCK, F32, U8, U16


class Dense(Codec):
    """A codec that has `bits` for every element: floats, or integers (and `kind` INT8 or above) with a bf16 scale for
    each block of 64. All scales come first.

    `step` is for encoding alone: the least step of an integer grid, in root mean squares of its block. What is coarser
    than its largest value needs costs fewer bytes once zstd has been over it, and error feedback keeps what is lost.
    """

    def __init__(self, name: str, kind: int, bits: int, step: float = 0.0) -> None:
        self.name, self.kind, self.step, self._bits = name, kind, np.float32(step), bits
        self._scaled = kind >= kernels.INT8

    def size(self, elements: int) -> int:
        return 2 * self._blocks(elements) + (elements * self._bits + 7) // 8

    def cut(self, elements: int) -> int:
        """Where the payload begins."""
        return 2 * self._blocks(elements)

    def split(self, raw: U8, elements: int) -> tuple[U16, U8]:
        """The scales (bf16 bits) and the payload of a chunk's raw bytes, as views."""
        cut = self.cut(elements)
        return raw[:cut].view("<u2"), raw[cut:]

    def encode(self, x: F32, target: F32 | None = None, sign: float = 1.0) -> U8:
        raw = np.empty(self.size(x.size), dtype=np.uint8)
        into = NOTHING if target is None else target
        split = self.split(raw, x.size)
        self.require_sound(kernels.encode(self.kind, self.step, x, *split, into, np.float32(sign)))
        return raw

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        kernels.accumulate(self.kind, *self.split(raw, acc.size), np.float32(weight), acc)

    def screen(self, raw: U8, elements: int) -> float:
        flaw, squares = kernels.screen(self.kind, *self.split(raw, elements), elements)
        if self._scaled:
            refuse_flaw(flaw, "scale", squares, float(kernels.reach_of(self.kind)))
        else:
            refuse_flaw(flaw, "value", squares)
        return float(squares)

    def with_step(self, step: float) -> Dense:
        """The same codec, encoding with another least step."""
        return Dense(self.name, self.kind, self._bits, step)

    def _blocks(self, elements: int) -> int:
        return -(-elements // BLOCK) if self._scaled else 0


DENSE: dict[str, Dense] = {
    codec.name: codec
    for codec in (
        Dense("fp32", kernels.FP32, 32),
        Dense("bf16", kernels.BF16, 16),
        Dense("fp16", kernels.FP16, 16),
        Dense("int8", kernels.INT8, 8),
        Dense("int4", kernels.INT4, 4),
        Dense("e3m0", kernels.E3M0, 4),
    )
}
