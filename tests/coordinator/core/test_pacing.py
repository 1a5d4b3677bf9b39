"""DyLU (Async Local-SGD, arXiv 2401.09135): steps in proportion to speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.pacing import dylu, paces

speeds = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e4), min_size=1)


def test_dylu_gives_the_published_recipe() -> None:
    assert dylu({"fast": 10.0, "middle": 5.0, "slow": 2.0}, 500) == {"fast": 500, "middle": 250, "slow": 100}


def test_the_slowest_site_still_takes_one_step() -> None:
    assert dylu({"fast": 60.0, "slow": 1.0}, 50) == {"fast": 50, "slow": 1}


def test_dylu_rounds_down() -> None:
    assert dylu({"fast": 3.0, "slow": 2.0}, 4) == {"fast": 4, "slow": 2}


def test_a_pace_keeps_its_fraction() -> None:
    assert paces({"fast": 3.0, "slow": 2.0}, 4) == {"fast": 4.0, "slow": pytest.approx(8 / 3)}


def test_without_a_measured_speed_everyone_takes_h_steps() -> None:
    assert paces({"a": 0.0, "b": 0.0}, 50) == {"a": 50.0, "b": 50.0}
    assert paces({}, 50) == {}


@given(speeds, st.integers(1, 1000))
def test_nobody_takes_more_steps_than_the_fastest_and_everyone_at_least_one(
    measured: dict[str, float], steps: int
) -> None:
    given_ = dylu(measured, steps)
    assert given_.keys() == measured.keys()
    assert all(1 <= each <= steps for each in given_.values())
    ranked = sorted(measured, key=lambda site: measured[site])
    assert [given_[site] for site in ranked] == sorted(given_.values())


@given(speeds, st.integers(1, 1000))
def test_the_fastest_site_takes_the_whole_h(measured: dict[str, float], steps: int) -> None:
    fastest = max(measured, key=lambda site: measured[site])
    assert paces(measured, steps)[fastest] == pytest.approx(steps, rel=1e-12)


@pytest.mark.parametrize("absurd", [1e9, 1e18])
@pytest.mark.parametrize("steps", [16, 50, 128])
def test_one_absurd_speed_changes_no_other_pace(absurd: float, steps: int) -> None:
    honest = {"a": 1.0, "b": 2.0, "c": 1.5}
    found = paces({**honest, "liar": absurd}, steps)
    assert found == {**paces(honest, steps), "liar": steps}


def test_the_learners_of_a_site_have_one_voice_about_what_is_absurd() -> None:
    honest = {"a": 1.0, "b": 2.0, "c": 1.5}
    learners = {f"liar~{n}": 1e9 for n in range(9)}
    assert paces({**honest, **learners}, 50) == {**paces(honest, 50), **dict.fromkeys(learners, 50.0)}


def test_of_two_that_are_absurdly_far_apart_neither_is_slowed_down_by_the_other() -> None:
    assert paces({"a": 1.0, "b": 1e9}, 50) == {"a": 50.0, "b": 50.0}
