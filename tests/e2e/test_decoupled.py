"""Decoupled training with real agents: nobody waits, the loss falls, and every bit can be explained afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.store.journal import Journal
from site_agent.agent import Agent
from tests.support.live import live, run_config, site_config, train

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))


@pytest.mark.parametrize(
    "tables",
    [
        {"rounds": {"grace_seconds": 0}},
        {"rounds": {"grace_seconds": 0, "overlap_steps": "unbounded"}, "outer": {"optimizer": "delayed-nesterov"}},
        {"rounds": {"grace_seconds": 0.05, "pacing": "follow"}, "outer": {"merge": "rda", "correction": "heloco"}},
    ],
    ids=["share", "delayed", "follow"],
)
def test_rounds_of_whoever_was_there_are_replayed_to_the_same_bits(
    tmp_path: Path, tables: dict[str, dict[str, Any]]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    config = run_config(
        {
            "run": {"name": "small", "tokens": 12_000, "min_sites": 2},
            "task": {"use": "byte-lm", "paths": str(text), "context": 16, "width": 32, "layers": 1, "heads": 2},
            "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
            "outer": {"momentum": 0.5, **tables.get("outer", {})},
            "rounds": {"fragments": 2, "quorum": 1, "overlap_steps": "auto", **tables["rounds"]},
            "store": {"checkpoint_versions": 10_000},
        }
    )
    state = tmp_path / "state"
    with live(config, state) as served:
        sites = ("a", {}), ("b", {"devices": {"throttle": 0.5}})
        train(*(Agent(site_config(name, served.url, tmp_path, **more)) for name, more in sites))
        real = served.digests()
        losses = [loss for _, loss in served.coordinator.evaluations]
    assert losses[-1] < losses[0] - 0.5
    with_journal = Journal(state / "journal.sqlite", read_only=True)
    rounds = [round_ for p in range(2) for round_ in with_journal.rounds(p, after=0)]
    contributions = with_journal.contributions()
    with_journal.close()
    assert all(stored.merged for stored in contributions), "what was acknowledged is in a version"
    assert any(len(round_.members) < 2 for round_ in rounds)
    if config.outer.optimizer == "nesterov":
        assert any(0 < round_.rule.share < 1 for round_ in rounds)
    # Only the initial weights are left: every round has to be executed again, with what the journal says of it.
    for file in (state / "checkpoints").glob("p*-v*.safetensors"):
        if not file.name.endswith("-v000000000.safetensors"):
            file.write_bytes(b"")
    with live(config, state) as again:
        assert again.digests() == real
