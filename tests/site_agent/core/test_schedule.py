from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from site_agent.core.schedule import Cycle, next_cycle, offset


def calendar(steps: int, fragments: int, until: int) -> dict[int, list[int]]:
    """Step → fragments that are due, over cycles of a fixed length."""
    due, cycle = {}, next_cycle(0, float(steps))
    for step in range(1, until + 1):
        if found := cycle.due(step, fragments):
            due[step] = found
        if step >= cycle.end:
            cycle = next_cycle(step, float(steps), cycle.carry)
    return due


@pytest.mark.parametrize(
    ("steps", "fragments", "wanted"),
    [
        (6, 2, {3: [0], 6: [1], 9: [0], 12: [1]}),
        (6, 1, {6: [0], 12: [0]}),
        (24, 24, {step: [(step - 1) % 24] for step in range(1, 49)}),
        (50, 4, {13: [0], 25: [1], 38: [2], 50: [3], 63: [0], 75: [1], 88: [2], 100: [3]}),
        (5, 2, {3: [0], 5: [1], 8: [0], 10: [1]}),
        (7, 3, {2: [0], 5: [1], 7: [2], 9: [0], 12: [1], 14: [2]}),
        (2, 4, {1: [0, 1], 2: [2, 3], 3: [0, 1], 4: [2, 3]}),
        (1, 3, {1: [0, 1, 2], 2: [0, 1, 2]}),
        (3, 8, {1: [1, 2], 2: [3, 4, 5], 3: [0, 6, 7], 4: [1, 2], 5: [3, 4, 5], 6: [0, 6, 7]}),
    ],
)
def test_fragments_are_due_at_their_turn(steps: int, fragments: int, wanted: dict[int, list[int]]) -> None:
    assert calendar(steps, fragments, 2 * steps) == wanted


@given(st.integers(1, 60), st.integers(1, 80))
def test_every_fragment_is_due_once_a_cycle_at_p_plus_1_h_over_p_rounded(steps: int, fragments: int) -> None:
    due = calendar(steps, fragments, 2 * steps)
    for p in range(fragments):
        at = [step for step, found in due.items() if p in found]
        assert len(at) == 2
        assert at[1] == at[0] + steps
        exact = (p + 1) * steps / fragments
        distance = (at[0] - exact) % steps
        assert min(distance, steps - distance) <= 0.5
        assert 1 <= offset(p, fragments, steps) <= steps


def test_a_fraction_of_a_step_is_carried_into_the_next_cycle() -> None:
    cycle, lengths, starts = next_cycle(0, 3.75), [], []
    for _ in range(8):
        lengths.append(cycle.length)
        starts.append(cycle.start)
        cycle = next_cycle(cycle.end, 3.75, cycle.carry)
    assert lengths == [3, 4, 4, 4, 3, 4, 4, 4]
    assert starts == [0, 3, 7, 11, 15, 18, 22, 26]


@given(st.integers(4, 4000), st.integers(1, 40))
def test_paced_cycles_average_to_the_pace(quarters: int, cycles: int) -> None:
    pace, cycle = quarters / 4, Cycle(0, 0)
    for _ in range(cycles):
        cycle = next_cycle(cycle.end, pace, cycle.carry)
    assert cycle.end + cycle.carry == cycles * pace
    assert cycle.end == int(cycles * pace)


@pytest.mark.parametrize(("pace", "cycles", "steps"), [(10 / 3, 300, 1000), (11 / 3, 90, 330), (2.1, 100, 210)])
def test_fractions_are_not_lost_to_rounding(pace: float, cycles: int, steps: int) -> None:
    cycle = Cycle(0, 0)
    for _ in range(cycles):
        cycle = next_cycle(cycle.end, pace, cycle.carry)
    assert cycle.end == steps


@pytest.mark.parametrize("pace", [0.001, 0.5, 0.999])
def test_a_cycle_has_at_least_one_step(pace: float) -> None:
    cycle = next_cycle(7, pace)
    assert (cycle.start, cycle.length, cycle.end) == (7, 1, 8)
    assert cycle.carry == 0.0


def test_a_cycle_counts_from_its_own_start() -> None:
    cycle = Cycle(100, 6)
    assert [step for step in range(95, 115) if cycle.due(step, 2)] == [103, 106]
