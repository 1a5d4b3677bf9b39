from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from site_agent.training.gradients import clip

INF = float("inf")


def parameters(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(30, 7), (5,), (), (4, 3, 2)]]
    for p in made:
        p.grad = (torch.randn(p.shape, generator=random) * scale).to(dtype)
    made[1:1] = [nn.Parameter(torch.zeros(3))]  # without a gradient
    return made


@pytest.mark.parametrize("limit", [0.01, 1.0, 100.0, INF])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_does(limit: float, scale: float) -> None:
    ours, theirs = parameters(scale), parameters(scale)
    norm, finite = clip(ours, limit)
    assert finite
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, limit)), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_gradients_are_scaled_before_they_are_measured() -> None:
    ours, theirs = parameters(), parameters(0.25)
    norm, _ = clip(ours, 0.5, scale=0.25)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_gradients_within_the_limit_stay_as_they_are() -> None:
    ours = parameters()
    before = copy.deepcopy([p.grad for p in ours])
    clip(ours, 100.0)
    assert all(p.grad is old or torch.equal(p.grad, old) for p, old in zip(ours, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("limit", [1.0, INF])
def test_gradients_that_are_not_finite_are_told_and_left_alone(bad: float, limit: float) -> None:
    ours = parameters()
    ours[-1].grad[0, 0, 0] = bad  # type: ignore[index]
    before = copy.deepcopy([p.grad for p in ours])
    norm, finite = clip(ours, limit, scale=0.5)
    assert not finite
    assert not math.isfinite(norm)
    for p, old in zip(ours, before, strict=True):
        if old is not None:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, old, rtol=0, atol=0, equal_nan=True)


def test_the_norm_of_large_gradients_does_not_overflow() -> None:
    ours = parameters(1e30)
    norm, finite = clip(ours, 1.0)
    assert finite
    assert norm == pytest.approx(1e30 * clip(parameters(), INF)[0], rel=1e-6)
    assert clip(ours, INF)[0] == pytest.approx(1.0, rel=1e-6)


def test_a_norm_that_fp32_cannot_hold_is_not_finite() -> None:
    assert clip(parameters(3e37), 1.0) == (INF, False)


def test_gradients_in_half_precision_are_measured_exactly() -> None:
    ours = parameters(dtype=torch.bfloat16)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ours if p.grad is not None))
    assert clip(ours, 1.0)[0] == pytest.approx(exact, rel=1e-7)


def test_the_norm_is_the_same_number_however_gradients_are_cut() -> None:
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(10_007, generator=random)

    def norm(cut: int) -> float:
        pieces = [nn.Parameter(torch.zeros(len(piece))) for piece in gradient.split(cut)]
        for parameter, piece in zip(pieces, gradient.split(cut), strict=True):
            parameter.grad = piece.clone()
        return clip(pieces, INF)[0]

    assert {norm(cut) for cut in (10_007, 5_000, 999, 64, 7, 1)} == {norm(10_007)}


def test_a_model_without_gradients_has_the_norm_zero() -> None:
    assert clip([nn.Parameter(torch.zeros(3))], 1.0) == (0.0, True)
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.zeros(3)
    assert clip([zero], 1.0) == (0.0, True)
