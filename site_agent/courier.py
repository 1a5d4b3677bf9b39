"""The courier: everything that a site does with the network, beside the training.

The learner hands it contributions and asks for versions; what becomes of them comes back as events that the
learner looks at between steps. An anchor is never changed in place: the courier builds the next one in a new
array, checks its digest, and passes it over whole. `Courier` works on whatever event loop it is called on;
`CourierThread` gives it one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import queue
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from shared.config import WireTable, received_run
from shared.errors import FaultError, FormatError, IsthmusError, RefusedError
from shared.fragments import Fragment, Layout, digest_flat
from shared.protocol import PART_BYTES, Code, DataReport, Evaluation, Heartbeat, Joined, OpenUpload, Orders
from shared.task import Manifest
from shared.wire import blob_digest, container_bound, open_container
from site_agent.contribution import Anchor, Parcel, encode, left_of
from site_agent.core.alignment import How
from site_agent.history import History
from site_agent.link import Link, Refusal, backoff
from site_agent.metrics import Metrics
from site_agent.outbox import Outbox

log = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEATS_PER_LEASE = 15
READY_HEARTBEAT_SECONDS = 0.25
LEAVE_SECONDS = 5.0
SNAPSHOT_TRIES = 8


@dataclass(frozen=True)
class Accepted:
    """The coordinator has the contribution; `residual` is the error feedback from now on (None: there is none)."""

    fragment: int
    version: int
    residual: Tensor | None


@dataclass(frozen=True)
class ArrivedAnchor:
    """A version is here. `jumped`: by a snapshot, and not by the deltas of those before."""

    fragment: int
    anchor: Anchor
    how: How
    jumped: bool = False


@dataclass(frozen=True)
class Ordered:
    """New orders came with a heartbeat."""

    orders: Orders


@dataclass(frozen=True)
class Failed:
    """The courier cannot go on, and so cannot the agent."""

    error: BaseException


@dataclass(frozen=True)
class Stop:
    """Somebody asked this program to stop (signal number)."""

    signal: int


@dataclass(frozen=True)
class Touch:
    """The coordinator answers again, or not any more."""

    answers: bool


@dataclass(frozen=True)
class Report:
    """What the agent says of itself with each heartbeat; see shared.protocol.Heartbeat. `starved`: it waits for
    data."""

    state: Literal["preparing", "ready", "training"]
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    overlap_seconds: float = 0.0
    sync_seconds: float = 0.0
    training_share: float = 0.0
    loss: float | None = None
    data: DataReport | None = None
    starved: bool = False


@dataclass(frozen=True)
class _Turned:
    """A contribution that was refused, and how to go on: from `anchor` (None: a snapshot) to the newest version."""

    anchor: Anchor | None
    newest: int
    how: How


Event = Accepted | ArrivedAnchor | Ordered | Touch | Failed | Stop


class Courier:
    """Errands on one event loop. `post` takes the events; `report` is read with each heartbeat: set it whole."""

    def __init__(self, link: Link, site: str, metrics: Metrics, post: Callable[[Event], None]) -> None:
        self.report = Report("preparing")
        self.repairs = 0
        self.evaluates = True
        self.soon_seconds = READY_HEARTBEAT_SECONDS
        self.heartbeats_per_lease = HEARTBEATS_PER_LEASE
        self._link, self._site, self._metrics, self._post = link, site, metrics, post
        self._link.in_touch = self._touch
        self._answers = True
        self._delta_bytes: dict[int, int] = {}
        self._undelivered, self._delivered, self._hurry = 0, asyncio.Event(), asyncio.Event()
        self._evaluation: Evaluation | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._session = ""
        self._rejoining = asyncio.Lock()
        self._joined: Joined
        self._layout: Layout
        self._wire: WireTable
        self._outbox: Outbox
        self._history: History
        self._keeping: dict[int, asyncio.Future[None]] = {}
        self._follows = False

    # -- called by the learner, who never waits for them

    def begin_exchange(self, layout: Layout, wire: WireTable, outbox: Outbox, history: History) -> None:
        """What it needs to know of the run before contributions and versions can travel."""
        self._layout, self._wire, self._outbox, self._history = layout, wire, outbox, history

    def send(self, parcel: Parcel) -> None:
        """Encodes and uploads a contribution, and brings the version that it leads to."""
        self._start(lambda: self._deliver(parcel))

    def repeat(self, parcel: Parcel, version: int) -> None:
        """Nothing is sent: of this contribution it is known that it was accepted, and that `version` came next."""
        self._start(lambda: self._retrace(parcel.fragment, parcel.anchor, version, "align", parcel))

    def retrace(self, fragment: int, anchor: Anchor, version: int, how: How) -> None:
        """Brings exactly `version`, which this site has been at before."""
        self._start(lambda: self._retrace(fragment, anchor, version, how, None))

    def await_version(self, fragment: int, anchor: Anchor, version: int) -> None:
        """Brings the version that holds a contribution which was accepted before a restart."""
        self._start(lambda: self._bring(fragment, anchor, version, "align"))

    def fetch(self, fragment: int, anchor: Anchor | None, version: int, how: How) -> None:
        """Brings `version` or a newer one, by deltas from `anchor` where these are fewer bytes than a snapshot."""
        self._start(lambda: self._bring(fragment, anchor, version, how))

    def count_repair(self) -> None:
        """A version came out as other bits than it should, and was replaced."""
        self.repairs += 1
        self._metrics.repairs.inc()

    def hurry(self) -> None:
        """The next heartbeat goes now."""
        self._hurry.set()

    def evaluated(self, evaluation: Evaluation) -> None:
        """Reports an evaluation with the next heartbeat."""
        self._evaluation = evaluation

    # -- life

    async def join(self, patience: float) -> Joined:
        """Joins the run and begins to send heartbeats. Raises RefusedError, FaultError, ConfigError."""
        await self._link.__aenter__()
        begun = False
        while not begun:
            self._joined = await self._link.join(_software(), patience)
            self._session = self._joined.session
            begun = await self._begin_session()
        self._follows = received_run(self._joined.config).rounds.pacing == "follow"
        self._spawn(self._heartbeats())
        return self._joined

    async def ask_orders(self) -> Orders | None:
        """A heartbeat now, and the orders that it brings; None where the coordinator does not answer soon."""
        try:
            return await self._link.heartbeat(self._heartbeat(self.report, self._evaluation), LEAVE_SECONDS)
        except IsthmusError as error:
            log.warning("no orders: %s", error)
            return None

    async def describe(self, manifest: Manifest) -> None:
        """Says what this site's data is cut into. Raises RefusedError where it is not what the others have."""
        await self._link.describe(manifest.digest, list(manifest.sizes))

    async def leave(self) -> None:
        """Ends all errands, and leaves the run if it can within a few seconds."""
        under_way = list(self._jobs)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        try:
            if self._session:
                async with asyncio.timeout(LEAVE_SECONDS):
                    # A last report, so that the books close on what was really done.
                    await self._link.heartbeat(self._heartbeat(self.report, self._evaluation), LEAVE_SECONDS)
                    await self._link.leave(self._session, LEAVE_SECONDS)
        except (TimeoutError, IsthmusError) as error:
            # (A coordinator that was restored, or serves another run, has nobody to say goodbye to.)
            moved = isinstance(error, RefusedError) and error.code == Code.WRONG_RUN
            log.log(logging.DEBUG if moved else logging.WARNING, "left without a goodbye: %s", error)
        finally:
            await self._link.__aexit__()

    def _start(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._spawn(job())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._jobs.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._post(Failed(error))

    def _touch(self, answers: bool) -> None:
        self._metrics.connected.set(int(answers))
        if answers != self._answers:
            self._answers = answers
            self._post(Touch(answers))

    # -- heartbeats

    async def _heartbeats(self) -> None:
        last: Orders | None = None
        while True:
            report, evaluation, session = self.report, self._evaluation, self._session
            try:
                orders = await self._link.heartbeat(self._heartbeat(report, evaluation))
            except Refusal as refusal:
                self._metrics.refused.labels(refusal.code).inc()
                if refusal.code == Code.NOT_A_MEMBER:
                    await self._rejoin(session)
                elif refusal.code != Code.SUPERSEDED or session == self._session:
                    raise  # (superseded by itself: an upload found out first that the lease was lost)
                continue
            if evaluation is not None and evaluation is self._evaluation:
                self._evaluation = None
            if orders != last:
                self._post(Ordered(orders))
                last = _without_evaluation(orders)
            pause = self._joined.lease_seconds / self.heartbeats_per_lease
            if report.state != "training" or report.starved or self._follows:
                # Who wants to join rounds that are about to close must hear of them in time, and who has no data to
                # train on is waiting for some.
                pause = min(pause, self.soon_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
            self._hurry.clear()

    def _heartbeat(self, report: Report, evaluation: Evaluation | None) -> Heartbeat:
        return Heartbeat(
            run=self._link.run,
            session=self._session,
            state=report.state,
            steps=report.steps,
            tokens=report.tokens,
            step_seconds=report.step_seconds,
            overlap_seconds=report.overlap_seconds,
            sync_seconds=report.sync_seconds,
            training_share=min(1.0, max(0.0, report.training_share)),
            loss=report.loss if report.loss is not None and abs(report.loss) <= 1e6 else None,
            evaluation=evaluation,
            repairs=self.repairs,
            evaluates=self.evaluates,
            data=report.data,
        )

    async def _rejoin(self, session: str) -> None:
        """Joins again after the lease was lost; once, however many requests found out."""
        async with self._rejoining:
            if self._session != session:
                return
            run = self._link.run
            log.warning("the lease was lost; joining again")
            begun = False
            while not begun:
                joined = await self._link.join(_software())
                if joined.run != run:
                    raise RefusedError(Code.WRONG_RUN, f"the coordinator now serves run {joined.run}, not {run}")
                if joined.config != self._joined.config:
                    raise RefusedError("config-changed", "the run's config was changed; start this agent again")
                self._session = joined.session
                begun = await self._begin_session()

    async def _begin_session(self) -> bool:
        """A session begins with its first heartbeat, and uploads wait for it; whether the coordinator still knew it."""
        try:
            orders = await self._link.heartbeat(self._heartbeat(self.report, None))
        except Refusal as refusal:
            if refusal.code != Code.NOT_A_MEMBER:
                raise
            return False
        self._post(Ordered(orders))
        return True

    # -- contributions

    async def _deliver(self, parcel: Parcel) -> None:
        self._undelivered += 1
        try:
            fate = await self._offer(parcel)
        finally:
            self._undelivered -= 1
            self._delivered.set()
        match fate:
            case Accepted(p, version, _):
                self._metrics.accepted.inc()
                self._post(fate)
                await self._bring(p, parcel.anchor, version, "align")
            case _Turned(anchor, newest, how):
                await self._bring(parcel.fragment, anchor, newest, how)

    async def settled(self) -> None:
        """Until every contribution that was sent is with the coordinator, or refused."""
        while self._undelivered:
            self._delivered.clear()
            await self._delivered.wait()

    async def _offer(self, parcel: Parcel) -> Accepted | _Turned:
        """Sends a contribution until it is known what became of it."""
        p = parcel.fragment
        if (keeping := self._keeping.get(p)) is not None:
            await keeping  # what is in the outbox, can be made again on the version that it was made on
        body, base, residual = await asyncio.to_thread(self._prepare, parcel)
        digest = blob_digest(body)
        while True:
            session = self._session
            opening = OpenUpload(
                run=self._link.run,
                site=self._site,
                session=session,
                fragment=p,
                base_version=base,
                size=len(body),
                digest=digest,
                part_size=PART_BYTES,
                body=None,
            )
            try:
                return Accepted(p, (await self._link.contribute(opening, body)).version, residual)
            except Refusal as refusal:
                self._metrics.refused.labels(refusal.code).inc()
                newest = refusal.version or base
                match refusal.code:
                    case Code.NOT_A_MEMBER:
                        await self._rejoin(session)
                    case Code.SUPERSEDED if session != self._session:
                        pass  # this courier itself has joined again meanwhile
                    case Code.WRONG_DIGEST:
                        log.warning("a contribution was damaged on its way; sending it again")
                    case Code.ALREADY_CONTRIBUTED:
                        # By this site before a restart. Where these are not the very same bytes (it has lost its
                        # memory), what the others left out is not known.
                        return Accepted(p, max(base + 1, newest), residual if parcel.recorded else None)
                    case Code.RUN_FINISHED:
                        await asyncio.to_thread(self._forget, parcel)
                        return _Turned(parcel.anchor, newest, "overwrite")
                    case Code.TOO_STALE | Code.UNKNOWN_BASE | Code.WRONG_BASE:
                        log.warning("fragment %d is aligned anew: %s", p, refusal.detail)
                        # First: a contribution that comes up again after a restart counts as delivered.
                        await asyncio.to_thread(self._forget, parcel)
                        anchor = None if refusal.code != Code.TOO_STALE else parcel.anchor
                        return _Turned(anchor, newest, "rebase")
                    case _:
                        raise

    def _prepare(self, parcel: Parcel) -> tuple[bytes, int, Tensor | None]:
        """The container to send, the base version that it names, and the error feedback once it is accepted. It is in
        the outbox from here on."""
        p, base = parcel.fragment, parcel.anchor.version
        fragment = self._layout.fragments[p]
        recorded = self._outbox.read(parcel.number, p) if parcel.recorded else None
        if recorded is not None:
            with open_container(recorded, fragment) as container:
                base = container.header.base_version
            return (
                recorded,
                base,
                left_of(parcel, fragment, self._wire, recorded) if self._wire.error_feedback else None,
            )
        body, residual = encode(parcel, fragment, self._wire, self._link.run, self._site)
        try:
            self._outbox.put(parcel.number, p, body)
        except OSError as error:
            log.error(
                "a contribution is not in the outbox (%s): if this agent is killed, its steps count as lost", error
            )
        return body, base, residual

    def _forget(self, parcel: Parcel) -> None:
        try:
            self._outbox.drop(parcel.number, parcel.fragment)
        except OSError as error:
            log.error("a refused contribution stays in the outbox: %s", error)

    # -- versions

    async def _bring(self, p: int, anchor: Anchor | None, version: int, how: How) -> None:
        """Posts the anchor of `version`, waiting for it, or of a newer one where only that is to be had."""
        jumped = anchor is None or not self._deltas_are_less(p, version - anchor.version)
        if anchor is None or jumped:
            anchor = await self._by_snapshot(p, version)
        while anchor.version < version:
            # A snapshot is of what is published; what is not published yet comes as deltas.
            along = await self._by_deltas(p, anchor, version)
            jumped |= along is None
            anchor = along or await self._by_snapshot(p, version)
        self._post(ArrivedAnchor(p, anchor, how, jumped))

    async def _retrace(self, p: int, anchor: Anchor, version: int, how: How, delivered: Parcel | None) -> None:
        """Posts the acceptance of what is known to be `delivered`, then the anchor of `version`."""
        if delivered is not None:
            _, _, residual = await asyncio.to_thread(self._prepare, delivered)
            self._post(Accepted(p, version, residual))
        along = await self._by_deltas(p, anchor, version)
        if along is None:
            raise FaultError(f"version {version} of fragment {p} cannot be come back to; start this agent again")
        self._post(ArrivedAnchor(p, along, how))

    def _deltas_are_less(self, p: int, count: int) -> bool:
        """Whether so many deltas are fewer bytes than one snapshot (fp32), by the size of the last or largest one."""
        fragment = self._layout.fragments[p]
        each = self._delta_bytes.get(p) or container_bound(fragment, self._wire.publish)
        return count == 1 or count * each < 4 * fragment.size

    async def _by_deltas(self, p: int, anchor: Anchor, version: int) -> Anchor | None:
        """`anchor` moved along to `version`; None where a delta is gone or leads to other bits than it should."""
        while anchor.version < version:
            if (known := await asyncio.to_thread(self._by_history, p, anchor)) is not None:
                anchor = known
                continue
            try:
                data = await self._link.delta(p, anchor.version + 1)
            except Refusal as refusal:
                if refusal.code not in (Code.VERSION_GONE, Code.NOT_FOUND):
                    raise
                return None
            self._delta_bytes[p] = len(data)
            try:
                anchor = await asyncio.to_thread(self._apply, self._layout.fragments[p], anchor, data)
            except FormatError as error:
                self.count_repair()
                log.error("fragment %d: %s; repaired from a snapshot", p, error)
                return None
            await self._keep(p, anchor.version, data)
        return anchor

    def _by_history(self, p: int, anchor: Anchor) -> Anchor | None:
        """The version after `anchor`, where this site has been at it before."""
        data = self._history.read(p, anchor.version + 1)
        if data is None:
            return None
        try:
            return self._apply(self._layout.fragments[p], anchor, data)
        except FormatError as error:
            log.error("fragment %d: the history's %s; asking the coordinator", p, error)
            self._history.drop(p, anchor.version + 1)
            return None

    async def _keep(self, p: int, version: int, data: bytes) -> None:
        """Puts a delta into the history, while whoever waits for its version goes on."""
        if (before := self._keeping.get(p)) is not None:
            await before

        def put() -> None:
            try:
                self._history.put(p, version, data)
            except OSError as error:
                log.error("a delta is not in the history (%s): if this agent is killed, it starts anew", error)

        self._keeping[p] = asyncio.ensure_future(asyncio.to_thread(put))

    async def _by_snapshot(self, p: int, version: int) -> Anchor:
        for attempt in range(1, SNAPSHOT_TRIES + 1):
            try:
                data = await self._link.snapshot(p, version)
                return await asyncio.to_thread(self._apply, self._layout.fragments[p], None, data)
            except Refusal as refusal:
                if refusal.code not in (Code.VERSION_GONE, Code.NOT_PUBLISHED, Code.NOT_FOUND):
                    raise
                # The version moved on while we asked, or is not published yet; the one that is named can be had now.
                version = refusal.version if refusal.version is not None else version
                if attempt == 1:
                    continue
            except FormatError as error:
                log.error("snapshot of fragment %d: %s; fetching it again", p, error)
            await asyncio.sleep(backoff(attempt, random.random()))
        raise FaultError(f"no sound snapshot of fragment {p} could be had; look at the coordinator's log")

    def _apply(self, fragment: Fragment, anchor: Anchor | None, data: bytes) -> Anchor:
        """A delta on top of `anchor`, or (None) a snapshot. Raises FormatError where it is not what it should be."""
        with open_container(data, fragment) as container:
            header = container.header
            expected = (
                ("snapshot", self._link.run, header.version)
                if anchor is None
                else ("delta", self._link.run, anchor.version + 1)
            )
            if (header.kind, header.run, header.version) != expected:
                raise FormatError(f"got {(header.kind, header.run, header.version)} in place of {expected}")
            flat = np.zeros(fragment.size, dtype=np.float32) if anchor is None else anchor.flat.copy()
            container.add_to(flat)
        digest = digest_flat(flat, fragment.chunks())
        if digest != header.digest:
            raise FormatError(f"version {header.version} came out as {digest} and not {header.digest}")
        return Anchor(header.version, digest, header.tokens, flat)


class CourierThread(Courier):
    """The same in a thread of its own, for a caller that trains meanwhile. What it asks for and needs the answer of,
    it waits for."""

    def __init__(self, link: Link, site: str, metrics: Metrics) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        super().__init__(link, site, metrics, self.events.put)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="courier", daemon=True)

    def begin(self, patience: float) -> Joined:
        """Starts the thread and joins the run. Raises RefusedError, FaultError, ConfigError."""
        self._thread.start()
        return self._wait_for(self.join(patience))

    def describe_data(self, manifest: Manifest) -> None:
        """Raises RefusedError where the others' data is another."""
        self._wait_for(self.describe(manifest))

    def hurry(self) -> None:
        self._loop.call_soon_threadsafe(self._hurry.set)

    def orders(self) -> Orders | None:
        return self._wait_for(self.ask_orders())

    def settle(self, seconds: float) -> bool:
        """Whether everything that was sent is with the coordinator within so many seconds."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(self.settled(), seconds), self._loop).result()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Leaves the run, if it can within a few seconds, and ends the thread."""
        if not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self.leave(), self._loop).result(timeout=LEAVE_SECONDS + 5)
        except TimeoutError:
            log.warning("left without a goodbye: the connections do not close")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, errand: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(errand, self._loop).result()

    def _start(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(job()))


def _without_evaluation(orders: Orders) -> Orders:
    """The orders as they would be without a lease to evaluate: a second such lease must count as news."""
    return orders.model_copy(update={"evaluate": False})


def _software() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)[:128], "system": platform.system()}
