"""A task of two scalars whose gradient is 2 everywhere: the published streaming recipe's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from site_agent.tasks import Shard, Task


class Counting:
    """Batches 1, 2, 3, …: each says which step it is for."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.position += 1
        return self.position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])


class TwoScalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(1.0))
        self.second = nn.Parameter(torch.tensor(1.0))


class Toy(Task):
    """`before[n]` is (first, second) as inner step n found them, steps counted from 1."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.before: dict[int, tuple[float, float]] = {}

    def build_model(self) -> nn.Module:
        return TwoScalars()

    def train_batches(self, shard: Shard, batch_size: int) -> Counting:
        return Counting()

    def loss(self, model: nn.Module, batch: int) -> tuple[Tensor, int]:
        self.before[batch] = (model.first.item(), model.second.item())
        return 2 * model.first + 2 * model.second, 1


class Marked(Toy):
    """The same with a tokenizer, of sorts: the option of that name is its digest."""

    def fingerprint(self) -> dict[str, str]:
        return {"tokenizer": self.options["tokenizer"]}


class Other(Toy):
    """The same with a third scalar: a layout that is not the run's."""

    def build_model(self) -> nn.Module:
        model = TwoScalars()
        model.third = nn.Parameter(torch.tensor(1.0))
        return model
