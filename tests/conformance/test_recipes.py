"""The field's published numbers for merging, outer steps, pacing and codecs, one test a line."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coordinator.core.pacing import dylu
from coordinator.core.rounds import Contribution, Policy, weights
from coordinator.outer.optimizers import NOTHING, SLOTS, Optimizer, OuterRule, update_of
from coordinator.outer.rules import Measures, combination
from shared.codecs import CODECS, DENSE
from shared.codecs.kernels import F32, U8


def room(values: F32) -> U8:
    """Where a delta in fp32 goes."""
    return np.empty(values.nbytes, np.uint8)


def pushed(optimizer: Optimizer, gradients: list[F32], start: F32, **rule: float) -> list[F32]:
    """Θ after each arrival of one gradient."""
    known = {"lr": 1.0, "momentum": 0.0, **rule}
    outer = OuterRule(optimizer, known["lr"], known["momentum"], "fp32", 0, period=int(known.get("period", 1)))
    master, published = start.copy(), start.copy()
    slots = [np.zeros_like(start) for _ in SLOTS[optimizer]]
    count, course = 0, []
    for gradient in gradients:
        update, count = update_of(outer, count, 1)
        update(NOTHING, gradient.copy(), master, slots, published, DENSE["fp32"], room(master))
        course.append(master.copy())
    return course


def merged(merge: str, vectors: list[list[float]], share: list[float]) -> np.ndarray:
    """The merge of one tensor's contributions, from the coefficients that the coordinator computes."""
    deltas = [np.array(vector) for vector in vectors]
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    terms = combination(merge, "none", share, Measures(norms, [0.0] * len(deltas), 0.0), embedding=False)  # type: ignore[arg-type]
    total = sum(
        (weight * delta for weight, delta in zip(terms.weights, deltas, strict=True)), np.zeros(len(vectors[0]))
    )
    if terms.length is None:
        return total
    return total * terms.length / max(float(np.linalg.norm(total)), 1e-12)


# ---- Delayed Nesterov (Async Local-SGD, arXiv 2401.09135)


@pytest.mark.parametrize("period", [2, 3, 5])
def test_as_many_pushes_as_the_period_are_one_nesterov_step_on_their_mean(period: int) -> None:
    """With c = 0 and the momentum of the step before in place, over several periods."""
    rng = np.random.default_rng(period)
    start = rng.standard_normal(50).astype(np.float32)
    gradients = rng.standard_normal((3, period, 50)).astype(np.float32)
    delayed = pushed("delayed-nesterov", [*gradients.reshape(-1, 50)], start, momentum=0.9, period=period)
    nesterov = pushed("nesterov", [*gradients.mean(axis=1)], start, momentum=0.9)
    np.testing.assert_allclose(delayed[period - 1 :: period], nesterov, rtol=1e-5, atol=1e-5)


def test_a_buffer_of_three_takes_a_third_of_each_unit_gradient() -> None:
    ones = np.ones(1, np.float32)
    course = pushed("delayed-nesterov", [ones] * 3, np.zeros(1, np.float32), period=3)
    np.testing.assert_allclose(np.diff([0.0, *(float(theta[0]) for theta in course)]), [-1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize(("period", "arrivals"), [(4, 3), (2, 5), (4, 4), (3, 7)])
def test_a_round_that_overshoots_the_period_is_its_arrivals_one_by_one(period: int, arrivals: int) -> None:
    """Unit gradients have no mean to lose, so rounds of any size end where single arrivals do."""
    ones = np.ones(1, np.float32)
    rule = OuterRule("delayed-nesterov", 1.0, 0.9, "fp32", 0, period=period)
    ends = []
    for size in (1, arrivals):
        master, published = np.zeros(1, np.float32), np.zeros(1, np.float32)
        slots, count = [np.zeros(1, np.float32), np.zeros(1, np.float32)], 0
        for _ in range(60 * arrivals * period // size):
            update, count = update_of(rule, count, size)
            update(NOTHING, ones.copy(), master, slots, published, DENSE["fp32"], room(master))
        ends.append(float(master[0]))
    assert math.isclose(ends[0], ends[1], rel_tol=1e-3)


# ---- a part of a Nesterov step (ours)


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_parts_of_a_step_move_as_far_as_the_whole(parts: int, momentum: float) -> None:
    ends = []
    for count in (1, parts):
        rule = OuterRule("nesterov", 1.0, momentum, "fp32", 0, share=1 / count)
        master, published = np.zeros(1, np.float32), np.zeros(1, np.float32)
        slots = [np.zeros(1, np.float32)]
        for _ in range(400 * count):
            update_of(rule, 0, 1)[0](
                NOTHING, np.ones(1, np.float32), master, slots, published, DENSE["fp32"], room(master)
            )
        ends.append(float(master[0]))
    assert math.isclose(ends[0], ends[1], rel_tol=0.02)


# ---- DyLU, weighted mean


def test_dylu() -> None:
    assert dylu({"a": 10.0, "b": 5.0, "c": 2.0}, 500) == {"a": 500, "b": 250, "c": 100}


def test_weighted_mean() -> None:
    policy = Policy(quorum=None, grace_seconds=0.0, deadline_seconds=1.0, max_staleness=0, weighting="tokens")
    sent = [Contribution(site, site, 0, 0, tokens, 1) for site, tokens in (("a", 1), ("b", 2))]
    assert math.isclose(merged("mean", [[1.0], [3.0]], weights(sent, policy, 1))[0], 7 / 3)


# ---- RDA (Decoupled DiLoCo, arXiv 2604.21428)


def test_rda_of_equal_vectors_is_the_vector() -> None:
    np.testing.assert_allclose(merged("rda", [[3.0, 4.0]] * 2, [0.5, 0.5]), [3.0, 4.0])


def test_rda_of_orthogonal_vectors_has_the_mean_of_their_norms() -> None:
    found = merged("rda", [[3.0, 0.0], [0.0, 5.0]], [0.5, 0.5])
    assert math.isclose(float(np.linalg.norm(found)), 4.0)
    assert float(np.linalg.norm(merged("mean", [[3.0, 0.0], [0.0, 5.0]], [0.5, 0.5]))) < 3.0


def test_rda_of_opposite_vectors_is_zero() -> None:
    assert merged("rda", [[1.0, -2.0], [-1.0, 2.0]], [0.5, 0.5]).tolist() == [0.0, 0.0]


# ---- codecs on N(0, 1)


@pytest.mark.parametrize(
    ("codec", "bar"), [("fp16", 5e-8), ("int8", 8e-4), ("bf16", 8e-4), ("int8", 3.75e-5), ("int4", 1.25e-2)]
)
def test_mean_squared_error(codec: str, bar: float) -> None:
    """hivemind's bars; the last two are what blocks of 64 reach with exact scales (3.5e-5, 1.2e-2), plus the rounding
    of ours to bf16."""
    x = np.random.default_rng(1).standard_normal(1 << 17).astype(np.float32)
    found = CODECS[codec].decode(CODECS[codec].encode(x), x.size)
    assert float(np.mean((found.astype(np.float64) - x) ** 2)) < bar


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("size", [0, 1, 63, 65, 1001])
@pytest.mark.parametrize("value", [0.0, 1e-40, 65504.0, -65504.0])
def test_awkward_values_round_trip_finite(codec: str, size: int, value: float) -> None:
    found = CODECS[codec].decode(CODECS[codec].encode(np.full(size, value, np.float32)), size)
    assert found.shape == (size,)
    assert np.isfinite(found).all()
