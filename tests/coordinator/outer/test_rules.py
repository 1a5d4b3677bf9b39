"""Corrections and merges as coefficients, against the vectors that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator.outer.rules import Combination, Measures, combination, heloco, mean_cosine

F64 = NDArray[np.float64]


def cosine(a: F64, b: F64) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def measures(deltas: Sequence[F64], momentum: F64) -> Measures:
    return Measures(
        [float(np.linalg.norm(d)) for d in deltas],
        [cosine(d, momentum) for d in deltas],
        float(np.linalg.norm(momentum)),
    )


def result(parts: Combination, deltas: Sequence[F64], momentum: F64) -> F64:
    """What the pass over the tensors makes of the coefficients."""
    total = sum((w * d for w, d in zip(parts.weights, deltas, strict=True)), parts.momentum * momentum)
    if parts.length is not None:
        total = parts.length / max(float(np.linalg.norm(total)), 1e-12) * total
    return np.asarray(total)


def rda(deltas: Sequence[F64], weights: Sequence[float], *, embedding: bool = False) -> F64:
    zero = np.zeros_like(deltas[0])
    return result(combination("rda", "none", weights, measures(deltas, zero), embedding=embedding), deltas, zero)


vectors = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(lambda x: np.array(x, dtype=np.float64))


# ---- RDA (arXiv 2604.21428)


def test_rda_of_equal_vectors_is_the_vector_itself() -> None:
    v = np.array([3.0, -4.0, 0.5])
    np.testing.assert_allclose(rda([v, v, v], [0.2, 0.3, 0.5]), v, rtol=1e-12)


def test_rda_of_two_orthogonal_vectors_has_the_mean_of_their_lengths() -> None:
    merged = rda([np.array([3.0, 0.0]), np.array([0.0, 5.0])], [0.5, 0.5])
    assert np.linalg.norm(merged) == pytest.approx(4.0)
    assert merged[0] == pytest.approx(merged[1]), "and points half way between them, whatever their lengths"


def test_rda_of_opposite_vectors_is_zero_and_not_nan() -> None:
    v = np.array([1.0, 2.0])
    assert rda([v, -v], [0.5, 0.5]).tolist() == [0.0, 0.0]


def test_rda_of_zero_vectors_is_zero() -> None:
    assert rda([np.zeros(2), np.zeros(2)], [0.5, 0.5]).tolist() == [0.0, 0.0]


def test_embeddings_are_merged_by_the_mean() -> None:
    merged = rda([np.array([4.0, 0.0]), np.array([0.0, 4.0])], [0.25, 0.75], embedding=True)
    assert merged.tolist() == [1.0, 3.0]


@given(st.lists(vectors, min_size=1, max_size=4))
def test_rda_is_its_definition(deltas: list[F64]) -> None:
    weights = [1 / len(deltas)] * len(deltas)

    def direction(x: F64) -> F64:
        return np.asarray(x / max(float(np.linalg.norm(x)), 1e-12))

    common = sum((w * direction(d) for w, d in zip(weights, deltas, strict=True)), np.zeros(3))
    if 0 < np.linalg.norm(common) < 1e-6:
        return  # the direction of what is left of two opposite vectors is that of the rounding
    length = sum(w * float(np.linalg.norm(d)) for w, d in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(rda(deltas, weights), length * direction(common), rtol=1e-6, atol=1e-9)


# ---- HeLoCo (arXiv 2606.00271)


def corrected(delta: F64, m: F64) -> F64:
    """DESIGN.md section 5, word by word."""
    norm, length = float(np.linalg.norm(delta)), float(np.linalg.norm(m))
    if norm <= 1e-12 or length <= 1e-12:
        return delta
    c, unit = cosine(delta, m), m / length
    confidence = norm / (norm + 3 * length)
    if c >= 0.2:
        return delta
    if c >= 0:
        turn = min((1 - c) * confidence, 1)
        direction = (1 - turn) * delta / norm + turn * unit
        return np.asarray(direction / np.linalg.norm(direction) * norm)
    return np.asarray(delta - min(0.5 * -c * confidence, 0.5) * c * norm * unit)


@given(vectors, vectors)
def test_heloco_is_its_definition(delta: F64, m: F64) -> None:
    own, pull = heloco(float(np.linalg.norm(delta)), float(np.linalg.norm(m)), cosine(delta, m))
    np.testing.assert_allclose(own * delta + pull * m, corrected(delta, m), rtol=1e-7, atol=1e-9)


def test_heloco_lets_what_follows_the_momentum_pass() -> None:
    assert heloco(1.0, 2.0, 0.2) == (1.0, 0.0)


def test_heloco_keeps_the_length_of_what_it_turns() -> None:
    delta, m = np.array([0.0, 2.0]), np.array([3.0, 0.0])
    own, pull = heloco(2.0, 3.0, 0.0)
    turned = own * delta + pull * m
    assert np.linalg.norm(turned) == pytest.approx(2.0)
    assert turned[0] > 0


def test_heloco_takes_out_part_of_what_opposes_the_momentum() -> None:
    own, pull = heloco(2.0, 2.0, -1.0)
    assert own == 1.0
    assert pull * 2.0 == pytest.approx(0.5 * 0.25 * 2.0)


def test_heloco_passes_everything_while_there_is_no_momentum() -> None:
    assert heloco(2.0, 0.0, 0.0) == (1.0, 0.0)
    assert heloco(0.0, 2.0, 0.0) == (1.0, 0.0)


@given(st.lists(vectors, min_size=2, max_size=3), vectors)
def test_a_correction_comes_before_the_merge(deltas: list[F64], m: F64) -> None:
    weights = [1 / len(deltas)] * len(deltas)
    got = result(combination("mean", "heloco", weights, measures(deltas, m), embedding=False), deltas, m)
    wanted = sum((w * corrected(d, m) for w, d in zip(weights, deltas, strict=True)), np.zeros(3))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)


# ---- the cosine between contributions


def test_the_mean_cosine_comes_out_of_the_lengths() -> None:
    def of(*terms: list[float]) -> float | None:
        vectors = [np.array(term) for term in terms]
        return mean_cosine(float(np.linalg.norm(sum(vectors))) ** 2, [[float(np.linalg.norm(v)) for v in vectors]])

    assert of([1.0, 0.0], [2.0, 0.0]) == pytest.approx(1.0)
    assert of([1.0, 0.0], [0.0, 2.0]) == pytest.approx(0.0)
    assert of([1.0, 0.0], [-3.0, 0.0]) == pytest.approx(-1.0)
    assert of([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]) == pytest.approx(1 / 3)
    assert of([1.0, 0.0]) is None
    assert of([1.0, 0.0], [0.0, 0.0]) is None
    assert of([0.0], [0.0]) is None


def test_the_mean_cosine_is_over_all_tensors() -> None:
    # Two contributions that agree in a tensor of length 3 and are at a right angle in one of length 1.
    squares = (3 + 3) ** 2 + (1 + 1)
    assert mean_cosine(squares, [[3.0, 3.0], [1.0, 1.0]]) == pytest.approx(9 / 10)
    assert not math.isnan(mean_cosine(squares, [[3.0, 3.0], [0.0, 0.0]]) or 0.0)
