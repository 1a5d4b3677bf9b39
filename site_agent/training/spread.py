"""State that the head has, at every rank: of a checkpoint, of which the others have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from site_agent.training.team import Team


def spread(
    team: Team, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The head's named tensors and plain data, at everyone (of the others nothing is asked). A tensor comes when it is
    asked for, so that no more than one is there at a time: all ranks ask for the same ones in the same order."""
    if team.alone:
        return tensors, plain
    if team.head:
        told: Mapping[str, Any] = {"shapes": {name: _shape(tensor) for name, tensor in tensors.items()}, "plain": plain}
        team.tell(told)
    else:
        told = team.hear()
    return _Spread(team, told["shapes"], tensors), told["plain"]


def _shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


class _Spread(Mapping[str, Tensor]):
    def __init__(self, team: Team, shapes: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
        self._team, self._shapes, self._held = team, shapes, held

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._shapes[name]
        mine = self._held[name].contiguous() if self._team.head else torch.empty(shape, dtype=getattr(torch, dtype))
        return self._team.share(mine)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # (Mapping's own would ask for the tensor.)
