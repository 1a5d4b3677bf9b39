"""Several device groups in one site: one learner that averages their gradients, or a learner for each.

What serves better is measured once, where the config does not say it, and kept: a learner's name and state go by it.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shared.config import SiteConfig
from shared.files import DISK
from site_agent.core.mixture import Group, Mode
from site_agent.crew import PATIENCE, Crew, follow
from site_agent.training.makes import GLOO
from site_agent.training.team import ALONE, Team

log = logging.getLogger(__name__)

DECISION = "mixed.json"


def settled(crew: Crew, config: SiteConfig, measure: Callable[[], Mapping[str, Any]]) -> Mode:
    """Whether the groups of this site average their gradients or are learners of their own. What the config does not
    say is decided by the head, by what it can `measure` ({"mode": …}) or has decided before. Collective."""
    if not crew.team.head:
        mode: Mode = follow(crew, config)["mode"]
        return mode
    if (known := stated(crew, config)) is not None:
        mode, why = known
    else:
        decision = dict(measure())
        gc.collect()  # the model that was measured, before the next is made
        mode, why = decision["mode"], decision.get("why", "")
        told = {**decision, "groups": [group.name for group in crew.groups]}
        _keep(_decision_file(config), json.dumps(told, indent=1) + "\n")
    if len(crew.groups) > 1:
        way = "one learner" if mode == "average" else "a learner for each group"
        log.info("%s: %s (%s)", crew.describe(), way, why)
    crew.team.tell({"do": "mode", "mode": mode})
    return mode


def _keep(file: Path, text: str) -> None:
    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    file.parent.mkdir(parents=True, exist_ok=True)
    DISK.put(file, write)


def stated(crew: Crew, config: SiteConfig) -> tuple[Mode, str] | None:
    """The same as far as it is known without measuring, and who says so; for the head."""
    if len(crew.groups) == 1:
        return "average", "the devices are alike"
    if config.devices.mixed != "auto":
        return config.devices.mixed, f'[devices] mixed = "{config.devices.mixed}"'
    file = _decision_file(config)
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["groups"] == [group.name for group in crew.groups] and before["mode"] in ("average", "learners"):
            return before["mode"], f"as was decided before, in {file}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _decision_file(config: SiteConfig) -> Path:
    return config.path(config.site.state) / DECISION


def apart(crew: Crew, config: SiteConfig) -> tuple[Crew, SiteConfig]:
    """The crew of this rank's group alone, and its config: a learner with a name, a state and a port of its own."""
    group = crew.groups[crew.mine]
    team = Team(_subgroup(crew.team, group.ranks)) if len(group.ranks) > 1 else ALONE
    learner = Crew(
        team,
        crew.found,
        crew.how,
        tuple(crew.ranks[rank] for rank in group.ranks),
        (Group(group.name, tuple(range(len(group.ranks)))),),
        tuple(crew.names[rank] for rank in group.ranks),
        tuple(crew.throttles[rank] for rank in group.ranks),
    )
    site, port = config.site, config.metrics.port
    named = site.model_copy(update={"name": f"{site.name}~{group.name}", "state": str(Path(site.state) / group.name)})
    metrics = config.metrics.model_copy(update={"port": port + crew.mine if port else 0})
    return learner, config.model_copy(update={"site": named, "metrics": metrics})


def _subgroup(team: Team, ranks: Sequence[int]) -> dist.ProcessGroup:
    assert team.group is not None
    members = [dist.get_global_rank(team.group, rank) for rank in ranks]
    made = dist.new_group(members, backend=GLOO, timeout=PATIENCE, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made
