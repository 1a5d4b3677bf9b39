"""How a simulation trains: steps that can be counted.

Inner step k of a site adds about one to place k mod `PLACES` of every fragment's pseudo-gradient. So what a site has
delivered, plus what it still holds, can be compared with the steps that it took, place by place: a step that was lost
or delivered twice shows, and which one it was. (About one, different at each place and site, and a little everywhere:
sums of such numbers show the order in which they were made.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.simulator.model import PLACES, TOKENS
from shared.config import RunConfig
from shared.files import Disk
from shared.fragments import F32, Layout
from shared.task import Manifest
from site_agent.checkpoint import oldest_lease
from site_agent.training.leased import LeasedStream
from site_agent.training.replica import Replica, whole

LEASED = Manifest("0" * 32, (6, 4, 7, 5))
BATCH = 3
"""Sequences of it in a step: no shard but one is a whole number of batches."""


class Stride:
    """What the steps of a site add: about one at their own place, and a little everywhere."""

    def __init__(self, site: str) -> None:
        rng = np.random.default_rng(list(site.encode()))
        self.here: F32 = rng.uniform(0.9, 1.1, PLACES).astype(np.float32)
        self.everywhere: F32 = rng.uniform(-0.01, 0.01, PLACES).astype(np.float32)

    def after(self, steps: int) -> F32:
        """What so many steps have added up to, fp32 (PLACES,)."""
        whole, rest = divmod(steps, PLACES)
        times = whole + (np.arange(PLACES) < rest)
        return (times * self.here + steps * self.everywhere).astype(np.float32)


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


class LeasedSteps(LeasedStream):
    """The same numbers, each for a batch of data that is leased; `trained` is told of each step, and which (epoch,
    shard, position) were in it."""

    def __init__(
        self, directory: Path, disk: Disk, run: str, trained: Callable[[int, tuple[tuple[int, int, int], ...]], None]
    ) -> None:
        super().__init__(None, LEASED, BATCH, 0, directory, disk, run, partial(oldest_lease, directory))
        self.position = 0
        self._trained = trained

    def __next__(self) -> int:
        self._trained(self.position, tuple(self._take()))
        self.position += 1
        return self.position - 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.position = int(state["position"])


class CountingTrainer(Replica):
    """The trainer of a simulated site; see site_agent.learner.Trains."""

    skipped_steps = 0
    device = torch.device("cpu")

    def __init__(self, layout: Layout, run: RunConfig, stride: Stride) -> None:
        super().__init__([whole(fragment) for fragment in layout.fragments], run.wire, run.rounds)
        self._stride = stride
        self.seconds = 0.0
        self.theta = [np.zeros(PLACES, np.float32) for _ in layout.fragments]

    def seed(self, seed: int) -> None:
        """Nothing is drawn."""

    def step(self, stream: Any, lr: float) -> tuple[float, int, float]:
        place = next(stream) % PLACES
        for theta in self.theta:
            theta -= self._stride.everywhere
            theta[place] -= self._stride.here[place]
        return 1.0, TOKENS, self.seconds

    def read(self, fragment: int) -> Tensor:
        return torch.from_numpy(self.theta[fragment].copy())

    def write(self, fragment: int, flat: Tensor) -> None:
        self.theta[fragment] = flat.numpy().copy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = {f"model.{p}": torch.from_numpy(theta.copy()) for p, theta in enumerate(self.theta)}
        return {**weights, **dict(self.kept())}, {}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.theta = [tensors[f"model.{p}"].numpy().copy() for p in range(len(self.theta))]
        self.keep(tensors)
