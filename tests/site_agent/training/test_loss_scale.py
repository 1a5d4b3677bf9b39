"""The scale of fp16's gradients."""

from __future__ import annotations

from site_agent.training.loss_scale import FIRST_SCALE, GOOD_STEPS, LARGEST_SCALE, LossScale


def steps(scale: LossScale, count: int, *, finite: bool) -> float:
    for _ in range(count):
        scale.stepped(finite=finite)
    return scale.value


def test_the_scale_goes_down_on_overflow_and_up_after_enough_good_steps() -> None:
    scale = LossScale(moves=True)
    assert scale.value == FIRST_SCALE
    assert steps(scale, 1, finite=False) == FIRST_SCALE / 2
    assert steps(scale, GOOD_STEPS - 1, finite=True) == FIRST_SCALE / 2
    assert steps(scale, 1, finite=True) == FIRST_SCALE
    assert steps(scale, GOOD_STEPS, finite=True) == 2 * FIRST_SCALE
    steps(scale, GOOD_STEPS - 1, finite=True)
    assert steps(scale, 1, finite=False) == FIRST_SCALE
    assert steps(scale, GOOD_STEPS - 1, finite=True) == FIRST_SCALE  # they count from the overflow


def test_the_scale_stays_within_its_bounds() -> None:
    scale = LossScale(moves=True)
    assert steps(scale, 100, finite=False) == 1.0
    assert steps(scale, 40 * GOOD_STEPS, finite=True) == LARGEST_SCALE


def test_a_reset_forgets_the_overflow_and_the_good_steps() -> None:
    scale = LossScale(moves=True)
    steps(scale, 3, finite=False)
    steps(scale, GOOD_STEPS - 1, finite=True)
    scale.reset()
    assert scale.value == FIRST_SCALE
    assert steps(scale, 1, finite=True) == FIRST_SCALE


def test_in_other_precisions_losses_are_as_they_are() -> None:
    scale = LossScale(moves=False)
    assert steps(scale, 2 * GOOD_STEPS, finite=True) == 1.0
    assert steps(scale, 2, finite=False) == 1.0
