from __future__ import annotations

import json

from site_agent.checkpoint import pack_core, unpack_core
from site_agent.core.site import Settings, SiteCore, Snapshot

SETTINGS = Settings("auto", 1000)


def test_what_was_on_its_way_is_timed_by_the_clock_of_the_process_that_sends_it_again() -> None:
    """The monotonic clock of another boot may be far ahead: the link would seem to take less than no time."""
    core = SiteCore.begin(SETTINGS, [(0, 0), (0, 0)], pace=8.0, peers=2.0)
    core.stepped(10, 0.5)
    core.snapshot_taken(Snapshot(0, 0, 10, 1), now=50_000.0)
    restored = unpack_core(json.loads(json.dumps(pack_core(core))), SETTINGS, now=100.0)
    restored.accepted(0, 1, now=102.0)
    assert restored.tempo.sync_seconds == 2.0
    assert restored.fragments[0].in_flight is not None
    assert restored.fragments[0].in_flight.tokens == 10
