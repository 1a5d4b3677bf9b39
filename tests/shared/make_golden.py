"""The golden containers: one small fragment in every codec, and how to write their files anew.

    python -m tests.shared.make_golden

For each codec: `CODEC.raw` and `CODEC.zstd` (containers with zstd off and at level 1) and `CODEC.f32` (what both
decode to, little-endian fp32). A changed file is a changed wire format: raise the format version in `shared.wire`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.fragments import CHUNK_ELEMENTS, Fragment, TensorSpec
from shared.wire import Header, encode_flat, open_container, tensor_table

GOLDEN = Path(__file__).parent / "golden"
CODEC_NAMES = ("fp32", "bf16", "fp16", "int8", "int4", "e3m0", "topk2-256")
FRAGMENT = Fragment(
    2, (TensorSpec("blocks.0.bias", (67,)), TensorSpec("blocks.0.scale", ()), TensorSpec("head.weight", (3, 43)))
)


def values() -> NDArray[np.float32]:
    """The fragment's flat vector: exact in fp32 and made of integers, so the same on every machine."""
    i = np.arange(FRAGMENT.size, dtype=np.int64)
    flat = ((i * 37 % 101 - 50) / 64).astype(np.float32)
    flat[67] = -1.5  # the scalar
    flat[68:132] = 0  # a block of zeros …
    flat[132:136] = [65504, -65504, 0.1, 1e-40]  # … and one with extremes
    return flat


def header(codec: str, zstd: bool) -> Header:
    return Header(
        kind="contribution",
        run="golden-0123456789abcdef",
        site="eu-west",
        fragment=FRAGMENT.index,
        base_version=7,
        version=7,
        digest="00112233445566778899aabbccddeeff",
        codec=codec,
        zstd=zstd,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(FRAGMENT),
        tokens=123_456,
        steps=50,
        sizes=[],
    )


def container(codec: str, zstd_level: int) -> bytes:
    return encode_flat(header(codec, zstd_level > 0), FRAGMENT, values(), zstd_level)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for codec in CODEC_NAMES:
        raw = container(codec, 0)
        (GOLDEN / f"{codec}.raw").write_bytes(raw)
        (GOLDEN / f"{codec}.zstd").write_bytes(container(codec, 1))
        (GOLDEN / f"{codec}.f32").write_bytes(open_container(raw, FRAGMENT).decode().astype("<f4").tobytes())


if __name__ == "__main__":
    main()
