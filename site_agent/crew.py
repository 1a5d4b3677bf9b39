"""The processes of a site: which device each has, who trains with whom, and how a process that is not the head works.

A site of one device is one process. Several are started by torch's launcher (`site_agent.launch`, or `torchrun` by
hand, Slurm or Kubernetes), one for each device, on one machine or on several. What each says of its device makes the
device groups; whether several groups train one model or one each is decided once, by what they were measured to do
(`site_agent.core.mixture`), and kept: a learner's name and state go by it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shared.config import RunConfig, SiteConfig, received_run
from shared.errors import ConfigError
from shared.fragments import Layout
from shared.task import build_model, check_fingerprint, fingerprint_of, load_task
from site_agent.core.memory import Needed, memory_needed
from site_agent.core.mixture import Group, Mode, Rank, groups_of
from site_agent.training.ensemble import serve
from site_agent.training.forms import Computing, Parallel
from site_agent.training.makes import GLOO, Found, backend, devices_of, look_at
from site_agent.training.seats import take_seat
from site_agent.training.team import ALONE, Order, Team
from site_agent.training.trainer import Trainer

log = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that is alive (one that dies is noticed at once). The head ticks while it waits."""
DECISION = "mixed.json"


@dataclass(frozen=True)
class Crew:
    """This process among those that train one model: its device (`found`), and what all of them have said of theirs."""

    team: Team
    found: Found
    how: Computing
    throttle: float
    ranks: tuple[Rank, ...]
    groups: tuple[Group, ...]

    @property
    def device(self) -> torch.device:
        return self.found.device

    @property
    def mine(self) -> int:
        """The index of this rank's group."""
        return next(n for n, group in enumerate(self.groups) if self.team.rank in group.ranks)

    def describe(self) -> str:
        """The devices in a line: "nvidia-h20: 2 x NVIDIA H20 (cuda, bf16); fast: …"; without names where it is one
        group."""
        told = []
        for group in self.groups:
            one = self.ranks[group.ranks[0]]
            name = f"{group.name}: " if len(self.groups) > 1 else ""
            told.append(f"{name}{len(group.ranks)} x {one.device} ({one.make}, {one.precision})")
        return "; ".join(told)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def enlist(config: SiteConfig) -> Crew:
    """This process as one of its site's. Raises ConfigError where its device is not there."""
    devices, local = config.devices, int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0
    if devices.threads:
        torch.set_num_threads(devices.threads)
    team = _join() if launched() else ALONE
    found = team.agree(lambda: look_at(_device(devices_of(devices.device), local)))
    if found.device.type != "cpu":
        torch.accelerator.set_device_index(found.device.index or 0)
    precision = devices.precision
    if precision == "auto":
        precision = "bf16" if found.bf16 and found.device.type != "cpu" else "fp32"
    name = _each(devices.group, local)
    if not name and backend(found.make) == GLOO and found.device.type != "cpu":
        name = f"{found.make.device}-{team.rank}"  # no collectives of its own: what it shares goes through the host
    said = Rank(socket.gethostname(), found.make.name, found.name, found.free or 0, precision)
    told = team.tell_all({**asdict(said), "group": name})
    named = [each.pop("group") for each in told]
    ranks = tuple(Rank(**each) for each in told)
    how = Computing(precision, devices.compile, devices.recompute)
    return Crew(team, found, how, _each(devices.throttle, local), ranks, tuple(groups_of(ranks, named)))


def _join() -> Team:
    if not dist.is_initialized():
        dist.init_process_group(GLOO, timeout=PATIENCE)
    if int(os.environ["RANK"]):
        # They end when the head says so, or is gone; it has a checkpoint to take before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return Team(dist.group.WORLD)


def disband() -> None:
    """Lets go of the process groups, once everyone is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(devices: Sequence[torch.device], local: int) -> torch.device:
    if local < len(devices):
        return devices[local]
    if devices[0].type == "cpu":
        return devices[0]
    raise ConfigError(
        f"[devices] device: process {local} of this machine has no device, there are {len(devices)}; start as many "
        "processes as devices (torchrun --nproc-per-node)"
    )


def _each(setting: Any, local: int) -> Any:
    """A setting of [devices] for the process with this number on its machine."""
    if not isinstance(setting, list):
        return setting
    if local >= len(setting):
        raise ConfigError(f"[devices]: a list of {len(setting)} has nothing for process {local} of this machine")
    return setting[local]


# -- training together


def prepare(crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout, fingerprint: Mapping[str, str]) -> Trainer:
    """This rank's trainer of the run. Collective; what is wrong at one rank is raised at all of them.

    Raises ConfigError where the task does not fit the run, or the device has too little memory for the model.
    """

    def build() -> tuple[Any, Any, Parallel]:
        task = task_of(config, run)
        check_fingerprint(fingerprint_of(task), fingerprint)
        parallel = _parallel(crew, config, run, layout)
        return task, build_model(task, run.run.seed), parallel

    task, model, parallel = crew.team.agree(build)
    seat = take_seat(crew.team, crew.groups, backend(crew.found.make))
    return Trainer(task, model, layout, run, crew.device, crew.throttle, crew.how, parallel, seat)


def task_of(config: SiteConfig, run: RunConfig) -> Any:
    """The run's task as this machine has it: `[task] use` and `[data]` of the site override the run's."""
    use = config.task.use if config.task else run.task.use
    return load_task(use, {**run.task.options(), **config.data}, config.base)


def needed(crew: Crew, run: RunConfig, layout: Layout, parallel: Parallel) -> Needed:
    """What this rank's device must hold at least."""
    overlap, group = run.rounds.overlap_steps, crew.groups[crew.mine]
    sum_ = memory_needed(
        layout,
        run.inner.optimizer,
        feedback=run.wire.error_feedback,
        overlap=overlap if isinstance(overlap, int) else None,
        steps=run.inner.steps,
        shards=len(group.ranks) if parallel == "fsdp" else 1,
        holders=len(crew.groups[0].ranks),
    )
    return sum_ if crew.mine == 0 else replace(sum_, feedback=0, snapshots=0)


def free(crew: Crew) -> int | None:
    """Bytes that every device of this rank's group has for the site; None where one does not say. Processes on one
    host's CPUs share what it has."""
    shares = []
    for rank in crew.groups[crew.mine].ranks:
        one = crew.ranks[rank]
        if not one.free:
            return None
        beside = [other for other in crew.ranks if (other.host, other.make) == (one.host, one.make)]
        shares.append(one.free // (len(beside) if one.make == "CPU" else 1))
    return min(shares)


def _parallel(crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout) -> Parallel:
    """How this rank's group holds the model. Raises ConfigError where it has too little memory either way."""
    wanted, several, have = config.devices.parallel, len(crew.groups[crew.mine].ranks) > 1, free(crew)
    ways: list[Parallel] = [wanted] if wanted != "auto" else ["ddp", "fsdp"] if several else ["ddp"]
    if have is None:
        return ways[0]
    for way in ways:
        short = needed(crew, run, layout, way).shortage(str(crew.device), have)
        if short is None:
            return way
    raise ConfigError(f"[devices]: the model {short}")


def follow(crew: Crew, config: SiteConfig) -> Order:
    """A rank that is not the head: trains as it is told, until there is an order that is not for a trainer."""
    while True:
        order = crew.team.hear()
        while order["do"] == "prepare":
            run, layout = received_run(order["config"]), Layout.from_wire(order["layout"])
            order = serve(prepare(crew, config, run, layout, order["fingerprint"]))
        if order["do"] != "tick":
            return order


# -- several groups


def settled(crew: Crew, config: SiteConfig, measure: Callable[[], Mapping[str, Any]]) -> Mode:
    """Whether the groups of this site average their gradients or are learners of their own. What the config does not
    say is decided by the head, by what it can `measure` ({"mode": …}) or has decided before. Collective."""
    if not crew.team.head:
        mode: Mode = follow(crew, config)["mode"]
        return mode
    wanted, file = config.devices.mixed, config.path(config.site.state) / DECISION
    if len(crew.groups) == 1:
        mode = "average"
    elif wanted != "auto":
        mode = wanted
    elif (before := _decided(file, crew)) is not None:
        mode = before
    else:
        decision = dict(measure())
        mode = decision["mode"]
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {**decision, "groups": [group.name for group in crew.groups]}
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if len(crew.groups) > 1:
        log.info("%s: %s", crew.describe(), "one learner" if mode == "average" else "a learner for each group")
    crew.team.tell({"do": "mode", "mode": mode})
    return mode


def _decided(file: Path, crew: Crew) -> Mode | None:
    """What was decided before for the same groups."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["groups"] == [group.name for group in crew.groups] and before["mode"] in ("average", "learners"):
            mode: Mode = before["mode"]
            return mode
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def apart(crew: Crew, config: SiteConfig) -> tuple[Crew, SiteConfig]:
    """The crew of this rank's group alone, and its config: a learner with a name, a state and a port of its own."""
    group = crew.groups[crew.mine]
    team = Team(_subgroup(crew.team, group.ranks)) if len(group.ranks) > 1 else ALONE
    ranks = tuple(crew.ranks[rank] for rank in group.ranks)
    learner = Crew(
        team, crew.found, crew.how, crew.throttle, ranks, (Group(group.name, tuple(range(len(group.ranks)))),)
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
