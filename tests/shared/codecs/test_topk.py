"""topk2: what it keeps, what it costs, and what of it is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.codecs import CODECS, TopK, codec_named, kernels, reference
from shared.errors import FormatError

F32 = NDArray[np.float32]
quick = settings(max_examples=60)
DEFAULT = TopK(128)


@st.composite
def vectors(draw: st.DrawFn) -> F32:
    """Lengths around the block's, values that are many or few, equal, zero, or all over the range."""
    n = draw(st.sampled_from([1, 2, 31, 32, 33, 4095, 4096, 4097, 8192, 9001]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal(n) * 2.0 ** (draw(st.sampled_from([0.0, 1.0, 12.0])) * rng.standard_normal(n))
    x[rng.random(n) < draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))] = draw(st.sampled_from([0.0, -0.0, 1.0, -3.0]))
    # what is dense in one place, so that gaps are very uneven
    x[: n // draw(st.sampled_from([1, 16, 64]))] *= draw(st.sampled_from([1.0, 1e6]))
    return x.astype(np.float32)


@given(x=vectors(), k=st.sampled_from([1, 3, 32, 128, 1024]))
@quick
def test_an_encoding_has_the_bits_of_the_reference(x: F32, k: int) -> None:
    codec = TopK(k)
    raw, (wanted, decoded) = codec.encode(x), reference.encode_topk(x, k)
    assert raw.tobytes() == wanted.tobytes()
    assert codec.decode(raw, x.size).tobytes() == (decoded + 0.0).tobytes()
    assert codec.least(x.size) <= raw.size <= codec.size(x.size)
    if np.abs(decoded).max() > kernels.LARGEST_VALUE:
        with pytest.raises(FormatError, match=r"a level of .* is absurd: no training survives"):
            codec.screen(raw, x.size)
        return
    squares = float(np.sum(decoded.astype(np.float64) ** 2))
    assert codec.screen(raw, x.size) == pytest.approx(squares, rel=1e-12)


@given(x=vectors(), weight=st.sampled_from([1.0, -1.0, 1 / 3, 0.7]), seed=st.integers(0, 99))
@quick
def test_accumulation_rounds_after_every_operation_and_touches_nothing_else(x: F32, weight: float, seed: int) -> None:
    raw, decoded = DEFAULT.encode(x), reference.encode_topk(x, 128)[1]
    start = -np.float32(weight) * decoded + np.random.default_rng(seed).integers(-1, 2, x.size).astype(np.float32)
    wanted = np.where(decoded == 0, start, start + np.float32(weight) * decoded)
    DEFAULT.accumulate(raw, weight, start)
    assert start.tobytes() == wanted.astype(np.float32).tobytes()


def test_the_largest_are_kept_and_of_equals_the_first() -> None:
    x = np.zeros(4096, np.float32)
    x[[5, 4000, 77]] = [3, -3, 1]
    x[1000:1200] = -1
    found = np.flatnonzero(TopK(8).decode(TopK(8).encode(x), x.size))
    assert found.tolist() == [5, 77, 1000, 1001, 1002, 1003, 1004, 4000]


def test_every_block_sends_and_a_short_one_its_share() -> None:
    x = np.random.default_rng(0).standard_normal(2 * 4096 + 100).astype(np.float32)
    sent = np.flatnonzero(DEFAULT.decode(DEFAULT.encode(x), x.size))
    assert np.bincount(sent // 4096).tolist() == [128, 128, 4]


def test_what_is_sent_is_near_what_it_was() -> None:
    """Two levels to a sign: of normal values' tails they leave 3.5% of the energy."""
    x = np.random.default_rng(1).standard_normal(1 << 18).astype(np.float32)
    decoded = DEFAULT.decode(DEFAULT.encode(x), x.size)
    sent = decoded != 0
    assert np.array_equal(np.signbit(decoded[sent]), np.signbit(x[sent]))
    assert np.sum((decoded[sent] - x[sent]) ** 2) < 0.01 * np.sum(x[sent] ** 2)


def test_an_element_costs_less_than_seven_hundredths_of_a_byte() -> None:
    x = np.random.default_rng(2).standard_normal(1 << 18).astype(np.float32)
    assert DEFAULT.encode(x).size < 0.0350 * x.size
    assert DEFAULT.size(x.size) < 0.058 * x.size, "wherever they lie"


def test_gaps_that_do_not_pay_go_as_plain_indices() -> None:
    """Two elements 4095 apart: 24 bits, and one more with the best Rice parameter."""
    x = np.zeros(4096, np.float32)
    x[[0, 4095]] = 1
    raw = TopK(2).encode(x)
    assert raw[4] == 255
    assert raw.size == TopK(2).size(4096)
    assert TopK(2).decode(raw, 4096).tolist() == x.tolist()


# the parts of a block of topk2-1 with 4096 elements: low, high, mode, values, indices
ONE = TopK(1)


def block(mode: int, indices: bytes, low: int = 0x3F80, high: int = 0x3F80, values: int = 1) -> NDArray[np.uint8]:
    levels = np.array([low, high], "<u2").tobytes()
    return np.frombuffer(levels + bytes([mode, values]) + indices, np.uint8)


def test_a_block_by_hand() -> None:
    """Place 5 under Rice parameter 2 is 5 >> 2 = 1 one, a zero, and 01 with its low bit first."""
    raw = block(2, bytes([0b0101]), low=0x3F80, high=0x4000, values=0b11)
    decoded = ONE.decode(raw, 4096)
    assert np.flatnonzero(decoded).tolist() == [5]
    assert decoded[5] == -2
    assert ONE.screen(raw, 4096) == 4.0


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (block(12, b"\0"), "coded in a way that is not known"),
        (block(254, b"\0"), "coded in a way that is not known"),
        (block(255, b"\0"), "do not end where it does"),
        (block(255, b"\0\0\0"), "do not end where it does"),
        (block(0, b"\xff"), "do not end where it does"),
        (block(0, b""), "do not end where it does"),
        (block(11, b"\xff\x0f\0"), "beyond its block"),
        (block(2, bytes([0b0101]), low=0x7F80), "a level is NaN or infinite"),
        (block(2, bytes([0b0101]), high=0xFFC0), "a level is NaN or infinite"),
        (block(2, bytes([0b0101]), low=0xBF80), "a level is negative"),
        (block(2, bytes([0b0101]), high=0x7F01), "a level of 1.71470411e.38 is absurd"),
        (block(2, bytes([0b0101]), high=0x4981), "a level of 1056768 is absurd: no training survives"),
        (block(2, bytes([0b0101]), low=0x4981, high=0x4981), "a level of 1056768 is absurd"),
        (block(2, bytes([0b0101]), low=0x4000, high=0x3F80), "its low level is above the high one"),
    ],
)
def test_what_no_encoder_makes_is_refused_by_name(raw: NDArray[np.uint8], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        ONE.screen(raw, 4096)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ((7, 7), "its indices are not in order"),
        ((9, 8), "its indices are not in order"),
        ((8, 100), "beyond its block"),
    ],
)
def test_plain_indices_must_be_in_order_and_within_their_block(indices: tuple[int, int], said: str) -> None:
    packed = np.packbits([int(b) for b in reference.topk_bits(list(indices), 255)], bitorder="little").tobytes()
    with pytest.raises(FormatError, match=said):
        TopK(64).screen(block(255, packed), 100)


@pytest.mark.parametrize("low", [0x3F80, 0x4980])
def test_levels_up_to_the_bound_pass_and_those_beyond_it_still_decode(low: int) -> None:
    assert ONE.screen(block(2, bytes([0b0101]), low=low, high=0x4980), 4096) == 2.0**40
    assert ONE.decode(block(2, bytes([0b0101]), low=low, high=0x7F00), 4096)[5] == 2.0**127


@given(data=st.data(), n=st.sampled_from([1, 33, 4096, 5000]))
@quick
def test_whatever_passes_the_screening_decodes_to_bounded_values_in_place(data: st.DataObject, n: int) -> None:
    raw = DEFAULT.encode(np.random.default_rng(n).standard_normal(n).astype(np.float32)).copy()
    for at in data.draw(st.lists(st.integers(0, raw.size - 1), max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, raw.size))] if data.draw(st.booleans()) else raw
    try:
        DEFAULT.screen(raw, n)
    except FormatError:
        return
    around = np.zeros(n + 2, np.float32)
    DEFAULT.accumulate(raw, 1.0, around[1:-1])
    assert (np.abs(around) <= kernels.LARGEST_VALUE).all()
    assert around[0] == around[-1] == 0


def test_the_name_on_the_wire_says_how_many_are_kept() -> None:
    assert codec_named("topk2-64").size(4096) == TopK(64).size(4096) < CODECS["topk2-256"].size(4096)
    for name in ("topk2", "topk2-0", "topk2-1025", "topk2-064", "topk2--1", "int2"):
        with pytest.raises(FormatError, match="is not known here"):
            codec_named(name)
    for k in (0, 1025):
        with pytest.raises(ValueError, match="from 1 to 1024"):
            TopK(k)
