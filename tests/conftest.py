"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Several workers share the cores (make test), and threads of torch that wait for a core spin: one each, in processes
# that a test starts too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is the machine's affair: no test here is about time.
settings.register_profile("isthmus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")
