"""The processes of a site: which device each has, who trains with whom, and how a process that is not the head works.

A site of one device is one process. Several are started by torch's launcher (`site_agent.launch`, or `torchrun` by
hand, Slurm or Kubernetes), one for each device, on one machine or on several. What each says of its device makes the
device groups; what becomes of several of them is `site_agent.groups`.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.config import DevicesTable, RunConfig, SiteConfig, received_run
from shared.errors import ConfigError, FaultError, LostError
from shared.fragments import Layout, TensorSpec
from shared.program import signal_when_parent_ends
from shared.task import build_model, check_fingerprint, fingerprint_of, load_task
from site_agent.core.memory import Needed, memory_needed
from site_agent.core.mixture import Group, Rank, groups_of
from site_agent.launch import of_several
from site_agent.training import drivers
from site_agent.training.ensemble import serve
from site_agent.training.forms import Computing, Parallel
from site_agent.training.makes import CPU, GLOO, Found, backend, devices_of, look_at
from site_agent.training.optimizers import build_optimizer
from site_agent.training.seats import take_seat
from site_agent.training.team import ALONE, Order, Team, first_sentence
from site_agent.training.trainer import Trainer

log = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that is alive (one that dies is noticed at once). The head ticks while it waits."""
_CONNECTION = re.compile(r"/gloo/|Connection (closed|reset|refused)|Broken pipe|[A-Z]CCL (communicator|error)")
"""In the site's state: what was decided of several groups. Without it, it is decided anew."""


@dataclass(frozen=True)
class Crew:
    """This process among those that train one model: its device (`found`), and what all of them have said of theirs:
    `ranks`, and beside them `names`, such as "cuda:0" (of two devices alike a host has two), and `throttles`."""

    team: Team
    found: Found
    how: Computing
    ranks: tuple[Rank, ...]
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    throttles: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        return self.found.device

    @property
    def throttle(self) -> float:
        return self.throttles[self.team.rank]

    @property
    def mine(self) -> int:
        """The index of this rank's group."""
        return next(n for n, group in enumerate(self.groups) if self.team.rank in group.ranks)

    def describe(self) -> str:
        """The devices in a line: "nvidia-h20: 2 x NVIDIA H20 (cuda:0, cuda:1; bf16); fast: …"; without names where it
        is one group."""
        return "; ".join(self.described())

    def described(self) -> list[str]:
        """The same, a group each."""
        told = []
        for group in self.groups:
            one, members = self.ranks[group.ranks[0]], group.ranks
            name = f"{group.name}: " if len(self.groups) > 1 else ""
            count = f"{len(members)} x " if len(members) > 1 else ""
            where = ", ".join(dict.fromkeys(self.names[rank] for rank in members))
            if (hosts := len({self.ranks[rank].host for rank in members})) > 1:
                where += f" on {hosts} machines"
            slow = ", ".join(dict.fromkeys(f"{self.throttles[rank]:.0%}" for rank in members))
            throttled = f"; throttled to {slow} of full speed" if slow != "100%" else ""
            told.append(f"{name}{count}{one.device} ({where}; {one.precision}{throttled})")
        return told

    def called(self, rank: int) -> str:
        """A rank's device as messages call it: "cuda:0", and of several machines which one."""
        one, several = self.ranks[rank], len({each.host for each in self.ranks}) > 1
        at = f" of {one.host}" if several else ""
        share = " (its share, as one of several processes)" if _beside(self.ranks, one) > 1 else ""
        return f"{self.names[rank]}{at}{share}"


def enlist(config: SiteConfig) -> Crew:
    """This process as one of its site's. Raises ConfigError where its device is not there, or a list has nothing for
    it."""
    local = int(os.environ.get("LOCAL_RANK", "0")) if of_several() else 0
    if config.devices.threads:
        torch.set_num_threads(config.devices.threads)
    team = _join() if of_several() else ALONE
    found, how, group, throttle = team.agree(lambda: _own(config.devices, local))
    if found.device.type != "cpu":
        _select(found.device)
    if not group and team.size > 1 and backend(found.make) == GLOO and found.device.type != "cpu":
        group = f"{found.make.device}-{team.rank}"  # no collectives of its own: what it shares goes through the host
    rank = Rank(socket.gethostname(), found.make.name, found.name, found.free or 0, how.precision)
    told = team.tell_all({"rank": asdict(rank), "group": group, "name": str(found.device), "throttle": throttle})
    ranks = _shared_out([Rank(**each["rank"]) for each in told])
    groups = tuple(groups_of(ranks, [each["group"] for each in told]))
    names, throttles = tuple(each["name"] for each in told), tuple(each["throttle"] for each in told)
    return Crew(team, found, how, ranks, groups, names, throttles)


def _shared_out(ranks: Sequence[Rank]) -> tuple[Rank, ...]:
    """With what is free as each one's own share of it: processes on the CPUs of one host have the same memory."""
    return tuple(replace(one, free=one.free // _beside(ranks, one)) for one in ranks)


def _beside(ranks: Sequence[Rank], one: Rank) -> int:
    """How many ranks have the same memory."""
    return sum((each.host, each.make) == (one.host, CPU.name) for each in ranks) if one.make == CPU.name else 1


def _own(devices: DevicesTable, local: int) -> tuple[Found, Computing, str, float]:
    """What [devices] says of the process with this number on its machine: device, computing, group, throttle."""
    group, throttle = _each("group", devices.group, local), _each("throttle", devices.throttle, local)
    found = look_at(_device(devices_of(devices.device), local))
    precision = devices.precision
    if precision == "auto":
        precision = "bf16" if found.bf16 and found.device.type != "cpu" else "fp32"
    return found, Computing(precision, devices.compile, devices.recompute), group, throttle


def _select(device: torch.device) -> None:
    """Makes it the one that collectives and new streams use. (By its own module: `torch.accelerator` came later, and
    with other names, than packages that makers still publish for.)"""
    module = drivers.module(device.type)
    if hasattr(module, "set_device"):
        module.set_device(device)


def _join() -> Team:
    if not dist.is_initialized():
        try:
            dist.init_process_group(GLOO, timeout=PATIENCE)
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise LostError(f"the processes of this site do not find each other: {first_sentence(error)}") from None
    # Without its launcher nobody starts it again: the head leaves, and the others go with it.
    signal_when_parent_ends(signal.SIGTERM)
    if int(os.environ["RANK"]):
        # They end when the head says so, or is gone; it has a checkpoint to take before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return Team(dist.group.WORLD)


@contextmanager
def in_words(team: Team) -> Iterator[None]:
    """What devices and collectives raise, in words: FaultError where memory has run out, LostError where a rank is gone
    (also from collectives that torch starts by itself: gradients are summed within the backward pass)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        at = "" if team.alone else f"rank {team.rank}: "
        raise FaultError(
            f"{at}the device has too little memory: {str(error).splitlines()[0]}; set [devices] recompute = true or a "
            "smaller micro_batch, or leave it more room"
        ) from None
    except RuntimeError as error:
        said = str(error)
        if team.alone or not (isinstance(error, dist.DistError) or _CONNECTION.search(said)):
            raise
        raise LostError(f"a process of this site is lost: {first_sentence(error)}") from None


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


def _each(key: str, setting: Any, local: int) -> Any:
    """A setting of [devices] for the process with this number on its machine."""
    if not isinstance(setting, list):
        return setting
    if local >= len(setting):
        raise ConfigError(
            f"[devices] {key}: a list of {len(setting)} has nothing for process {local} of this machine (they count "
            "from 0); write an entry for each"
        )
    return setting[local]


# -- training together


def prepare(crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout, fingerprint: Mapping[str, str]) -> Trainer:
    """This rank's trainer of the run. Collective; what is wrong at one rank is raised at all of them.

    Raises ConfigError where the task does not fit the run, or the device has too little memory for the model.
    """

    def build() -> tuple[Any, Any, Parallel]:
        task = task_of(config, run)
        check_fingerprint(fingerprint_of(task), fingerprint)
        parallel = holding(crew, config, run, layout, crew.mine)
        model = build_model(task, run.run.seed)
        build_optimizer(run.inner, model)  # nothing is allocated yet; what is wrong with it is said here
        layout.check_model(TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters())
        return task, model, parallel

    task, model, parallel = crew.team.agree(build)
    seat = take_seat(crew.team, crew.groups, backend(crew.found.make))
    return Trainer(task, model, layout, run, crew.device, crew.throttle, crew.how, parallel, seat)


def task_of(config: SiteConfig, run: RunConfig) -> Any:
    """The run's task as this machine has it: `[task] use` and `[data]` of the site override the run's."""
    use = config.task.use if config.task else run.task.use
    return load_task(use, {**run.task.options(), **config.data}, config.base)


def needed(
    crew: Crew, run: RunConfig, layout: Layout, parallel: Parallel, group: int, *, apart: bool = False
) -> Needed:
    """What each device of a group must hold at least; `apart`: as a learner of its own."""
    overlap, members = run.rounds.overlap_steps, len(crew.groups[group].ranks)
    sum_ = memory_needed(
        layout,
        run.inner.optimizer,
        feedback=run.wire.error_feedback,
        overlap=overlap if isinstance(overlap, int) else None,
        steps=run.inner.steps,
        shards=members if parallel == "fsdp" else 1,
        holders=members,
    )
    # Of groups that average, the first one holds what is the learner's.
    return sum_ if apart or group == 0 else replace(sum_, feedback=0, snapshots=0)


def free(crew: Crew, group: int) -> int | None:
    """Bytes that every device of a group has for the site; None where one does not say."""
    return min(crew.ranks[rank].free for rank in crew.groups[group].ranks) or None


def holding(
    crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout, group: int, *, apart: bool = False
) -> Parallel:
    """How a group holds the model: whole on each device where there is room, else in shards, unless [devices] parallel
    says which. Raises ConfigError, with the sum, where it has too little memory."""
    wanted, members, have = config.devices.parallel, crew.groups[group].ranks, free(crew, group)
    ways: list[Parallel] = [wanted] if wanted != "auto" else ["ddp", "fsdp"] if len(members) > 1 else ["ddp"]
    if have is None:
        return ways[0]
    least = min(members, key=lambda rank: crew.ranks[rank].free)
    for way in ways:
        short = needed(crew, run, layout, way, group, apart=apart).shortage(crew.called(least), have)
        if short is None:
            return way
    raise ConfigError(f"[devices]: the model {short}")


def follow(crew: Crew, config: SiteConfig) -> Order:
    """A rank that is not the head: trains as it is told, until there is an order that is not for a trainer."""
    with in_words(crew.team):
        while True:
            order = crew.team.hear()
            while order["do"] == "prepare":
                run, layout = received_run(order["config"]), Layout.from_wire(order["layout"])
                devices = config.devices.model_copy(update={"parallel": order["parallel"]})
                config = config.model_copy(update={"devices": devices})  # the head's, or ranks would not meet
                order = serve(prepare(crew, config, run, layout, order["fingerprint"]))
                gc.collect()  # a model and its layers know each other
            if order["do"] != "tick":
                return order
