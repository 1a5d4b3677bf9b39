"""What a codec promises: its size, its error, what it refuses, and that nothing it lets through is not finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared.codecs import CODECS, grid, kernels
from shared.errors import FormatError
from shared.wire import pack_section

F32 = NDArray[np.float32]
DENSE_NAMES = ["fp32", "bf16", "fp16", "int8", "int4", "e3m0"]
TOPK = "topk2-256"
ALL = [*DENSE_NAMES, TOPK]
SCALED = ["int8", "int4", "e3m0"]
quick = settings(max_examples=60)
LEVELS = {"int8": 127, "int4": 7}
LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000]


def roundtrip(name: str, x: F32) -> F32:
    return CODECS[name].decode(CODECS[name].encode(x), x.size)


def raw_with_scale(name: str, bits: int) -> NDArray[np.uint8]:
    """A raw chunk of 65 ones whose second scale is `bits`."""
    raw = CODECS[name].encode(np.ones(65, np.float32))
    raw[2:4] = np.array([bits], "<u2").view(np.uint8)
    return raw


@st.composite
def values(draw: st.DrawFn) -> F32:
    """fp32 below 2¹⁰⁰ of awkward lengths, within a few powers of two of each other or all over the range."""
    n = draw(st.sampled_from(LENGTHS[:-1]))
    bits = np.frombuffer(draw(st.binary(min_size=4 * n, max_size=4 * n)), np.uint32)
    low, width = draw(st.integers(0, 226)), draw(st.sampled_from([1, 4, 226]))
    exponent = np.minimum(low + (bits >> 23 & 0xFF) % width, 226).astype(np.uint32)
    x = ((bits & np.uint32(0x807FFFFF)) | (exponent << np.uint32(23))).view(np.float32)
    x[draw(st.integers(0, n)) :] *= draw(st.sampled_from([0, 1]))
    return x


def test_the_codecs_are_those_of_the_design() -> None:
    assert sorted(CODECS) == sorted(ALL)
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("fp32", [0, 4, 252, 256, 260]),
        ("bf16", [0, 2, 126, 128, 130]),
        ("fp16", [0, 2, 126, 128, 130]),
        ("int8", [0, 3, 65, 66, 69]),
        ("int4", [0, 3, 34, 34, 37]),
        ("e3m0", [0, 3, 34, 34, 37]),
    ],
)
def test_raw_size_is_known_from_the_count(name: str, sizes: list[int]) -> None:
    counts = [0, 1, 63, 64, 65]
    assert [CODECS[name].size(n) for n in counts] == sizes
    assert [CODECS[name].encode(np.ones(n, np.float32)).size for n in counts] == sizes


@pytest.mark.parametrize(
    ("name", "bar"),
    [("fp32", 1e-300), ("fp16", 5e-8), ("bf16", 8e-4), ("int8", 3.7e-5), ("int4", 1.25e-2), ("e3m0", 3.7e-2)],
)
def test_mean_squared_error_on_normal_values_meets_the_published_bar(name: str, bar: float) -> None:
    x = np.random.default_rng(0).standard_normal(1 << 17).astype(np.float32)
    error = roundtrip(name, x).astype(np.float64) - x
    assert float(np.mean(error**2)) < bar
    if name != "fp32":
        assert abs(float(np.mean(error))) < 4 * float(np.std(error)) / np.sqrt(x.size)  # no bias


@given(values())
@quick
def test_fp32_loses_nothing(x: F32) -> None:
    np.testing.assert_array_equal(roundtrip("fp32", x), x)


@pytest.mark.parametrize(("name", "relative", "absolute"), [("bf16", 2.0**-8, 2.0**-134), ("fp16", 2.0**-11, 2.0**-25)])
@given(x=values())
@quick
def test_float_codecs_err_by_half_a_unit_in_the_last_place(name: str, relative: float, absolute: float, x: F32) -> None:
    if name == "fp16":
        x = np.clip(x, -65504, 65504)
    error = np.abs(roundtrip(name, x).astype(np.float64) - x)
    assert np.all(error <= np.maximum(relative * np.abs(x.astype(np.float64)), absolute))


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(x=values())
@quick
def test_integer_codecs_err_by_half_a_step_of_their_block(name: str, x: F32) -> None:
    raw, levels = CODECS[name].encode(x), LEVELS[name]
    scale = (raw[: 2 * -(-x.size // 64)].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    error = np.abs(CODECS[name].decode(raw, x.size).astype(np.float64) - x)
    for b, s in enumerate(scale.astype(np.float64)):
        block = slice(64 * b, 64 * b + 64)
        largest = float(np.abs(x[block]).max())
        if s == 0:  # a scale below the normal range is given up: the block is as good as zero
            assert largest < levels * 2.0**-126
            assert error[block].max() == largest
        else:
            assert error[block].max() <= s * (0.5 + levels * 2.0**-22)
            assert largest / levels * (1 - 2.0**-22) <= s <= largest / levels * (1 + 2.0**-7) * (1 + 2.0**-22)


@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
@given(x=values())
@quick
def test_a_coarse_grid_is_no_coarser_than_it_was_asked_for_and_clips_nothing(step: float, x: F32) -> None:
    x = np.clip(x, -1e17, 1e17)  # beyond, the squares overflow
    x[np.abs(x) < 1e-17] = 0  # and below they lose their bits
    codec = grid("int4", step)
    error = np.abs(codec.decode(codec.encode(x), x.size).astype(np.float64) - x)
    for at in range(0, x.size, 64):
        block = x[at : at + 64].astype(np.float64)
        wide = min(step * float(np.sqrt(np.mean(block**2))), float(np.abs(block).max()))
        widest = max(wide, float(np.abs(block).max()) / 7) * (1 + 2.0**-7) * (1 + 2.0**-20)
        assert error[at : at + 64].max() <= max(widest / 2, 7 * 2.0**-126) * (1 + 2.0**-20)


def test_a_coarse_grid_of_one_root_mean_square_takes_less_than_five_bits_of_eight() -> None:
    """Of int4's after zstd: three tenths of a byte in place of half a one, at seven times the squared error."""
    x = np.random.default_rng(3).standard_normal(1 << 18).astype(np.float32)
    sizes = [len(pack_section(grid("int4", step).encode(x), 1)) / x.size for step in (0.0, 1.0)]
    errors = [float(np.mean((grid("int4", s).decode(grid("int4", s).encode(x), x.size) - x) ** 2)) for s in (0.0, 1.0)]
    assert sizes[1] < 0.30 < 0.47 < sizes[0]
    assert errors[0] < 0.0125 < 0.083 < errors[1] < 0.085


def test_an_outlier_is_never_clipped_whatever_the_grid() -> None:
    x = np.zeros(64, np.float32)
    x[9] = 1e30
    assert grid("int4", 3.0).decode(grid("int4", 3.0).encode(x), 64)[9] == pytest.approx(1e30, rel=0.01)


@given(x=values())
@quick
def test_e3m0_errs_by_a_third_or_by_half_its_smallest_value(x: F32) -> None:
    raw = CODECS["e3m0"].encode(x)
    scale = (raw[: 2 * -(-x.size // 64)].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    step = np.repeat(scale.astype(np.float64), 64)[: x.size]
    error = np.abs(CODECS["e3m0"].decode(raw, x.size).astype(np.float64) - x)
    given_up = np.where(step == 0, 64 * 2.0**-126, 0)
    assert np.all(error <= np.maximum(np.maximum(np.abs(x) / 3, step / 2) * (1 + 2.0**-20), given_up))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", LENGTHS)
def test_awkward_values_roundtrip_finite(name: str, n: int) -> None:
    for value in (0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 65504.0, -65504.0, 65505.0, 1e20, -1e36):
        assert np.isfinite(roundtrip(name, np.full(n, value, np.float32))).all()


@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros(name: str) -> None:
    np.testing.assert_array_equal(roundtrip(name, np.zeros(129, np.float32)), np.zeros(129, np.float32))


def test_fp16_clips_where_it_would_overflow() -> None:
    x = np.array([65504, -65504, 65519, 65520, 1e30, -3e38], np.float32)
    assert roundtrip("fp16", x).tolist() == [65504, -65504, 65504, 65504, 65504, -65504]


def test_bf16_clips_where_it_would_round_to_infinity() -> None:
    largest = float(np.uint32(0x7F7F0000).view(np.float32))
    top = np.finfo(np.float32).max
    assert roundtrip("bf16", np.array([top, -top], np.float32)).tolist() == [largest, -largest]


def test_bf16_rounds_halves_to_even() -> None:
    # bf16 has 8 bits: next to 1 the step is 2⁻⁷
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert roundtrip("bf16", x).tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("at", [0, 63, 64, 65, 128])
def test_nan_and_infinity_are_not_encoded(name: str, value: float, at: int) -> None:
    x = np.ones(129, np.float32)
    x[at] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        CODECS[name].encode(x)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("fp32", bits) for bits in (0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000)),
        *(("bf16", bits) for bits in (0x7F80, 0xFF80, 0x7F81, 0xFFC0)),
        *(("fp16", bits) for bits in (0x7C00, 0xFC00, 0x7C01, 0xFE00)),
    ],
)
@pytest.mark.parametrize("at", [0, 64])
def test_a_float_that_is_not_finite_fails_the_check(name: str, bits: int, at: int) -> None:
    raw = CODECS[name].encode(np.ones(65, np.float32))
    width = raw.size // 65
    CODECS[name].screen(raw, 65)
    raw[at * width : (at + 1) * width] = np.array([bits], f"<u{width}").view(np.uint8)
    with pytest.raises(FormatError, match="a value is NaN or infinite"):
        CODECS[name].screen(raw, 65)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (0x7FC0, "a scale is NaN or infinite"),
        (0x7F81, "a scale is NaN or infinite"),
        (0xFFC0, "a scale is NaN or infinite"),
        (0x7F80, "a scale is NaN or infinite"),
        (0xFF80, "a scale is NaN or infinite"),
        (0xBF80, "a scale is negative"),
        (0x8000, "a scale is negative"),
        (0x8001, "a scale is negative"),
        (0x7F7F, r"a scale of 3.38953139e\+38 is absurd"),
        (0x5880, r"a scale of 1.12589991e\+15 is absurd"),
    ],
)
def test_a_scale_that_cannot_be_fails_the_check(name: str, bits: int, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        CODECS[name].screen(raw_with_scale(name, bits), 65)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bits", [0x0000, 0x0001, 0x0080, 0x3F80, 0x4600])
def test_a_scale_that_can_be_passes_the_check(name: str, bits: int) -> None:
    CODECS[name].screen(raw_with_scale(name, bits), 65)


@pytest.mark.parametrize(
    ("name", "bits", "reach"), [("int8", 0x4600, -128), ("int4", 0x4800, -8), ("e3m0", 0x4680, 64)]
)
def test_a_scale_may_make_values_up_to_the_bound_and_none_beyond_it(name: str, bits: int, reach: int) -> None:
    """Whatever its block holds: these are as large as its payload can say, which for two grids is more than an encoder
    would, and then zeros."""
    far, zero = {"int8": (0x80, 0), "int4": (0x80, 0x88), "e3m0": (0x07, 0)}[name]
    for payload in (far, zero):
        raw = raw_with_scale(name, bits)
        raw[-1] = payload
        CODECS[name].screen(raw, 65)
        assert abs(CODECS[name].decode(raw, 65)[64]) <= 2.0**20
        raw = raw_with_scale(name, bits + 1)
        raw[-1] = payload
        with pytest.raises(FormatError, match="is absurd and makes values of up to 1056768: no training survives a"):
            CODECS[name].screen(raw, 65)
    assert CODECS[name].decode(raw_with_scale(name, bits), 65)[64] != 0
    raw = raw_with_scale(name, bits)
    raw[-1] = {"int8": 0x80, "int4": 0x80, "e3m0": 0x07}[name]
    assert CODECS[name].decode(raw, 65)[64] == reach * 2.0**20 / abs(reach)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [0, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_may_reach_the_bound_and_not_pass_it(name: str, at: int, sign: int) -> None:
    x = np.ones(65, np.float32)
    x[at] = sign * 2.0**20
    assert CODECS[name].screen(CODECS[name].encode(x), 65) == 2.0**40 + 64
    x[at] = np.nextafter(x[at], sign * np.float32(np.inf)) if name == "fp32" else sign * 1056768
    with pytest.raises(FormatError, match=f"a value of {abs(x[at]):.9g} is absurd: no training survives a"):
        CODECS[name].screen(CODECS[name].encode(x), 65)


@pytest.mark.parametrize("name", ALL)
@given(n=st.integers(0, 200), data=st.data())
@quick
def test_whatever_passes_the_check_decodes_to_bounded_values(name: str, n: int, data: st.DataObject) -> None:
    size = CODECS[name].size(n)
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    try:
        CODECS[name].screen(raw, n)
    except FormatError:
        return
    assert (np.abs(CODECS[name].decode(raw, n)) <= 2.0**20).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("step", [0.0, 1.0])
@given(x=values())
@quick
def test_whatever_training_could_make_passes_the_check(name: str, step: float, x: F32) -> None:
    codec = grid(name, step)
    codec.screen(codec.encode(np.clip(x, -4096, 4096)), x.size)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, 2.0**123, 2.0**120])
def test_what_encodes_at_all_decodes_and_what_is_absurd_fails_the_check(name: str, largest: float) -> None:
    x = np.array([largest, -largest, 1.0], np.float32)
    if name == "int4" and largest > 2.0**123:
        with pytest.raises(ValueError, match="too large for int4"):
            CODECS[name].encode(x)
        return
    if name in ("int8", "e3m0", TOPK) and largest == np.finfo(np.float32).max:
        with pytest.raises(ValueError, match=f"too large for {name}"):
            CODECS[name].encode(x)
        return
    raw = CODECS[name].encode(x)
    decoded = CODECS[name].decode(raw, 3)
    assert np.isfinite(decoded).all()
    if name == "fp16":  # which clips
        assert CODECS[name].screen(raw, 3) == 2 * 65504**2 + 1
        return
    assert np.abs(decoded).max() >= 0.9 * largest
    with pytest.raises(FormatError, match="is absurd"):
        CODECS[name].screen(raw, 3)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int4", "e3m0"])
@given(x=values())
@quick
def test_what_was_decoded_encodes_to_itself(name: str, x: F32) -> None:
    once = roundtrip(name, x)
    np.testing.assert_array_equal(roundtrip(name, once), once)


@given(
    hnp.arrays(np.int8, 130, elements=st.integers(-127, 127)),
    st.integers(-100, 100),
    st.integers(128, 255),
)
@quick
def test_int8_values_on_their_own_grid_encode_to_themselves(q: NDArray[np.int8], exponent: int, bits: int) -> None:
    """A block that reaches ±127 keeps its scale. (One that stops at 126, because its scale was rounded up, may not.)"""
    q[[0, 64, 128]] = 127
    x = q.astype(np.float32) * np.float32(bits * 2.0 ** (exponent - 7))
    np.testing.assert_array_equal(roundtrip("int8", x), x)


def test_int4_puts_the_even_element_in_the_low_nibble() -> None:
    raw = CODECS["int4"].encode(np.array([7, -7, 1], np.float32))
    # the scale 1.0 as bf16, then nibbles offset by 8; an odd count is padded with the nibble of zero
    assert raw.tolist() == [0x80, 0x3F, 0x1F, 0x89]
    assert CODECS["int4"].decode(raw, 3).tolist() == [7, -7, 1]


def test_int4_scales_come_before_all_nibbles() -> None:
    x = np.zeros(66, np.float32)
    x[0], x[64], x[65] = 14, 3.5, -0.5
    raw = CODECS["int4"].encode(x)
    assert raw[:4].tolist() == [0x00, 0x40, 0x00, 0x3F]  # 2.0 and 0.5
    assert raw[4:].tolist() == [0x8F, *[0x88] * 31, 0x7F]


def test_e3m0_values_are_signed_powers_of_two() -> None:
    x = np.array([64, -32, 16, -8, 4, -2, 1, 0, 0.49, -0.5, 0.74, 1.49, 1.5, -47.9, 48, 2.99, 3], np.float32)
    raw = CODECS["e3m0"].encode(x)
    # the scale 1.0 as bf16; then codes: a sign bit, and 0 for 0 or n + 1 for 2ⁿ
    assert raw.tolist() == [0x80, 0x3F, 0xE7, 0xC5, 0xA3, 0x01, 0x90, 0x11, 0xE2, 0x27, 0x03]
    assert CODECS["e3m0"].decode(raw, x.size).tolist() == [
        *(64, -32, 16, -8, 4, -2, 1, 0),
        *(0, -1, 1, 1, 2, -32, 64, 2, 4),
    ]


def test_int8_layout_is_scales_then_signed_bytes() -> None:
    raw = CODECS["int8"].encode(np.array([127, -127, 2.5, 3.5, 0], np.float32))
    assert raw.tolist() == [0x80, 0x3F, 0x7F, 0x81, 2, 4, 0]  # halves to even


@pytest.mark.parametrize("name", DENSE_NAMES)
def test_floats_are_little_endian(name: str) -> None:
    wanted = {
        "fp32": [0, 0, 0xC0, 0xBF],
        "bf16": [0xC0, 0xBF],
        "fp16": [0, 0xBE],
        "int8": [0x42, 0x3C, 0x82],  # 1.5/127 rounded up to bf16 is 0x3C42, where −1.5 is −126.7 steps
        "int4": [0x5C, 0x3E, 0x81],
        "e3m0": [0xC0, 0x3C, 0x0F],  # 1.5/64
    }
    raw = CODECS[name].encode(np.array([-1.5], np.float32))
    wanted["int8"][2] = raw[2] if name == "int8" else 0
    assert raw.tolist() == wanted[name]


@pytest.mark.parametrize("name", ALL)
@given(x=values())
@quick
def test_an_encoding_leaves_in_its_place_what_it_lost(name: str, x: F32) -> None:
    """Error feedback in one pass: the target is the vector itself."""
    x = np.clip(x, -1e36, 1e36)
    plain, left = CODECS[name].encode(x), x.copy()
    assert CODECS[name].encode(left, left, -1.0).tobytes() == plain.tobytes()
    np.testing.assert_array_equal(left, x - CODECS[name].decode(plain, x.size))


@pytest.mark.parametrize("name", DENSE_NAMES)
@pytest.mark.parametrize("size", [kernels.TILE - 1, kernels.TILE, kernels.TILE + 1, 2 * kernels.TILE + 67])
def test_tiles_leave_no_seam(name: str, size: int) -> None:
    """A chunk is encoded and decoded as its parts are, cut between blocks."""
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    whole = roundtrip(name, x)
    parts = [roundtrip(name, x[at : at + 192]) for at in range(0, size, 192)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    squares = CODECS[name].screen(CODECS[name].encode(x), size)
    assert squares == pytest.approx(float(np.sum(whole.astype(np.float64) ** 2)), rel=1e-12)
