"""What becomes of several device groups: what is decided once stays, and groups apart are learners of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from site_agent.crew import enlist
from site_agent.groups import apart, settled, stated
from tests.support.crews import MIXED, a_crew, config
from tests.support.ranks import run_ranks


def never() -> Mapping[str, Any]:
    pytest.fail("there is nothing to measure")


def test_one_group_has_nothing_to_decide(tmp_path: Path) -> None:
    assert settled(a_crew({"h20": 2}), config(tmp_path, mixed="learners"), never) == "average"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["average", "learners"])
def test_what_the_config_says_is_done_and_not_measured(tmp_path: Path, mode: str) -> None:
    assert settled(a_crew({"a": 1, "b": 1}), config(tmp_path, mixed=mode), never) == mode


def test_what_was_measured_once_stays_decided(tmp_path: Path) -> None:
    crew, site = a_crew({"a": 1, "b": 1}), config(tmp_path / "new")
    assert stated(crew, site) is None
    assert settled(crew, site, lambda: {"mode": "learners", "why": "so"}) == "learners"
    assert settled(crew, site, never) == "learners"
    kept = json.loads((tmp_path / "new" / "mixed.json").read_text())
    assert kept == {"mode": "learners", "why": "so", "groups": ["a", "b"]}
    assert stated(crew, site) == ("learners", f"as was decided before, in {tmp_path / 'new' / 'mixed.json'}")


def test_other_groups_are_decided_anew(tmp_path: Path) -> None:
    site = config(tmp_path)
    settled(a_crew({"a": 1, "b": 1}), site, lambda: {"mode": "learners"})
    assert settled(a_crew({"a": 1, "c": 1}), site, lambda: {"mode": "average"}) == "average"
    assert settled(a_crew({"a": 1, "c": 1}), site, never) == "average"


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\xff", b"[]", b"7", b'{"mode": "learners"}', b'{"groups": ["a", "b"], "mode": "both"}', b'{"groups": ["a"'],
)
def test_a_damaged_decision_is_made_anew(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "mixed.json").write_bytes(damaged)
    crew = a_crew({"a": 1, "b": 1})
    assert settled(crew, config(tmp_path), lambda: {"mode": "average"}) == "average"
    assert settled(crew, config(tmp_path), never) == "average"


def learner(state: str, devices: dict[str, Any], port: int) -> tuple[Any, ...]:
    """What `apart` makes of this rank."""
    site = config(state, **devices)
    site = site.model_copy(update={"metrics": site.metrics.model_copy(update={"port": port})})
    crew = enlist(site)
    mode = settled(crew, site, lambda: {"mode": "learners"})
    mine, its = apart(crew, site)
    everyone = mine.team.everyone(float(crew.team.rank))
    where = Path(its.site.state).relative_to(state).as_posix()
    return mode, its.site.name, where, its.metrics.port, mine.throttles, mine.mine, everyone


def test_groups_apart_have_a_team_a_name_a_state_and_a_port_each(tmp_path: Path) -> None:
    fast = ("learners", "eu~fast", "fast", 9471, (1.0, 0.5), 0, [[0.0], [2.0]])
    slow = ("learners", "eu~slow", "slow", 9472, (0.25,), 0, [[1.0]])
    assert run_ranks(3, learner, str(tmp_path), MIXED, 9471) == [fast, slow, fast]


def test_learners_without_metrics_have_no_port() -> None:
    _, its = apart(a_crew({"a": 1, "b": 1}), off := config().model_copy(update={"metrics": no_metrics()}))
    assert its.metrics.port == off.metrics.port == 0


def no_metrics() -> Any:
    return config().metrics.model_copy(update={"port": 0})
