"""Every numba kernel gives the bits of its plain form in `shared.codecs.reference`."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.codecs import CODECS, DENSE, grid, kernels, reference

F32 = NDArray[np.float32]
LENGTHS = (0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 200)
WEIGHTS = (1.0, -1.0, 0.0, 1 / 3, 0.7, 1e-30, 3e5)
quick = settings(max_examples=60)
LEVELS = {"int8": 127, "int4": 7}


def from_bits(bits: NDArray[np.uint32]) -> F32:
    """Any bits as finite fp32: what would be NaN or infinite gets the largest exponent instead."""
    over = (bits & 0x7F800000) == 0x7F800000
    return np.where(over, bits ^ np.uint32(0x00800000), bits).astype(np.uint32).view(np.float32)


def any_bits(n: int) -> st.SearchStrategy[NDArray[np.uint32]]:
    return st.binary(min_size=4 * n, max_size=4 * n).map(lambda data: np.frombuffer(data, np.uint32).copy())


@st.composite
def any_finite(draw: st.DrawFn) -> F32:
    """Finite fp32 of awkward lengths: every exponent, denormals, both zeros; or one exponent band, as real data are."""
    n = draw(st.sampled_from(LENGTHS))
    bits = draw(any_bits(n))
    if draw(st.booleans()):
        band = draw(st.integers(0, 254))
        bits = (bits & np.uint32(0x807FFFFF)) | np.uint32(band << 23)
    x = from_bits(bits)
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 1e-45, -1e-40]), max_size=4)):
        if n:
            x[draw(st.integers(0, n - 1))] = np.float32(special)
    return x


def assert_same_bits(got: F32, wanted: F32) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def section(scale: F32, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([(scale.view(np.uint32) >> 16).astype("<u2").view(np.uint8), payload])


def reference_decode(name: str, raw: NDArray[np.uint8], n: int) -> F32:
    """Raw bytes decoded from the formats' definitions in codecs/__init__.py, with NumPy alone."""
    if name == "fp32":
        return raw.view("<f4").copy()
    if name == "bf16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name == "fp16":
        return raw.view("<f2").astype(np.float32)
    blocks = math.ceil(n / 64)
    scale = (raw[: 2 * blocks].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    payload = raw[2 * blocks :]
    if name == "int8":
        return reference.dequantise(scale, payload.view(np.int8))
    nibbles = np.stack([payload & 15, payload >> 4], axis=1).reshape(-1)[:n].astype(np.int8)
    return reference.dequantise(scale, nibbles - np.int8(8) if name == "int4" else reference.e3m0_integers(nibbles))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("step", [0.0, 0.25, 1.0, 3.0])
@given(x=any_finite())
@quick
def test_integer_encoding_has_the_bits_of_the_reference(name: str, step: float, x: F32) -> None:
    x = np.clip(x, -1e36, 1e36)  # beyond, encoding refuses
    scale, q = reference.quantise(x, LEVELS[name], step)
    payload = q.view(np.uint8) if name == "int8" else reference.pack_nibbles(q + 8, 8)
    np.testing.assert_array_equal(grid(name, step).encode(x), section(scale, payload))


@given(x=any_finite())
@quick
def test_e3m0_encoding_has_the_bits_of_the_reference(x: F32) -> None:
    scale, codes = reference.quantise_e3m0(np.clip(x, -1e36, 1e36))
    wanted = section(scale, reference.pack_nibbles(codes, 0))
    np.testing.assert_array_equal(CODECS["e3m0"].encode(np.clip(x, -1e36, 1e36)), wanted)


@given(x=any_finite())
@quick
def test_fp16_encoding_has_the_bits_of_numpy(x: F32) -> None:
    wanted = np.clip(x, -65504, 65504).astype("<f2")
    np.testing.assert_array_equal(CODECS["fp16"].encode(x).view("<u2"), wanted.view("<u2"))


def test_every_fp16_decodes_as_numpy_says() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    wanted = bits.view("<f2").astype(np.float32)
    finite = np.isfinite(wanted)
    got = CODECS["fp16"].decode(bits[finite].view(np.uint8), int(finite.sum()))
    assert_same_bits(got + 0.0, wanted[finite] + 0.0)


@given(x=any_finite())
@quick
def test_bf16_encoding_has_the_bits_of_the_reference(x: F32) -> None:
    bits = CODECS["bf16"].encode(x).view("<u2").astype(np.uint32) << np.uint32(16)
    assert_same_bits(bits.view(np.float32), reference.round_bf16(x))


@given(x=any_finite())
@quick
def test_bf16_rounds_as_torch_does_where_it_does_not_clip(x: F32) -> None:
    rounded = torch.from_numpy(x.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    kept = np.isfinite(rounded)
    assert_same_bits(CODECS["bf16"].decode(CODECS["bf16"].encode(x), x.size)[kept] + 0.0, rounded[kept] + 0.0)


@pytest.mark.parametrize("name", sorted(DENSE))
@given(x=any_finite(), weight=st.sampled_from(WEIGHTS), data=st.data())
@quick
def test_accumulation_rounds_after_every_operation_as_numpy_does(
    name: str, x: F32, weight: float, data: st.DataObject
) -> None:
    x = np.clip(x, -1e30, 1e30)
    raw = CODECS[name].encode(x)
    start = np.clip(from_bits(data.draw(any_bits(x.size))), -1e36, 1e36).astype(np.float32)
    acc = start.copy()
    CODECS[name].accumulate(raw, weight, acc)
    assert_same_bits(acc, start + np.float32(weight) * reference_decode(name, raw, x.size))


@pytest.mark.parametrize("name", sorted(DENSE))
def test_accumulation_never_fuses_multiply_and_add(name: str) -> None:
    """acc = −round(w·v): two roundings give exactly 0, a fused multiply-add the product's rounding error."""
    codec, weight = CODECS[name], np.float32(1 / 3)
    x = (np.arange(1, 330, dtype=np.float32) * np.float32(0.37)).astype(np.float32)
    raw = codec.encode(x)
    values = reference_decode(name, raw, x.size)
    acc = -(weight * values)
    fused = np.float64(weight) * values.astype(np.float64) + acc.astype(np.float64)  # exact: 24 + 24 bits fit in 53
    assert np.count_nonzero(fused) > x.size // 2
    codec.accumulate(raw, float(weight), acc)
    assert_same_bits(np.abs(acc), np.zeros_like(acc))


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "int4", "e3m0"])
@given(x=any_finite())
@quick
def test_an_anchor_moves_by_the_same_bits_fused_or_not(name: str, x: F32) -> None:
    """With weight 1 the product is exact (an integer below 2⁷ times 8 bits of scale), so one rounding is left."""
    x = np.clip(x, -1e30, 1e30)
    raw = CODECS[name].encode(x)
    anchor = np.linspace(-3, 3, x.size, dtype=np.float32)
    exact = anchor.astype(np.float64) + reference_decode(name, raw, x.size).astype(np.float64)
    wide = np.abs(anchor) > 1e-3
    moved = anchor.copy()
    CODECS[name].accumulate(raw, 1.0, moved)
    near = wide & (np.abs(exact) > 1e-3) & (np.abs(exact) < 1e3)
    assert_same_bits(moved[near], exact[near].astype(np.float32))


def test_square_sum_does_not_overflow_or_lose_small_terms() -> None:
    assert kernels.square_sum(np.full(3, 1e30, np.float32)) == pytest.approx(3e60, rel=1e-6)
    x = np.full(100_001, 1e-4, np.float32)
    x[0] = 1e3
    assert kernels.square_sum(x) == pytest.approx(math.fsum(float(v) ** 2 for v in x), rel=1e-9)
    assert kernels.square_sum(np.zeros(0, np.float32)) == 0.0


@given(any_finite())
@quick
def test_square_sum_has_the_bits_of_the_reference(x: F32) -> None:
    assert kernels.square_sum(x) == reference.square_sum(x)


def test_warm_up_leaves_nothing_to_compile_for_the_first_round() -> None:
    """Sections arrive as read-only bytes, which numba compiles for separately. In a process of its own."""
    script = """
import numpy as np
from shared.codecs import CODECS, kernels, topk_kernels, warm_up
warm_up()
found = [*vars(kernels).items(), *vars(topk_kernels).items()]
compiled = [(name, kernel, len(kernel.signatures)) for name, kernel in found if hasattr(kernel, "signatures")]
x = np.linspace(-1, 1, 65, dtype=np.float32)
for codec in CODECS.values():
    section = np.frombuffer(codec.encode(x).tobytes(), dtype=np.uint8)
    codec.screen(section, x.size)
    codec.encode(x, x.copy(), -1.0)
    codec.decode(section, x.size)
    codec.accumulate(section, 0.5, x.copy())
later = [name for name, kernel, count in compiled if len(kernel.signatures) != count]
print(",".join(later))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
