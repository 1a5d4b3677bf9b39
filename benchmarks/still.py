"""A task whose model is there to be coordinated and never trained: `layers` square matrices of `side` by `side`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.task import BatchStream, Shard, Task


class Still(Task):
    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._layers, self._side = int(options["layers"]), int(options["side"])

    def build_model(self) -> nn.Module:
        model = nn.Module()
        for n in range(self._layers):
            model.register_parameter(f"layer_{n:04d}", nn.Parameter(torch.randn(self._side, self._side)))
        return model

    def train_batches(self, shard: Shard, batch_size: int) -> BatchStream:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise NotImplementedError
