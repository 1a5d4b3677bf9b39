"""One schedule: a run with its faults, from the first join to the last weights.

Coordinator and sites are the real ones; what stands around them is imagined: time, threads, disks, links. A process
that is killed keeps nothing but what its disk had made durable. `Auditor` looks on.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from coordinator.api.app import Api
from coordinator.core.membership import LEASE_SECONDS
from coordinator.machine import Machine
from coordinator.service import Coordinator
from lab.simulator.audit import Auditor, Violation
from lab.simulator.counting import LEASED, CountingTrainer, LeasedSteps, Steps, Stride
from lab.simulator.disk import Crashed, FaultyDisk
from lab.simulator.loop import Deadlock, Lanes, VirtualLoop
from lab.simulator.network import Imagined, Routes, Weather, Wire
from shared.config import RunConfig, UploadCodec, received_run
from shared.errors import FaultError, IsthmusError, RefusedError
from shared.fragments import Layout
from shared.task import Shard
from site_agent.branch import CONFIG_CHANGED
from site_agent.core.site import SiteCore
from site_agent.courier import Courier
from site_agent.learner import Hear, Learner, Place, Train
from site_agent.link import Link
from site_agent.metrics import Metrics as SiteMetrics
from site_agent.news import Event
from site_agent.transport import Reply

log = logging.getLogger(__name__)

PART_BYTES = 96
"""Tiny contributions go in several parts all the same."""
OUTAGE_STEPS = 5
AWAY_SECONDS = 60.0
CORES = 2
"""Of the imagined machine, whatever the real one has: what is screened side by side is part of a seed's order."""
TICK_SECONDS, SOON_SECONDS, HEARTBEATS_PER_LEASE = 10.0, 4.0, 3
"""Virtual seconds between ticks and early heartbeats, and how many others: where nothing happens, nothing need be
computed."""

_life: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


class Life:
    """One life of one process: its tasks, which end with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.over = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.at_end: list[Callable[[], None]] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """`work` as a task of this life, and whatever tasks it starts."""
        token = _life.set(self)
        try:
            return asyncio.get_running_loop().create_task(work)
        finally:
            _life.reset(token)

    def end(self) -> None:
        """Everything stops where it is."""
        if self.over:
            return
        self.over = True
        for act in self.at_end:
            act()
        for task in list(self.tasks):
            task.cancel()


def task_factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    """Tasks belong to the life that starts them."""
    task = asyncio.Task(work, loop=loop, **options)
    life = _life.get()
    if life is not None:
        life.tasks[task] = None
        task.add_done_callback(lambda done: life.tasks.pop(done, None))
        if life.over:
            task.cancel()
    return task


@dataclass(frozen=True)
class Fault:
    """Something that happens to `whom` ("coordinator" or a site) at a time, for so many seconds."""

    at: float
    kind: str
    whom: str
    seconds: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.at:7.2f} {self.kind} {self.whom} ({self.seconds:.1f} s, {self.count})"


@dataclass(frozen=True)
class Schedule:
    """What a simulation is of. `seed` decides everything that is left open. `repeats`: whatever the faults, the run
    must end in the bits of the same run without any."""

    seed: int
    config: RunConfig
    sites: tuple[str, ...]
    step_seconds: dict[str, float]
    weather: dict[str, Weather]
    faults: tuple[Fault, ...]
    checkpoint_seconds: float
    in_parts: bool = False
    lease_seconds: float = LEASE_SECONDS
    repeats: bool = False
    leased: bool = False
    joins_at: dict[str, float] = field(default_factory=dict)
    limit: float = 3_000.0


class CoordinatorProcess:
    """The coordinator, as often as it lives."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.life: Life | None = None
        self.coordinator: Coordinator | None = None
        self.routes: Routes | None = None
        self.disk: FaultyDisk | None = None
        self.paused = asyncio.Event()
        self.paused.set()
        self._is_up = asyncio.Event()

    def start(self) -> None:
        life = self.life = Life("coordinator")
        life.run(self._live(life))

    def kill(self) -> None:
        life, disk, coordinator = self.life, self.disk, self.coordinator
        if life is None:
            return
        self.world.note("the coordinator is killed")
        self.routes, self.coordinator, self.life = None, None, None
        life.end()
        if disk is not None:
            disk.crash()
        if coordinator is not None:
            self.world.auditor.closed()
            _release(coordinator)

    def answer(self, work: Callable[[], Awaitable[Reply]]) -> asyncio.Future[Reply] | None:
        life = self.life
        if life is None or life.over:
            return None

        async def held() -> Reply:
            await self.paused.wait()
            return await work()

        return life.run(held())

    async def _live(self, life: Life) -> None:
        world = self.world

        def crashed() -> None:
            world.loop.call_soon(self._crashed, life)

        self.disk = disk = FaultyDisk(world.rng, crashed, world.auditor.committed)
        disk.crash_in, world.coordinator_crash_in = world.coordinator_crash_in, None

        def lanes(count: int, name: str) -> Lanes:
            return Lanes(count, world.duration)

        machine = Machine(clock=world.loop.time, wall=world.wall, disk=disk, pool=lanes, cores=CORES)
        try:
            coordinator = await Coordinator.open(world.config, self.directory, self.directory, machine)
        except IsthmusError as error:
            if life is self.life:
                world.failed(Violation("a restart recovers", str(error)))
            return
        except OSError as error:
            if life is not self.life:
                return
            world.note(f"the coordinator cannot start: {error}")
            self.life = None
            life.end()
            disk.crash()
            world.later(5.0, self.start_if_down)
            return
        except Exception as error:
            if life is self.life:
                world.failed(error)
            return
        coordinator.tick_seconds = TICK_SECONDS
        coordinator.lending.away_seconds = AWAY_SECONDS
        coordinator.core.members.lease_seconds = world.schedule.lease_seconds
        if world.schedule.in_parts:
            coordinator.intake.uploads.part_bytes = PART_BYTES
        self.coordinator = coordinator
        world.auditor.opened(coordinator)
        self.routes = Routes(Api(coordinator, insecure=True), world.auditor.heard)
        await coordinator.start()
        self._is_up.set()
        self._is_up = asyncio.Event()
        try:
            await asyncio.shield(coordinator.failure)
        except Crashed:
            return
        except asyncio.CancelledError:
            return
        except FaultError as error:
            world.note(f"the coordinator gives up: {error}")
            self.kill()
            world.later(5.0, self.start_if_down)
        except Exception as error:
            if life is self.life:
                world.failed(Violation("the coordinator goes on", f"{type(error).__name__}: {error}"))

    def start_if_down(self) -> None:
        if self.life is None:
            self.start()

    async def up(self) -> Coordinator:
        """The coordinator, once there is one again."""
        while self.coordinator is None:
            await self._is_up.wait()
        return self.coordinator

    def _crashed(self, life: Life) -> None:
        if life is self.life:
            self.kill()
            self.world.later(self.world.rng.uniform(0.5, 20.0), self.start_if_down)


class SiteProcess:
    """A site agent, as often as it lives."""

    def __init__(self, world: World, name: str, directory: Path) -> None:
        self.world, self.name, self.directory = world, name, directory
        self.wire = Wire(world.schedule.weather[name])
        self.life: Life | None = None
        self.learner: Learner | None = None
        self.disk: FaultyDisk | None = None
        self.running = asyncio.Event()
        self.running.set()
        self.crash_in: int | None = None
        self.done = False

    @property
    def core(self) -> SiteCore | None:
        """The decisions of an agent that has begun to train."""
        return None if self.learner is None else getattr(self.learner, "core", None)

    def start(self) -> None:
        life = self.life = Life(self.name)
        life.run(self._live(life))

    def kill(self) -> None:
        if self.life is None or self.done:
            return
        self.world.note(f"site {self.name} is killed")
        life, disk = self.life, self.disk
        self.life, self.learner = None, None
        self.wire.upload(-self.wire.uploading)
        life.end()
        if disk is not None:
            disk.crash()

    def start_if_down(self) -> None:
        if self.life is None and not self.done:
            self.start()

    async def _live(self, life: Life) -> None:
        world = self.world
        try:
            await self._train(life)
            self.done = True
            world.note(f"site {self.name} is done")
        except (Crashed, asyncio.CancelledError):
            if life is self.life:
                self.kill()
                world.later(world.rng.uniform(0.5, 30.0), self.start_if_down)
        except FaultError as error:
            if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, OSError | Crashed):
                world.failed(error.__cause__)
            world.note(f"site {self.name} gives up: {error}")
            self.kill()
            world.later(10.0, self.start_if_down)
        except Violation as violation:
            world.failed(violation)
        except IsthmusError as error:
            if isinstance(error, RefusedError) and error.code == CONFIG_CHANGED:
                world.note(f"site {self.name} ends: {error}")
                self.kill()
                world.later(world.rng.uniform(0.5, 30.0), self.start_if_down)
                return
            world.failed(Violation("a site is refused for good", f"{self.name}: {error}"))
        except Exception as error:
            world.failed(error)

    async def _train(self, life: Life) -> None:
        world, news = self.world, asyncio.Queue[Event]()
        self.disk = disk = FaultyDisk(world.rng, lambda: None)
        disk.crash_in, self.crash_in = self.crash_in, None
        metrics = world.site_metrics
        transport = Imagined(self.name, self.wire, world.coordinator, lambda: world.coordinator.routes, world.rng)
        link = Link(transport, self.name, patience=3600.0)
        link.measured_bytes = 1  # its versions are all small
        if world.schedule.in_parts:
            link.inline_bytes = 0
        courier = Courier(lambda url: link, transport.url, self.name, metrics, news.put_nowait)
        courier.evaluates, courier.soon_seconds = False, SOON_SECONDS
        courier.heartbeats_per_lease = HEARTBEATS_PER_LEASE
        joined = await courier.join(3600.0)
        run = received_run(joined.config)
        trainer = CountingTrainer(Layout.from_wire(joined.layout), run, Stride(self.name))
        # A machine is not as fast as it was before its restart, and so its cycles are not where they were.
        seconds = world.schedule.step_seconds[self.name] * world.rng.choice((0.25, 1.0, 1.0, 4.0))
        trainer.seconds = seconds
        streams: Callable[[Shard], Any] = lambda shard: Steps()  # noqa: E731
        if world.schedule.leased:
            await courier.describe(LEASED)
            leased = LeasedSteps(self.directory, disk, joined.run, partial(world.auditor.trained, self.name))
            streams = lambda shard: leased  # noqa: E731
        place = Place(self.directory, world.schedule.checkpoint_seconds, Lanes(1, world.duration), disk)
        learner = self.learner = Learner(
            run,
            joined,
            trainer,
            streams,
            courier,
            _NoEvaluator(),
            metrics,
            place,
            world.loop.time,
            seconds,
            outage_steps=OUTAGE_STEPS,
        )
        await self._drive(learner, news, seconds)
        world.auditor.site_done(self.name, learner)
        await courier.leave()

    async def _drive(self, learner: Learner, news: asyncio.Queue[Event], seconds: float) -> None:
        world, course = self.world, learner.course()
        try:
            need = next(course)
            while True:
                events = [await news.get()] if isinstance(need, Hear) else []
                await self.running.wait()
                if isinstance(need, Train):
                    await asyncio.sleep(seconds * world.rng.uniform(0.8, 1.3))
                    learner.step()
                while not news.empty():
                    events.append(news.get_nowait())
                world.auditor.site_heard(self.name, events, learner)
                need = course.send(events)
                world.auditor.site_went_on(self.name, learner)
        except StopIteration:
            return


class _NoEvaluator:
    def begin(self, anchors: Any) -> None:
        pass

    def finish(self) -> None:
        pass


class World:
    """Runs one schedule. `run` raises Violation where an invariant breaks, and returns the final digests."""

    def __init__(self, schedule: Schedule, directory: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.schedule, self.directory, self._say = schedule, directory, say
        self.config = schedule.config
        """As the coordinator serves it at its next start."""
        self.rng = random.Random(schedule.seed)
        self.slow = 1.0
        self.clock_step = 0.0
        self.coordinator_crash_in: int | None = None
        self.site_metrics = SiteMetrics()
        self.loop: VirtualLoop
        self.coordinator: CoordinatorProcess
        self.sites: dict[str, SiteProcess] = {}
        self._failure: asyncio.Future[None]

    def run(self) -> list[tuple[int, str]]:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        random.seed(self.schedule.seed)
        self.loop = VirtualLoop(self.duration)
        self.loop.set_task_factory(task_factory)
        self.auditor = Auditor(self.schedule.config, self.schedule.sites, self.loop.time, self.failed)
        self.loop.set_exception_handler(lambda loop, context: None)
        asyncio.set_event_loop(self.loop)
        try:
            return self.loop.run_until_complete(self._course())
        except Deadlock as error:
            raise Violation("nobody waits for ever", str(error)) from None
        finally:
            self.coordinator.kill()
            for site in self.sites.values():
                site.done = False
                site.kill()
            self.loop.run_until_complete(asyncio.sleep(0))
            asyncio.set_event_loop(None)
            self.loop.close()

    @property
    def checks(self) -> int:
        """How often an invariant was looked at."""
        return self.auditor.checks

    def note(self, line: str) -> None:
        self._say(f"{self.loop.time():9.2f} {line}")

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.loop.call_later(seconds, act, context=contextvars.Context())

    def failed(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def duration(self) -> float:
        """Seconds that a job on a thread takes."""
        return self.rng.uniform(0.0001, 0.02) * self.slow

    def wall(self) -> float:
        """The clock on the wall, which somebody may set."""
        return 1.7e9 + self.loop.time() + self.clock_step

    async def _course(self) -> list[tuple[int, str]]:
        schedule = self.schedule
        self._failure = self.loop.create_future()
        self.coordinator = CoordinatorProcess(self, self.directory / "state")
        self.sites = {name: SiteProcess(self, name, self.directory / name) for name in schedule.sites}
        self.coordinator.start()
        for name, site in self.sites.items():
            self.later(schedule.joins_at.get(name, 0.0), site.start)
        for fault in schedule.faults:
            self.loop.call_at(fault.at, self._happen, fault)
        while not all(site.done for site in self.sites.values()):
            if self._failure.done():
                self._failure.result()
            if self.loop.time() > schedule.limit:
                raise Violation("the run ends", f"not finished after {schedule.limit:g} s: {self._state()}")
            await asyncio.wait([self._failure], timeout=5.0)
        if self._failure.done():
            self._failure.result()
        return await self.auditor.finished(await self.coordinator.up())

    def _state(self) -> str:
        coordinator = self.coordinator.coordinator
        versions = [] if coordinator is None else [f.version for f in coordinator.publication.newest]
        sites = {
            name: "done" if site.done else str(core.steps) if (core := site.core) is not None else "down"
            for name, site in self.sites.items()
        }
        return f"versions {versions}, sites {sites}"

    # -- faults

    def _happen(self, fault: Fault) -> None:
        self.note(f"fault: {fault.kind} {fault.whom} for {fault.seconds:.1f} s")
        later, site = self.later, self.sites.get(fault.whom)
        coordinator = self.coordinator
        match fault.kind:
            case "kill" if site is not None:
                site.kill()
                later(fault.seconds, site.start_if_down)
            case "kill":
                coordinator.kill()
                later(fault.seconds, coordinator.start_if_down)
            case "kill-at-write" if site is not None:
                if site.disk is not None:
                    site.disk.crash_in = fault.count
            case "kill-at-write":
                if coordinator.disk is not None and coordinator.life is not None:
                    coordinator.disk.crash_in = fault.count
            case "kill-in-recovery":
                coordinator.kill()
                self.coordinator_crash_in = fault.count
                later(fault.seconds, coordinator.start_if_down)
            case "other-codec":
                coordinator.kill()
                wire = self.config.wire
                others = [codec for codec in get_args(UploadCodec) if codec != wire.upload]
                wire = wire.model_copy(update={"upload": others[fault.count % len(others)]})
                self.config = self.config.model_copy(update={"wire": wire})
                later(fault.seconds, coordinator.start_if_down)
            case "cut" if site is not None:
                site.wire.cut = True
                later(fault.seconds, lambda: setattr(site.wire, "cut", False))
            case "pause" if site is not None:
                site.running.clear()
                later(fault.seconds, site.running.set)
            case "pause":
                coordinator.paused.clear()
                later(fault.seconds, coordinator.paused.set)
            case "full" | "broken":
                code = 28 if fault.kind == "full" else 5
                disk = site.disk if site is not None else coordinator.disk
                if site is not None:
                    self.auditor.forgetful.add(fault.whom)
                if disk is not None:
                    disk.fault = code
                    later(fault.seconds, lambda: setattr(disk, "fault", None))
            case "slow":
                self.slow = 500.0
                later(fault.seconds, lambda: setattr(self, "slow", 1.0))
            case "clock":
                self.clock_step += fault.seconds


def _release(coordinator: Coordinator) -> None:
    """Closes the files of a dead process, as its end would."""
    for journal in (coordinator.reader, coordinator._merge_reader, coordinator._history.journal):
        journal.close()
    coordinator.store.close()
