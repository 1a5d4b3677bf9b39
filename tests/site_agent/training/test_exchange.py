"""Gradients of groups that have only the host in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from site_agent.core.mixture import Group
from site_agent.training import exchange as module
from site_agent.training.exchange import Exchange
from site_agent.training.forms import gathered
from site_agent.training.seats import take_seat
from site_agent.training.team import Team
from tests.support.ranks import run_ranks

SHAPES = ((3, 4), (5,), (7, 2), (1,), (2, 2))
GROUPS = ((0, 2), (1,))
FACTORS = (2.0, 0.25)


def gradient(group: int, index: int) -> Tensor | None:
    """None where the group has no use of the parameter in a step."""
    if (group, index) in ((0, 1), (0, 3), (1, 3)):
        return None
    return torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(10 * group + index))


def parameters(group: int, sharded: dist.ProcessGroup | None) -> list[nn.Parameter]:
    made = []
    for index, shape in enumerate(SHAPES):
        values, slope = torch.zeros(shape), gradient(group, index)
        mesh = None if sharded is None else DeviceMesh.from_group(sharded, "cpu")
        if mesh is not None:
            values = distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None)
            slope = None if slope is None else distribute_tensor(slope, mesh, [Shard(0)], src_data_rank=None)
        made.append(nn.Parameter(values))
        made[-1].grad = slope
    return made


def summed(piece_bytes: list[int]) -> Any:
    """The gradients after they were summed in pieces of these sizes, where the first group has whole ones and where it
    has shards; and a tensor that the first group sent to the other."""
    team = Team(dist.group.WORLD)
    seat = take_seat(team, [Group(f"g{n}", ranks) for n, ranks in enumerate(GROUPS)], "gloo")
    assert seat.exchange is not None
    found = []
    for size in piece_bytes:
        module.PIECE_BYTES = size
        for sharded in (False, True):
            mine = parameters(seat.mine, seat.collective if sharded else None)
            seat.exchange.sum(mine, FACTORS[seat.mine])
            found.append([gathered(p.grad) for p in mine if p.grad is not None])
    sent = torch.full((3,), float(seat.mine == 0))
    return found, seat.exchange.send(sent).tolist()


def test_gradients_are_summed_whatever_pieces_they_come_in() -> None:
    def term(group: int, index: int) -> Tensor:
        slope = gradient(group, index)
        return torch.zeros(SHAPES[index]) if slope is None else slope * FACTORS[group]

    expected = [term(0, index) + term(1, index) for index in range(len(SHAPES))]
    for found, sent in run_ranks(3, summed, [1, 60, 1 << 25]):
        assert sent == [1.0, 1.0, 1.0]
        assert len(found) == 6
        for gradients in found:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(("size", "pieces"), [(1, [1, 1, 1, 1, 1]), (60, [2, 2, 1]), (1 << 25, [5])])
def test_pieces_have_every_parameter_once_and_in_order(
    size: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", size)
    every = parameters(0, None)
    cut = list(module._pieces(every))
    assert [len(piece) for piece in cut] == pieces
    assert [id(p) for piece in cut for p in piece] == [id(p) for p in every]


def test_there_is_nothing_to_sum_without_parameters() -> None:
    Exchange(None, None, first=True).sum([], 1.0)
