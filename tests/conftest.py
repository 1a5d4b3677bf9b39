"""What holds for all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Several workers share the cores (make test), and threads of torch that wait for a core spin: one each, in processes
# that a test starts too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is the machine's affair: no test here is about time.
settings.register_profile("isthmus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes comes first: at the end, no worker is to be alone with something long."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
