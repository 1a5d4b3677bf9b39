"""The outer step's kernel gives the bits of its definition: one rounding an operation, nothing fused, no seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator.outer.optimizers import NOTHING, SLOTS, Optimizer, OuterRule, update_of
from shared.codecs import DENSE, kernels

F32 = NDArray[np.float32]
f32 = np.float32
PUBLISHED = ["fp32", "bf16", "fp16", "int8", "int4"]
SIZES = [0, 1, 63, 64, 65, 1000, kernels.TILE - 1, kernels.TILE, kernels.TILE + 1, 3 * kernels.TILE + 65]


def vectors(seed: int, count: int, size: int = 1000) -> list[F32]:
    """Vectors of mixed magnitudes, from 1e-6 to 1e3."""
    random = np.random.default_rng(seed)
    return [
        (random.standard_normal(size) * 10.0 ** random.uniform(-6, 3, size)).astype(np.float32) for _ in range(count)
    ]


def same_bits(got: F32, wanted: F32) -> bool:
    return bool(np.array_equal(got.view(np.uint32), wanted.view(np.uint32)))


# What each optimizer does to (Δ, Θ, slots), in NumPy, which rounds every operation to fp32. Returns Θ and the slots.


def nesterov(rule: OuterRule, delta: F32, master: F32, slots: Sequence[F32]) -> tuple[F32, list[F32]]:
    mu = f32(rule.momentum)
    b = mu * slots[0] + delta
    return master - f32(rule.lr) * (delta + mu * b), [b]


def sgd(rule: OuterRule, delta: F32, master: F32, slots: Sequence[F32]) -> tuple[F32, list[F32]]:
    return master - f32(rule.lr) * delta, []


def delayed(rule: OuterRule, delta: F32, master: F32, slots: Sequence[F32]) -> tuple[F32, list[F32]]:
    """The last arrival of a period of one."""
    collected = slots[1] + delta
    m = f32(rule.momentum) * slots[0] + collected
    return master - f32(rule.lr) * (f32(rule.momentum) * m + delta), [m, f32(0) * collected]


def adam(rule: OuterRule, delta: F32, master: F32, slots: Sequence[F32]) -> tuple[F32, list[F32]]:
    """The first step."""
    b1, b2 = f32(rule.momentum), f32(rule.beta2)
    m = b1 * slots[0] + (f32(1) - b1) * delta
    v = b2 * slots[1] + (f32(1) - b2) * (delta * delta)
    c1, c2 = f32(1 - rule.momentum), f32(1 - rule.beta2)
    return master - f32(rule.lr) * ((m / c1) / (np.sqrt(v / c2) + f32(rule.epsilon))), [m, v]


Definition = Callable[[OuterRule, F32, F32, Sequence[F32]], tuple[F32, list[F32]]]
DEFINITIONS: dict[Optimizer, Definition] = {
    "nesterov": nesterov,
    "sgd": sgd,
    "delayed-nesterov": delayed,
    "adam": adam,
}


def check(optimizer: Optimizer, codec: str, size: int, seed: int, lr: float, mu: float) -> None:
    rule = OuterRule(optimizer, lr, mu, codec, 0)
    delta, master, published, *slots = vectors(seed, 3 + len(SLOTS[optimizer]), size)
    slots = [np.abs(slot) for slot in slots]  # a variance is not negative
    with np.errstate(all="ignore"):
        theta, moved = DEFINITIONS[optimizer](rule, delta, master, slots)
    change = theta - published
    wanted = DENSE[codec].encode(change)
    after = published + DENSE[codec].decode(wanted, size)
    before = delta.copy()
    raw = np.empty_like(wanted)
    squares = update_of(rule, 0, 1)[0](NOTHING, delta, master, slots, published, DENSE[codec], raw)
    assert same_bits(master, theta)
    assert all(same_bits(got, slot) for got, slot in zip(slots, moved, strict=True))
    assert raw.tobytes() == wanted.tobytes()
    assert same_bits(published, after)
    assert same_bits(delta, before)
    assert squares == pytest.approx(float(np.sum(delta.astype(np.float64) ** 2)), rel=1e-12)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(DEFINITIONS)),
    st.sampled_from(PUBLISHED),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.7, 1.0, 0.1]),
    st.sampled_from([0.0, 0.5, 0.9, 1 / 3]),
)
def test_a_step_rounds_as_its_definition_does(
    optimizer: Optimizer, codec: str, seed: int, lr: float, mu: float
) -> None:
    check(optimizer, codec, 1000, seed, lr, mu)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", PUBLISHED)
@pytest.mark.parametrize("optimizer", sorted(DEFINITIONS))
def test_tiles_leave_no_seam(optimizer: Optimizer, codec: str, size: int) -> None:
    check(optimizer, codec, size, 7, 0.7, 0.9)


def test_these_vectors_would_tell_a_fused_multiply_add() -> None:
    """The bit comparison above has teeth: with one rounding fewer, some elements come out different."""
    delta, master = vectors(0, 2)
    fused = (master.astype(np.float64) - np.float64(f32(0.7)) * delta.astype(np.float64)).astype(np.float32)
    assert not same_bits(fused, master - f32(0.7) * delta)


@pytest.mark.parametrize("codec", PUBLISHED)
@pytest.mark.parametrize("at", [0, kernels.TILE - 1, kernels.TILE + 5])
def test_a_step_to_what_is_not_finite_is_refused(codec: str, at: int) -> None:
    delta, master, published, momentum = vectors(3, 4, kernels.TILE + 6)
    delta[at] = np.nan
    update, _ = update_of(OuterRule("nesterov", 0.7, 0.9, codec, 0), 0, 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        update(
            NOTHING,
            delta,
            master,
            [momentum],
            published,
            DENSE[codec],
            np.empty(DENSE[codec].size(delta.size), np.uint8),
        )
