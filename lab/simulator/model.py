"""The task of a simulation as the coordinator builds it; a small file, because each run loads it anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.task import BatchStream, Shard, Task

PLACES = 64
TOKENS = 8
"""Of each inner step."""


class Model(nn.Module):
    def __init__(self, fragments: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(PLACES)) for _ in range(fragments)])


class Counting(Task):
    """Its data and its steps are the simulation's own; see lab.simulator.counting."""

    def build_model(self) -> nn.Module:
        return Model(int(self.options["fragments"]))

    def train_batches(self, shard: Shard, batch_size: int) -> BatchStream:
        raise NotImplementedError("a simulation's sites have streams of their own")

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise NotImplementedError("a simulation's trainer takes its steps without a loss")

    def sequence_tokens(self) -> int:
        return TOKENS
