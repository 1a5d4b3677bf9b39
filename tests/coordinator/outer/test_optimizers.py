"""Outer optimizers and merge rules through whole outer steps, against their definitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coordinator.outer.merge import Weighted
from coordinator.outer.optimizers import SLOTS, OuterRule
from coordinator.outer.step import OuterState, Stepped, outer_step
from shared.fragments import CHUNK_ELEMENTS, Fragment, TensorSpec
from shared.wire import Header, encode_flat, open_container, tensor_table

F32 = NDArray[np.float32]
FRAGMENT = Fragment(0, (TensorSpec("a", (7, 9)), TensorSpec("emb", (20,)), TensorSpec("z", (CHUNK_ELEMENTS + 3,))))
NESTEROV = OuterRule("nesterov", lr=0.5, momentum=0.75, codec="fp32", zstd_level=0)
DELAYED = replace(NESTEROV, optimizer="delayed-nesterov", period=4)
ADAM = replace(NESTEROV, optimizer="adam", lr=0.01, momentum=0.9, beta2=0.99)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def values(seed: int) -> F32:
    return np.random.default_rng(seed).standard_normal(FRAGMENT.size).astype(np.float32)


def sent(flat: F32, weight: float = 1.0) -> Weighted:
    fields: dict[str, Any] = {
        "kind": "contribution",
        "run": "r",
        "site": "s",
        "fragment": 0,
        "base_version": 0,
        "version": 0,
        "digest": "0" * 32,
        "codec": "fp32",
        "zstd": False,
        "chunk": CHUNK_ELEMENTS,
        "tensors": tensor_table(FRAGMENT),
        "tokens": 1,
        "steps": 1,
        "sizes": [],
    }
    container = open_container(encode_flat(Header.model_validate(fields), FRAGMENT, flat, 0), FRAGMENT)
    return Weighted(container, weight, float(np.linalg.norm(flat.astype(np.float64))))


def state() -> OuterState:
    return OuterState.initial(FRAGMENT, values(99))


def step(
    at: OuterState,
    merged: Sequence[Weighted],
    rule: OuterRule,
    pool: ThreadPoolExecutor,
    embeddings: Sequence[str] = (),
) -> Stepped:
    return outer_step(at, merged, rule, "r", 10, pool, embeddings)


def tensor(flat: F32, name: str) -> NDArray[np.float64]:
    return FRAGMENT.unflatten(flat)[name].astype(np.float64)


# ---- Delayed Nesterov (arXiv 2401.09135)


def test_n_pushes_of_the_same_weights_are_one_nesterov_step_on_their_mean(pool: ThreadPoolExecutor) -> None:
    """The published test, c = 0. Powers of two, so that the sum is exact."""
    pushes = [np.full(FRAGMENT.size, value, np.float32) for value in (1.0, 3.0, -2.0, 6.0)]
    delayed, plain = state(), state()
    for _ in range(3):
        for push in pushes:
            step(delayed, [sent(push)], DELAYED, pool)
        step(plain, [sent(np.full(FRAGMENT.size, 2.0, np.float32))], NESTEROV, pool)
        np.testing.assert_allclose(delayed.master, plain.master, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(delayed.slots["momentum"], plain.slots["momentum"])
        assert not delayed.slots["accumulated"].any()


def test_where_sites_leave_in_the_middle_of_a_buffer_the_momentum_is_the_mean_of_what_was_collected(
    pool: ThreadPoolExecutor,
) -> None:
    at, ones = state(), np.ones(FRAGMENT.size, np.float32)
    for _ in range(7):
        step(at, [sent(ones)], replace(DELAYED, period=8), pool)
    step(at, [sent(ones)], replace(DELAYED, period=1), pool)
    np.testing.assert_array_equal(at.slots["momentum"], ones)
    assert not at.slots["accumulated"].any()


def test_a_buffer_of_three_and_unit_gradients_moves_by_a_third_each(pool: ThreadPoolExecutor) -> None:
    at, rule = state(), replace(DELAYED, period=3, lr=1.0, momentum=0.0)
    for _ in range(6):
        before = at.master.copy()
        step(at, [sent(np.ones(FRAGMENT.size, np.float32))], rule, pool)
        np.testing.assert_allclose(at.master - before, -1 / 3, rtol=1e-5, atol=1e-6)


def test_c_spreads_the_momentum_over_the_period(pool: ThreadPoolExecutor) -> None:
    """With c = 1/N each arrival takes its part of the momentum; the momentum is that of c = 0 all the same."""
    at, rule = state(), replace(DELAYED, delay_c=0.25, lr=1.0, momentum=0.5)
    ones = np.ones(FRAGMENT.size, np.float32)
    theta, m = at.master[0].astype(np.float64), 0.0
    for arrival in range(8):
        step(at, [sent(ones)], rule, pool)
        if (arrival + 1) % 4 == 0:
            m = 0.5 * m + 1.0
            theta -= (1 - 0.25 * 4 + 0.25) * 0.5 * m + 0.25
        else:
            theta -= 0.25 * 0.5 * m + 0.25
        assert at.master[0] == pytest.approx(theta, abs=1e-5)


def test_a_round_of_several_is_as_many_arrivals_of_their_mean(pool: ThreadPoolExecutor) -> None:
    alone, together = state(), state()
    push = np.full(FRAGMENT.size, 4.0, np.float32)
    for _ in range(4):
        step(alone, [sent(push)], DELAYED, pool)
    step(together, [sent(push, 0.5), sent(push, 0.5)], DELAYED, pool)
    assert together.count == 2
    step(together, [sent(push, 0.5), sent(push, 0.5)], DELAYED, pool)
    assert together.count == alone.count == 0
    np.testing.assert_allclose(together.master, alone.master, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(together.slots["momentum"], alone.slots["momentum"])


# ---- Adam (arXiv 1412.6980)


def test_adam_is_that_of_torch_over_many_steps(pool: ThreadPoolExecutor) -> None:
    at = state()
    parameter = torch.nn.Parameter(torch.from_numpy(at.master.copy()))
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99))
    for seed in range(6):
        parameter.grad = torch.from_numpy(values(seed))
        optimizer.step()
        step(at, [sent(values(seed))], ADAM, pool)
        np.testing.assert_allclose(at.master, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert at.count == 6


# ---- a round that is worth a part of a full one


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_four_quarter_rounds_are_about_one_round(momentum: float, pool: ThreadPoolExecutor) -> None:
    whole, parts = state(), state()
    push = np.ones(FRAGMENT.size, np.float32)
    rule = replace(NESTEROV, momentum=momentum, lr=1.0)
    for _ in range(40):
        step(whole, [sent(push)], rule, pool)
        for _ in range(4):
            step(parts, [sent(push)], replace(rule, share=0.25), pool)
    moved, moved_in_parts = values(99)[0] - whole.master[0], values(99)[0] - parts.master[0]
    assert moved == pytest.approx(40 / (1 - momentum), rel=0.05)
    assert moved_in_parts == pytest.approx(moved, rel=0.25)


def test_half_a_round_of_sgd_is_half_a_step(pool: ThreadPoolExecutor) -> None:
    at, push = state(), values(1)
    before = at.master.copy()
    step(at, [sent(push)], replace(NESTEROV, optimizer="sgd", momentum=0.0, share=0.5), pool)
    np.testing.assert_allclose(before - at.master, 0.25 * push, rtol=1e-5, atol=1e-6)


# ---- merge rules, tensor by tensor


def test_rda_brings_each_tensor_to_the_mean_length_and_leaves_embeddings_to_the_mean(pool: ThreadPoolExecutor) -> None:
    first, second = values(1), 3 * values(2)
    at, rule = state(), replace(NESTEROV, optimizer="sgd", lr=1.0, momentum=0.0, merge="rda")
    before = at.master.copy()
    stepped = step(at, [sent(first, 0.25), sent(second, 0.75)], rule, pool, ["emb"])
    moved = before - at.master
    for name in ("a", "z"):
        lengths = 0.25 * np.linalg.norm(tensor(first, name)) + 0.75 * np.linalg.norm(tensor(second, name))
        assert np.linalg.norm(tensor(moved, name)) == pytest.approx(lengths, rel=1e-4)
    np.testing.assert_allclose(
        tensor(moved, "emb"), 0.25 * tensor(first, "emb") + 0.75 * tensor(second, "emb"), rtol=1e-4, atol=1e-5
    )
    assert stepped.cosine == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("times", [1.0, 3.0, 7.0])
def test_rda_of_opposite_contributions_moves_nothing(pool: ThreadPoolExecutor, times: float) -> None:
    """Their directions cancel but for the rounding of fp32, which must not be brought to their mean length."""
    push = values(1)
    at, rule = state(), replace(NESTEROV, optimizer="sgd", lr=1.0, momentum=0.0, merge="rda")
    before = at.master.copy()
    step(at, [sent(push, 0.5), sent(-np.float32(times) * push, 0.5)], rule, pool)
    np.testing.assert_array_equal(at.master, before)


def test_heloco_turns_what_is_at_a_right_angle_to_the_momentum(pool: ThreadPoolExecutor) -> None:
    at, rule = state(), replace(NESTEROV, correction="heloco")
    push = values(1)
    step(at, [sent(push)], rule, pool)
    momentum = at.slots["momentum"].copy()
    other = values(3)
    step(at, [sent(other)], rule, pool)
    merged = at.slots["momentum"] - np.float32(0.75) * momentum
    for name in ("a", "z"):
        m, d, got = tensor(momentum, name), tensor(other, name), tensor(merged, name)
        norm, length = np.linalg.norm(d), np.linalg.norm(m)
        c = float((d * m).sum() / norm / length)
        confidence = norm / (norm + 3 * length)
        assert c < 0.2
        if c >= 0:
            turn = min((1 - c) * confidence, 1)
            direction = (1 - turn) * d / norm + turn * m / length
            wanted = direction / np.linalg.norm(direction) * norm
        else:
            wanted = d - min(0.5 * -c * confidence, 0.5) * c * norm * m / length
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_the_cosine_of_a_round_is_that_between_its_contributions(pool: ThreadPoolExecutor) -> None:
    push = values(1)
    assert step(state(), [sent(push)], NESTEROV, pool).cosine is None
    assert step(state(), [sent(push, 0.5), sent(push, 0.5)], NESTEROV, pool).cosine == pytest.approx(1.0, abs=1e-5)
    for merge in ("mean", "rda"):
        rule = replace(NESTEROV, merge=merge)  # type: ignore[arg-type]
        found = step(state(), [sent(push, 0.5), sent(-2 * push, 0.5)], rule, pool).cosine
        assert found == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize("merge", ["mean", "rda"])
def test_a_correction_does_not_change_what_the_cosine_says(merge: Any, pool: ThreadPoolExecutor) -> None:
    """Of two at about right angles to each other and to the momentum, towards which both are turned far."""
    at, rule = state(), replace(NESTEROV, correction="heloco", merge=merge)
    step(at, [sent(values(1))], rule, pool)
    one, other = (100 * values(seed) + 5 * values(1) for seed in (2, 3))
    found = step(at, [sent(one, 0.5), sent(other, 0.5)], rule, pool).cosine
    assert found == pytest.approx(0.0, abs=0.03), "they have nothing in common but what the correction gave them"


# ---- state


@pytest.mark.parametrize("optimizer", list(SLOTS))
@pytest.mark.parametrize("merge", ["mean", "rda"])
def test_the_result_is_the_same_for_one_and_for_four_threads(optimizer: Any, merge: Any) -> None:
    correction = "none" if optimizer == "sgd" else "heloco"
    rule = replace(NESTEROV, optimizer=optimizer, merge=merge, correction=correction, period=3, codec="int4")
    ends = []
    for threads in (1, 4):
        at = state()
        with ThreadPoolExecutor(threads) as executor:
            stepped = [step(at, [sent(values(v), 0.4), sent(values(v + 9), 0.6)], rule, executor) for v in range(4)]
        ends.append(([s.delta for s in stepped], [s.digests for s in stepped], [s.cosine for s in stepped]))
        assert at.digests() == stepped[-1].digests
        assert set(at.slots) == set(SLOTS[rule.optimizer])
    assert ends[0] == ends[1]


def test_a_changed_optimizer_keeps_the_momentum_and_counts_anew(pool: ThreadPoolExecutor) -> None:
    at = state()
    step(at, [sent(values(1))], DELAYED, pool)
    step(at, [sent(values(2))], DELAYED, pool)
    assert at.count == 2
    momentum = at.slots["momentum"]
    step(at, [sent(values(3))], replace(NESTEROV, momentum=0.0, lr=1.0), pool)
    assert at.slots["momentum"] is momentum
    assert list(at.slots) == ["momentum"]
    assert at.count == 0
