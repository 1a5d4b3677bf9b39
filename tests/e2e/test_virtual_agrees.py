"""Virtual time is the real thing: a run in lab.trained ends in the bits of real agents over real HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.trained import TrainedRun
from lab.virtual import VirtualSite
from site_agent.agent import Agent
from tests.support.live import live, run_config, site_config, train

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": {"overlap_steps": 2}},
        {"rounds": {"overlap_steps": 0, "align": "overwrite"}, "outer": {"merge": "rda", "correction": "heloco"}},
    ],
    ids=["carry", "rda-heloco"],
)
def test_a_full_quorum_run_has_the_same_course_in_virtual_time(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "tokens": 12_000, "min_sites": 2},
        "task": {"use": "byte-lm", "paths": str(text), "context": 16, "width": 32, "layers": 1, "heads": 2},
        "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
        "outer": {"lr": 1.0, "momentum": 0.5, **changes.get("outer", {})},
        "rounds": {"fragments": 2, "quorum": "all", "pacing": "equal-steps", **changes["rounds"]},
    }
    config = run_config(tables)
    with live(config, tmp_path / "state") as served:
        train(*(Agent(site_config(name, served.url, tmp_path)) for name in ("a", "b")))
        real = served.digests()
    virtual = TrainedRun(config, tmp_path, [VirtualSite("a", 1.0, 0.3), VirtualSite("b", 1.7, 2.0)])
    virtual.run()
    assert virtual.digests() == real
    assert virtual.loss < virtual.curve[0].loss
