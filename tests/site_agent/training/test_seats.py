"""Which rank has which part of the model's state, and who talks to whom."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shared.fragments import Layout
from site_agent.core.mixture import Group
from site_agent.training.replica import NOTHING
from site_agent.training.seats import SINGLE, Seat, take_seat
from site_agent.training.team import ALONE, Team
from tests.support.ranks import run_ranks

(FRAGMENT,) = Layout.from_wire([[("a", [10]), ("b", [30]), ("c", [20])]]).fragments


def groups_of(ranks: tuple[tuple[int, ...], ...]) -> list[Group]:
    return [Group(f"g{number}", members) for number, members in enumerate(ranks)]


# ---- what the ranks do


def seated(cases: list[tuple[tuple[int, ...], ...]], order: list[int]) -> list[Any]:
    """Of each case who this rank's collective and its exchange are among, and its parts; the team is all ranks in
    this order."""
    world = dist.new_group(order) if order else dist.group.WORLD
    team = Team(world)
    found = []
    for case in cases:
        seat = take_seat(team, groups_of(case), "gloo")
        exchange = seat.exchange
        found.append(
            (
                team.rank,
                seat.mine,
                seat.first,
                members(seat.collective),
                exchange and (members(exchange.leaders), members(exchange.group), exchange.first),
                [(part.start, part.stop) for part in seat.parts(FRAGMENT)],
            )
        )
    return found


def members(group: dist.ProcessGroup | None) -> Any:
    """The ranks that are in it, as they say themselves through it."""
    if group is None:
        return None
    said = [torch.zeros(1) for _ in range(dist.get_world_size(group))]
    dist.all_gather(said, torch.tensor([float(dist.get_rank())]), group=group)
    return [int(each) for each in said]


# ---- tests


def test_who_is_alone_has_all_of_it() -> None:
    assert take_seat(ALONE, [], "gloo") is SINGLE
    (part,) = SINGLE.parts(FRAGMENT)
    assert (part.start, part.stop) == (0, 60)
    assert SINGLE.first


def test_ranks_talk_within_their_group_and_the_first_of_each_between_them() -> None:
    cases = [((0, 1, 2),), ((0, 2), (1,)), ((0,), (1, 2)), ((0,), (1,), (2,)), ((0, 2), (1,))]
    ranks = run_ranks(3, seated, cases, [])
    halves, thirds = [(0, 40), (40, 60)], [(0, 10), (10, 40), (40, 60)]
    whole, nothing = (0, 60), (0, 0)
    assert ranks[0] == [
        (0, 0, True, [0, 1, 2], None, thirds),
        (0, 0, True, [0, 2], ([0, 1], [0, 2], True), [halves[0], nothing, halves[1]]),
        (0, 0, True, None, ([0, 1], None, True), [whole, nothing, nothing]),
        (0, 0, True, None, ([0, 1, 2], None, True), [whole, nothing, nothing]),
        (0, 0, True, [0, 2], ([0, 1], [0, 2], True), [halves[0], nothing, halves[1]]),
    ]
    assert [each[1:5] for each in ranks[1]] == [
        (0, True, [0, 1, 2], None),
        (1, False, None, ([0, 1], None, False)),
        (1, False, [1, 2], ([0, 1], [1, 2], False)),
        (1, False, None, ([0, 1, 2], None, False)),
        (1, False, None, ([0, 1], None, False)),
    ]
    assert [each[1:5] for each in ranks[2]] == [
        (0, True, [0, 1, 2], None),
        (0, True, [0, 2], (None, [0, 2], True)),
        (1, False, [1, 2], (None, [1, 2], False)),
        (2, False, None, ([0, 1, 2], None, False)),
        (0, True, [0, 2], (None, [0, 2], True)),
    ]
    assert all([each[5] for each in rank] == [each[5] for each in ranks[0]] for rank in ranks)


def test_a_team_of_some_of_the_processes_counts_its_own_ranks() -> None:
    ranks = run_ranks(2, seated, [((0, 1),), ((0,), (1,))], [0, 1])
    assert [each[0] for each in ranks[1]] == [1, 1]
    assert [each[4] for each in ranks[1]] == [None, ([0, 1], None, False)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_are_the_whole_fragment_in_order_without_a_gap(size: int) -> None:
    class Of(Team):
        def __init__(self) -> None:
            self.group, self.rank, self.size = object(), 0, size + 1  # type: ignore[assignment]

    parts = Seat(Of(), tuple(groups_of((tuple(range(1, size + 1)), (0,))))).parts(FRAGMENT)
    assert parts[0] == NOTHING
    held = [part for part in parts if part.size]
    assert (held[0].start, held[-1].stop) == (0, 60)
    assert all(before.stop == after.start for before, after in pairwise(held))
    assert sum(len(part.chunks) for part in parts) == len(FRAGMENT.chunks())
