"""Sites' configs, and crews of accelerators that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.config import SiteConfig, parse
from site_agent.core.mixture import Group, Rank
from site_agent.crew import Crew
from site_agent.training.forms import Computing
from site_agent.training.makes import CUDA, Found
from site_agent.training.team import ALONE

MIXED = {"device": ["cpu", "cpu", "cpu"], "group": ["fast", "slow", "fast"], "throttle": [1.0, 0.25, 0.5]}


def config(state: Path | str = "state", **devices: Any) -> SiteConfig:
    site = {"name": "eu", "coordinator": "http://127.0.0.1:1", "state": str(state)}
    return parse(SiteConfig, {"site": site, "devices": {"device": "cpu", **devices}}, "site.toml")


def accelerator(free: int | None = None, *, bf16: bool = True) -> Found:
    return Found(CUDA, torch.device("cuda", 0), "NVIDIA H20", None, free, bf16, True)


def a_crew(groups: Mapping[str, int], free: int = 0, how: Computing | None = None) -> Crew:
    """The head of groups of so many accelerators each, on one machine."""
    names = [name for name, count in groups.items() for _ in range(count)]
    ranks = tuple(Rank("here", "cuda", f"NVIDIA {name}", free, "bf16") for name in names)
    members = [Group(name, tuple(r for r, each in enumerate(names) if each == name)) for name in groups]
    places = tuple(f"cuda:{n}" for n in range(len(names)))
    return Crew(ALONE, accelerator(), how or Computing(), ranks, tuple(members), places, (1.0,) * len(names))
