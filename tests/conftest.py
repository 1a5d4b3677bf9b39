"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is the machine's affair: no test here is about time.
settings.register_profile("isthmus")
settings.load_profile("isthmus")
