"""topk2: of every block of 4096 elements the k largest, in two bits each (SparseLoCo, arXiv 2508.15706).

The four values of a block are ±low and ±high, two magnitudes that fit its k largest best. What is not sent
stays at the site as error feedback. Where the elements lie is as dear as what they are: a sorted list of
gaps costs about 6.5 bits an element at k = 128 (12 as plain indices), in a Rice code whose parameter each block
chooses.

Raw bytes of a chunk of n elements, in b = ⌈n/4096⌉ blocks of m (4096, the last one what is left), of which a block
keeps ⌈k·m/4096⌉:

    levels      b × (low, high), bf16 bits, little endian, 0 ≤ low ≤ high
    modes       b bytes: the Rice parameter r (0 to 11), or 255 for plain 12-bit indices
    values      of each block its kept elements in order, two bits each (1: high, 2: negative), four a byte, the first
                one in the low bits
    indices     of each block its bits, low bits first, padded to a byte: for each kept element either 12 bits, or its
                distance g from the one before it (less one): g >> r ones, a zero, and the r low bits of g
"""

from __future__ import annotations

import numpy as np

from shared.codecs import topk_kernels as kernels
from shared.codecs.codec import NOTHING, Codec, refuse_flaw
from shared.codecs.kernels import F32, I32, U8
from shared.codecs.topk_kernels import BLOCK

MOST_KEPT = 1024


class TopK(Codec):
    """topk2 with `k` of each 4096 elements. A section's raw size depends on where its elements lie."""

    def __init__(self, k: int) -> None:
        if not 1 <= k <= MOST_KEPT:
            raise ValueError(f"k is from 1 to {MOST_KEPT}, not {k}")
        self.name, self.k = f"topk2-{k}", k

    def size(self, elements: int) -> int:
        return self._raw_size(elements, 12)

    def least(self, elements: int) -> int:
        return self._raw_size(elements, 1)

    def _raw_size(self, elements: int, index_bits: int) -> int:
        """With so many bits for each index."""
        whole, rest = divmod(elements, BLOCK)
        total = whole * _block_bytes(self.k, index_bits)
        return total + (_block_bytes(kernels.kept(self.k, rest), index_bits) if rest else 0)

    def encode(self, x: F32, target: F32 | None = None, sign: float = 1.0) -> U8:
        raw = np.empty(self.size(x.size), dtype=np.uint8)
        into = NOTHING if target is None else target
        flaw, used = kernels.encode(self.k, x, raw, into, np.float32(sign))
        self.require_sound(flaw)
        return raw[:used]

    def write(self, indices: I32, values: F32, elements: int) -> tuple[U8, F32]:
        """The raw bytes of a chunk whose blocks' k largest were found elsewhere (their places in order and their
        values, int32 and fp32 (blocks, k)), and what they decode to, fp32 (blocks, k). A short last block keeps fewer,
        which come first. Raises ValueError as `encode`."""
        raw, decoded = np.empty(self.size(elements), dtype=np.uint8), np.empty_like(values)
        flaw, used = kernels.write(self.k, elements, indices, values, raw, decoded)
        self.require_sound(flaw)
        return raw[:used], decoded

    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        kernels.accumulate(self.k, raw, np.float32(weight), acc)

    def screen(self, raw: U8, elements: int) -> float:
        flaw, squares = kernels.screen(self.k, raw, elements)
        refuse_flaw(flaw, "level", squares)
        return float(squares)


def _block_bytes(kept: int, index_bits: int) -> int:
    return 4 + 1 + (kept + 3) // 4 + (kept * index_bits + 7) // 8
