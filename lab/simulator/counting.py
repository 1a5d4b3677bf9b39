"""What is trained in a simulation: vectors that count.

Inner step k of a site adds about one to place k mod `PLACES` of every fragment's pseudo-gradient. So what a site has
delivered, plus what it still holds, can be compared with the steps that it took, place by place: a step that was lost
or delivered twice shows, and which one it was. (About one, and different at each place and site: sums of such numbers
show the order in which they were made.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.fragments import F32
from shared.task import Shard, Task

PLACES = 64
TOKENS = 8
"""Of each inner step."""


class Model(nn.Module):
    def __init__(self, fragments: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(PLACES)) for _ in range(fragments)])


class Counting(Task):
    """The task as the coordinator builds it."""

    def build_model(self) -> nn.Module:
        return Model(int(self.options["fragments"]))

    def train_batches(self, shard: Shard, batch_size: int) -> Steps:
        return Steps()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise NotImplementedError("a simulation's trainer takes its steps without a loss")

    def sequence_tokens(self) -> int:
        return TOKENS


def strides_of(site: str) -> F32:
    """What a step of the site adds at each place, fp32 (PLACES,)."""
    return np.random.default_rng(list(site.encode())).uniform(0.9, 1.1, PLACES).astype(np.float32)


class Steps:
    """The numbers of the inner steps, from 0."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.position += 1
        return self.position - 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])

    def taken(self) -> F32:
        """How often each place was stepped on, fp32 (PLACES,)."""
        whole, rest = divmod(self.position, PLACES)
        return (whole + (np.arange(PLACES) < rest)).astype(np.float32)


class CountingTrainer:
    """The trainer of a simulated site; see site_agent.learner.Trains."""

    skipped_steps = 0

    def __init__(self, fragments: int, strides: F32) -> None:
        self._strides = strides
        self.theta = [np.zeros(PLACES, np.float32) for _ in range(fragments)]

    def step(self, stream: Any, lr: float) -> tuple[float, int, float]:
        place = next(stream) % PLACES
        for theta in self.theta:
            theta[place] -= self._strides[place]
        return 1.0, TOKENS, 0.0

    def read(self, fragment: int) -> F32:
        return self.theta[fragment].copy()

    def write(self, fragment: int, flat: F32) -> None:
        self.theta[fragment] = flat.copy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"model.{p}": torch.from_numpy(theta.copy()) for p, theta in enumerate(self.theta)}, {}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.theta = [tensors[f"model.{p}"].numpy().copy() for p in range(len(self.theta))]
