"""The outer optimizers' kernels give the bits of their definitions: one rounding an operation, nothing fused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator.outer import kernels

F32 = NDArray[np.float32]
f32 = np.float32


def vectors(seed: int, count: int, size: int = 1000) -> list[F32]:
    """Vectors of mixed magnitudes, from 1e-6 to 1e3."""
    random = np.random.default_rng(seed)
    return [
        (random.standard_normal(size) * 10.0 ** random.uniform(-6, 3, size)).astype(np.float32) for _ in range(count)
    ]


def same_bits(got: F32, wanted: F32) -> bool:
    return bool(np.array_equal(got.view(np.uint32), wanted.view(np.uint32)))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.9, 1 / 3]), st.sampled_from([0.7, 1.0, 0.1]))
def test_nesterov_rounds_as_its_definition_does(seed: int, mu: float, lr: float) -> None:
    delta, master, momentum, published = vectors(seed, 4)
    # b ← μb + Δ; Θ ← Θ − η(Δ + μb); out = Θ − Θ̂. NumPy rounds each operation to fp32.
    b = f32(mu) * momentum + delta
    theta = master - f32(lr) * (delta + f32(mu) * b)
    out = np.empty_like(delta)
    before = delta.copy(), published.copy()
    kernels.nesterov(delta, master, momentum, published, f32(lr), f32(1), f32(mu), f32(mu), out)
    assert same_bits(momentum, b)
    assert same_bits(master, theta)
    assert same_bits(out, theta - published)
    assert same_bits(delta, before[0])
    assert same_bits(published, before[1])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.7, 1.0, 0.1]))
def test_sgd_rounds_as_its_definition_does(seed: int, lr: float) -> None:
    delta, master, published = vectors(seed, 3)
    theta = master - f32(lr) * delta
    out = np.empty_like(delta)
    kernels.sgd(delta, master, published, f32(lr), out)
    assert same_bits(master, theta)
    assert same_bits(out, theta - published)


def test_these_vectors_would_tell_a_fused_multiply_add() -> None:
    """The bit comparison above has teeth: with one rounding fewer, some elements come out different."""
    delta, master = vectors(0, 2)
    fused = (master.astype(np.float64) - np.float64(f32(0.7)) * delta.astype(np.float64)).astype(np.float32)
    assert not same_bits(fused, master - f32(0.7) * delta)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_any_length_will_do(size: int) -> None:
    delta, master, momentum, published = vectors(1, 4, size)
    kernels.nesterov(delta, master, momentum, published, f32(1), f32(1), f32(0.9), f32(0.9), np.empty_like(delta))
    kernels.sgd(delta, master, published, f32(1), np.empty_like(delta))
