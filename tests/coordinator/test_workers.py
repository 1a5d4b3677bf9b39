"""How many threads a coordinator has."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from coordinator.machine import Machine
from coordinator.metrics import Metrics
from coordinator.workers import Workers


@pytest.mark.parametrize(("cores", "screeners"), [(1, 2), (2, 2), (48, 48)])
def test_its_pools_are_as_large_as_its_machine(cores: int, screeners: int) -> None:
    counts = {}

    def pool(count: int, name: str) -> Executor:
        counts[name] = count
        return ThreadPoolExecutor(count)

    Workers(Metrics(), Machine(pool=pool, cores=cores)).shutdown()
    assert counts == {"journal": 1, "merge": 1, "screen": screeners, "chunks": cores}
