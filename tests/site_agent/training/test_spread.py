"""State that only the head has, at every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from site_agent.training.spread import spread
from site_agent.training.team import ALONE, Team
from tests.support.ranks import run_ranks

PLAIN = {"rules": {"w": "AdamW"}, "values": {"w.count": 3}}


def held() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(5, 3, generator=random).to(torch.bfloat16),
        "turned": torch.randn(3, 4, generator=random).T,
        "count": torch.tensor(7.0),
        "whole": torch.arange(4),
    }


def received() -> Any:
    """What a rank is given of it, in an order of its own."""
    team = Team(dist.group.WORLD)
    tensors, plain = spread(team, held() if team.head else {}, PLAIN if team.head else {})
    assert "other" not in tensors
    with pytest.raises(KeyError):
        tensors["other"]
    return {name: tensors[name] for name in sorted(tensors)}, plain, len(tensors), "half" in tensors


def test_every_rank_is_given_the_head_s_tensors_bit_for_bit() -> None:
    for tensors, plain, count, there in run_ranks(2, received):
        assert plain == PLAIN
        assert (count, there) == (4, True)
        for name, tensor in held().items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)


def test_who_is_alone_is_given_what_it_has() -> None:
    tensors = held()
    assert spread(ALONE, tensors, PLAIN) == (tensors, PLAIN)
