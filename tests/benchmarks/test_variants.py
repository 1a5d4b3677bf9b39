"""The search for codecs: what it tries is what it says, and agrees with production where production has the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quantisers, variants
from benchmarks.quantisers import NF4, Codebook, Encoded, even, fit, fixed, largest, stochastic
from benchmarks.variants import GRIDS, Size, Variant, compare, frontier, measure, pseudo_gradients
from shared.codecs import DENSE, codec_named, grid
from shared.codecs.kernels import F32

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(4000))
RANDOM = np.random.default_rng(0)
NORMAL: F32 = RANDOM.standard_normal(20_001, dtype=np.float32)


def squared_error(x: F32, encoded: Encoded) -> float:
    return float(np.mean((x - encoded.decoded) ** 2))


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_an_even_grid_of_64_is_the_production_codec(name: str, bits: int, step: float) -> None:
    x = NORMAL[:19_968]
    mine = even(bits, 64, largest(step))(x, RANDOM)
    theirs = quantisers.production(grid(name, step))(x, RANDOM)
    # (Sums of squares are taken in another order here, so that now and then a scale is another by its rounding.)
    assert np.mean(mine.decoded != theirs.decoded) < (0.02 if step else 1e-9)
    assert mine.frames[0].size == theirs.frames[0].size
    assert mine.raw_bits == theirs.raw_bits
    assert mine.ideal_bits == pytest.approx(theirs.ideal_bits, rel=1e-3)


def test_scales_apart_are_the_same_bytes_in_another_order() -> None:
    whole, apart = (make(DENSE["int4"])(NORMAL, RANDOM) for make in (quantisers.production, quantisers.scales_apart))
    assert np.array_equal(whole.decoded, apart.decoded)
    assert len(apart.frames) == 2
    assert np.array_equal(np.sort(np.concatenate(apart.frames)), np.sort(whole.frames[0]))


def test_entropy_is_that_of_the_symbols() -> None:
    assert quantisers.entropy_bits(np.full(100, 7, np.uint8)) == 0
    assert quantisers.entropy_bits(np.arange(256, dtype=np.uint8)) == pytest.approx(8 * 256)
    assert quantisers.entropy_bits(np.zeros(0, np.uint16)) == 0


def test_stochastic_rounding_is_unbiased_and_nearest_is_closer() -> None:
    x, random = NORMAL[:1024], np.random.default_rng(1)
    rounds = 400
    drawn = [even(4, 64, rounding=stochastic)(x, random) for _ in range(rounds)]
    step = np.abs(x).max() / 7
    mean = np.mean([each.decoded for each in drawn], axis=0)
    assert np.abs(mean - x).max() < 5 * step / 2 / rounds**0.5
    assert np.mean([squared_error(x, each) for each in drawn]) > 1.5 * squared_error(x, even(4, 64)(x, random))


def test_a_fitted_codebook_has_less_error_than_an_even_grid_and_than_nf4() -> None:
    nf4 = quantisers.by_codebook(quantisers.middles(np.array(NF4, np.float32)), 64, largest())
    fitted = squared_error(NORMAL, quantisers.fitted(NORMAL, 16, 64, largest())(NORMAL, RANDOM))
    assert fitted < squared_error(NORMAL, even(4, 64)(NORMAL, RANDOM))
    assert fitted < squared_error(NORMAL, nf4(NORMAL, RANDOM))


def test_the_levels_of_a_normal_distribution_are_those_of_max() -> None:
    book = fit(np.random.default_rng(2).standard_normal(200_000).astype(np.float32), 4)
    assert book.levels == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=0.02)


def test_a_price_buys_bits_with_error() -> None:
    free, priced = (quantisers.fitted(NORMAL, 16, 64, fixed(1.0), price)(NORMAL, RANDOM) for price in (0.0, 0.1))
    assert priced.ideal_bits < 0.7 * free.ideal_bits
    assert squared_error(NORMAL, priced) > squared_error(NORMAL, free)


def test_clipping_for_least_error_has_no_more_of_it() -> None:
    clipped = even(4, 4096, quantisers.clipped)(NORMAL, RANDOM)
    assert squared_error(NORMAL, clipped) < squared_error(NORMAL, even(4, 4096)(NORMAL, RANDOM))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_zeros_and_odd_lengths_stay_what_they_are(length: int) -> None:
    book = Codebook(np.array([-1, 0, 1], np.float32), np.array([-0.5, 0.5], np.float32))
    zeros = np.zeros(length, np.float32)
    for quantise in (even(4, 64), even(8, 4096, fixed(1.0)), quantisers.by_codebook(book, 64, largest())):
        assert not quantise(zeros, RANDOM).decoded.any()
        assert quantise(NORMAL[:length], RANDOM).decoded.shape == (length,)


def test_error_feedback_mends_the_sum() -> None:
    deltas = [RANDOM.standard_normal(5000).astype(np.float32) for _ in range(8)]
    row = measure(Variant("int4", GRIDS, quantisers.production(codec_named("int4"))), deltas)
    assert row["sum_error"] < 0.6 * row["sum_error_alone"]
    assert row["zstd_1_bits"] < row["raw_bits"] == pytest.approx(4.25, abs=0.01)


def _row(kind: str, bits: float, error: float) -> dict[str, Any]:
    return {"kind": kind, "zstd_1_bits": bits, "error": error, "sum_error": error / 10}


def test_rows_are_compared_with_grids_of_the_same_error() -> None:
    rows = [_row(GRIDS, 4.0, 0.1), _row(GRIDS, 2.0, 0.4), _row("other", 2.7, 0.2), _row("other", 3.3, 0.2)]
    compared = compare([*rows, _row("other", 1.0, 0.9)])
    assert [row["to_grids"] for row in compared] == [1, 1, pytest.approx(0.9), pytest.approx(1.1), None]
    assert [row["pareto"] != "" for row in compared] == [True, True, True, False, True]
    assert [row["zstd_1_bits"] for row in frontier(rows, "error")] == [2.0, 2.7, 4.0]


def test_pseudo_gradients_are_of_a_model_in_training_and_repeat(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    first, again = (pseudo_gradients(str(text), Size(16, 1, 3, 1)) for _ in range(2))
    assert len(first) == 2
    assert all(np.array_equal(a, b) and a.any() for a, b in zip(first, again, strict=True))
    rows = compare([measure(variant, first) for variant in list(variants.variants(first[0]))[::7]])
    assert json.loads(json.dumps(rows)) == rows
