"""A replica whose weights are vectors that somebody sets."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import RoundsTable, WireTable
from shared.fragments import Layout
from site_agent.training.replica import Replica, whole


class Vectors(Replica):
    def __init__(
        self,
        layout: Layout,
        wire: WireTable,
        rounds: RoundsTable | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__([whole(fragment) for fragment in layout.fragments], wire, rounds or RoundsTable())
        self.device = device or torch.device("cpu")
        self.theta = [torch.zeros(fragment.size, device=self.device) for fragment in layout.fragments]

    def read(self, fragment: int) -> Tensor:
        return self.theta[fragment].clone()

    def write(self, fragment: int, flat: Tensor) -> None:
        self.theta[fragment] = flat.to(self.device, copy=True)
