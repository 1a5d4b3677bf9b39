"""The published recipe for streaming with delay and mixing, through real HTTP with a custom task file.

Two sites, two fragments of one scalar each, both start at 1.0; the gradient is 2 everywhere; inner SGD lr 1;
outer SGD lr 2 without momentum; fp32 on the wire; H = 6, so the fragments take turns every 3 steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.wire import open_container
from site_agent.agent import Agent
from tests.support.live import TOY, Live, live, run_config, site_config, train


def recipe(tokens: int = 36, **rounds: Any) -> dict[str, dict[str, Any]]:
    return {
        "run": {"name": "recipe", "tokens": tokens, "min_sites": 2},
        "task": {"use": f"{TOY}:Toy"},
        "inner": {
            "optimizer": "sgd",
            "lr": 1.0,
            "steps": 6,
            "batch_size": 1,
            "schedule": "constant",
            "clip_norm": 0.0,
            "weight_decay": 0.0,
        },
        "outer": {"optimizer": "sgd", "lr": 2.0},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 0, "pacing": "equal-steps", **rounds},
        "wire": {"upload": "fp32", "publish": "fp32"},
    }


def global_values(served: Live, fragment: int) -> list[float]:
    """The scalar of `fragment` at each published version, from the deltas that were published."""
    value, values = 1.0, []
    described = served.coordinator.layout.fragments[fragment]
    for round_ in served.coordinator.reader.rounds(fragment, after=0):
        with open_container(served.coordinator.store.blobs.path(str(round_.delta)), described) as delta:
            value += float(delta.decode()[0])
        values.append(value)
    return values


@pytest.mark.parametrize(
    ("rounds", "local_first", "local_second", "global_first", "global_second"),
    [
        ({"align": "overwrite"}, {3: -11, 9: -35, 15: -59}, {6: -23, 12: -47}, [-11, -35, -59], [-23, -47]),
        ({"align": "carry"}, {3: -11, 9: -35, 15: -59}, {6: -23, 12: -47}, [-11, -35, -59], [-23, -47]),
        (
            {"align": "blend", "blend": 0.0},
            {3: -11, 9: -35, 15: -59},
            {6: -23, 12: -47},
            [-11, -35, -59],
            [-23, -47],
        ),
        (
            {"align": "blend", "blend": 0.5},
            {3: -8, 9: -24.5, 15: -40.25},
            {6: -17, 12: -32},
            [-11, -29],
            [-23, -35],
        ),
    ],
)
def test_sites_and_coordinator_follow_the_published_trace(
    tmp_path: Path,
    rounds: dict[str, Any],
    local_first: dict[int, float],
    local_second: dict[int, float],
    global_first: list[float],
    global_second: list[float],
) -> None:
    with live(run_config(recipe(**rounds)), tmp_path / "state") as served:
        agents = [Agent(site_config(name, served.url, tmp_path)) for name in ("a", "b")]
        train(*agents)
        assert global_values(served, 0)[: len(global_first)] == global_first
        assert global_values(served, 1)[: len(global_second)] == global_second
    for agent in agents:
        # What step n+1 found is what the alignment after step n left.
        assert {n: agent.task.before[n + 1][0] for n in local_first} == local_first
        assert {n: agent.task.before[n + 1][1] for n in local_second} == local_second


def test_carry_keeps_the_steps_trained_while_the_version_was_on_its_way(tmp_path: Path) -> None:
    """τ = 2, worked out by hand: after step 3 the first scalar is −5 and Δ = 6, so version 1 is 1 − 2·6 = −11; two more
    steps bring the site to −9, and alignment after step 5 gives −11 + (−9 − −5) = −15."""
    with live(run_config(recipe(align="carry", overlap_steps=2)), tmp_path / "state") as served:
        agents = [Agent(site_config(name, served.url, tmp_path)) for name in ("a", "b")]
        train(*agents)
        assert global_values(served, 0)[0] == -11
        # Step 9: −15 − 4·2 = −23, Δ = −11 − −23 = 12, version 2 = −11 − 24 = −35.
        assert global_values(served, 0)[1] == -35
    for agent in agents:
        assert [agent.task.before[n][0] for n in (4, 5, 6, 7, 10)] == [-5, -7, -15, -17, -23]
