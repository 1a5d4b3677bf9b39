"""Sections of one chunk that no honest encoder makes, of every kind and codec, for the tests of whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shared.codecs import CODECS, TopK, codec_named, reference
from shared.codecs.kernels import F32

ELEMENTS = 300
TOPK = "topk2-256"
KEPT = 19
"""How many of 300 elements topk2-256 sends: ⌈256 · 300 / 4096⌉."""
LARGEST = 0x4980
"""The bf16 bits of 2²⁰, the largest value that a screening lets through."""
TOO_LARGE = {"int8": (0x4601, "8256"), "int4": (0x4801, "132096"), "e3m0": (0x4681, "16512")}
"""Of the block codecs the bits of the bf16 after the scale with which values reach 2²⁰, and what they are."""


@dataclass(frozen=True)
class Bad:
    """A section's raw bytes (of ELEMENTS elements in `codec`), and what a refusal says after "section N"."""

    codec: str
    kind: str
    raw: bytes
    says: str

    def __str__(self) -> str:
        return f"{self.codec}, {self.kind}"


def sound(codec: str, elements: int = ELEMENTS) -> bytes:
    return codec_named(codec).encode(_values(elements)).tobytes()


def _values(elements: int) -> F32:
    return np.linspace(-1, 1, elements, dtype=np.float32)


def bad_sections() -> list[Bad]:
    return [*_floats(), *_blocks(), *_topk(), *_lengths()]


def _floats() -> Iterator[Bad]:
    """The last value of a section of floats."""
    no_number, nearly, far = "is NaN or infinite", "is absurd: no training survives", "of 1.12589991e+15 is absurd"
    for codec, width, bits, says in (
        ("fp32", 4, 0x7FC00000, no_number),
        ("fp32", 4, 0xFF800000, no_number),
        ("fp32", 4, 0x49800001, f"of 1048576.12 {nearly}"),
        ("fp32", 4, 0xC9800001, f"of 1048576.12 {nearly}"),
        ("fp32", 4, 0x58800000, far),
        ("bf16", 2, 0x7FC0, no_number),
        ("bf16", 2, 0xFF80, no_number),
        ("bf16", 2, 0x4981, f"of 1056768 {nearly}"),
        ("bf16", 2, 0xC981, f"of 1056768 {nearly}"),
        ("bf16", 2, 0x5880, far),
        ("fp16", 2, 0x7E00, no_number),
        ("fp16", 2, 0xFC00, no_number),
    ):
        raw = sound(codec)[:-width] + bits.to_bytes(width, "little")
        yield Bad(codec, f"a value of bits {bits:x}", raw, f": a value {says}")


def _blocks() -> Iterator[Bad]:
    """The scale of the third block of 64."""
    for codec, (first, number) in TOO_LARGE.items():
        for kind, bits, says in (
            ("NaN", 0x7FC0, "is NaN or infinite"),
            ("infinite", 0x7F80, "is NaN or infinite"),
            ("negative", 0xBF80, "is negative"),
            ("absurd", 0x5880, "of 1.12589991e+15 is absurd"),
            ("just absurd", first, f"of {number} is absurd and makes values of up to 1056768: no training"),
            ("overflowing", 0x7F7F, "of 3.38953139e+38 is absurd"),
        ):
            raw = bytearray(sound(codec))
            raw[4:6] = bits.to_bytes(2, "little")
            yield Bad(codec, f"a scale that is {kind}", bytes(raw), f": a scale {says}")


def _topk() -> Iterator[Bad]:
    """topk2-256; of the places every 15th is sent but for what is said."""
    places = [15 * n for n in range(KEPT)]
    not_in_order = [*places[:7], places[8], places[7], *places[9:]]
    for kind, raw, says in (
        ("indices out of order", topk(not_in_order), "its indices are not in order"),
        ("an index twice", topk([*places[:7], places[8], *places[8:]]), "its indices are not in order"),
        ("an index out of range", topk([*places[:-1], ELEMENTS]), "an index is beyond its block"),
        ("the largest index", topk([*places[:-1], 4095]), "an index is beyond its block"),
        ("a gap out of range", topk([*places[:-1], ELEMENTS], mode=3), "an index is beyond its block"),
        ("an unknown mode", topk(places)[:4] + bytes([12]) + topk(places)[5:], "a block's indices are coded in a way"),
        ("a byte too few", topk(places, mode=3)[:-1], "its indices do not end where it does"),
        ("a byte too many", topk(places, mode=3) + b"\0", "its indices do not end where it does"),
        ("a NaN level", topk(places, low=0x7FC0), "a level is NaN or infinite"),
        ("an infinite level", topk(places, high=0x7F80), "a level is NaN or infinite"),
        ("a negative level", topk(places, low=0xBF80), "a level is negative"),
        ("levels out of order", topk(places, low=0x4000, high=0x3F80), "its low level is above the high one"),
        ("a level just absurd", topk(places, high=LARGEST + 1), "a level of 1056768 is absurd: no"),
        ("absurd levels", topk(places, low=0x5880, high=0x5880), "a level of 1.12589991e+15 is absurd"),
    ):
        yield Bad(TOPK, kind, raw, f": {says}")


def topk(indices: Sequence[int], mode: int = 255, low: int = 0x3F80, high: int = 0x4000) -> bytes:
    """A section of topk2-256 with these places and levels (bf16 bits); mode 255 are plain indices."""
    bits = reference.topk_bits(list(indices), mode)
    packed = np.packbits([int(bit) for bit in bits], bitorder="little").tobytes()
    return np.array([low, high], "<u2").tobytes() + bytes([mode]) + bytes((KEPT + 3) // 4) + packed


def _lengths() -> Iterator[Bad]:
    """Sections of too few or too many bytes, and those of other codecs."""
    for codec in CODECS.values():
        least, most = codec.least(ELEMENTS), codec.size(ELEMENTS)
        yield Bad(codec.name, "too short", sound(codec.name)[: least - 1], f" claims {least - 1} ")
        yield Bad(codec.name, "too long", sound(codec.name).ljust(most + 1, b"\0"), f" claims {most + 1} ")
    yield Bad("int4", "int8 inside", sound("int8"), " claims ")
    other = TopK(8)
    yield Bad(TOPK, "topk2-8 inside", other.encode(_values(ELEMENTS)).tobytes(), " claims ")
