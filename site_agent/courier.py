"""The courier: everything that a site does with the network, beside the training.

The learner hands it contributions and asks for versions; what becomes of them comes back as events that the
learner looks at between steps. It deals with every coordinator of the run, and the learner knows of one run alone:
what goes to a coordinator is named as that one names it (`Home`), what comes back as the whole run does.
`Courier` works on whatever event loop it is called on; `CourierThread` gives it one of its own.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from shared.compression import Compression
from shared.config import WireTable, received_run
from shared.errors import FaultError, IsthmusError, RefusedError
from shared.protocol import PART_BYTES, Code, Evaluation, Joined, OpenUpload, Orders
from shared.sharding import Slice
from shared.task import Manifest
from shared.wire import blob_digest, open_container
from site_agent.branch import LEAVE_SECONDS, Branch, Home
from site_agent.contribution import Address, Anchor, Parcel, pack
from site_agent.core.alignment import How
from site_agent.history import History
from site_agent.link import Link, Refusal
from site_agent.metrics import Metrics
from site_agent.news import Accepted, ArrivedAnchor, Event, Failed, Ordered, Report, Touch
from site_agent.outbox import Outbox
from site_agent.versions import Versions
from site_agent.whole import homes_of, whole_joined, whole_orders

log = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEATS_PER_LEASE = 15
READY_HEARTBEAT_SECONDS = 0.25


@dataclass(frozen=True)
class _Turned:
    """A contribution that was refused, and how to go on: from `anchor` (None: a snapshot) to the newest version."""

    anchor: Anchor | None
    newest: int
    how: How


@dataclass(frozen=True)
class _Packed:
    """A contribution's container, and the base version and the codec that it names."""

    body: bytes
    base_version: int
    codec: str


class Courier:
    """Errands on one event loop. `connect` gives the link to a coordinator's URL, `url` is the first one's. `post`
    takes the events; `report` is read with each heartbeat: set it whole."""

    def __init__(
        self, connect: Callable[[str], Link], url: str, site: str, metrics: Metrics, post: Callable[[Event], None]
    ) -> None:
        self.report = Report("preparing")
        self.repairs = 0
        self.evaluates = True
        self.evaluation: Evaluation | None = None
        self.soon_seconds = READY_HEARTBEAT_SECONDS
        self.heartbeats_per_lease = HEARTBEATS_PER_LEASE
        self.metrics = metrics
        self.branches: list[Branch] = []
        self._connect, self._url, self._site, self._post = connect, url, site, post
        self._homes: list[Home] = []
        self._undelivered, self._delivered = 0, asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()
        self._wire: WireTable
        self._compression: Compression
        self._outbox: Outbox
        self._versions: Versions

    # -- called by the learner, who never waits for them

    @property
    def addresses(self) -> list[Address]:
        """How the containers of each fragment name it."""
        return [home.address for home in self._homes]

    def begin_exchange(self, wire: WireTable, outbox: Outbox, history: History) -> None:
        """What it needs to know before contributions and versions can travel."""
        self._wire, self._outbox, self._compression = wire, outbox, Compression(wire.zstd_level)
        self._versions = Versions(self._homes, wire.publish, history, self.count_repair)

    def send(self, parcel: Parcel) -> None:
        """Packs and uploads a contribution, and brings the version that it leads to."""
        self._start(lambda: self._deliver(parcel))

    def repeat(self, parcel: Parcel, version: int) -> None:
        """Nothing is sent: of this contribution it is known that it was accepted, and that `version` came next."""
        self._start(lambda: self._retrace(parcel.fragment, parcel.anchor, version, "align", delivered=True))

    def retrace(self, fragment: int, anchor: Anchor, version: int, how: How) -> None:
        """Brings exactly `version`, which this site has been at before."""
        self._start(lambda: self._retrace(fragment, anchor, version, how, delivered=False))

    def await_version(self, fragment: int, anchor: Anchor, version: int) -> None:
        """Brings the version that holds a contribution which was accepted before a restart."""
        self._start(lambda: self._bring(fragment, anchor, version, "align"))

    def fetch(self, fragment: int, anchor: Anchor | None, version: int, how: How) -> None:
        """Brings `version` or a newer one, by deltas from `anchor` where these are fewer bytes than a snapshot."""
        self._start(lambda: self._bring(fragment, anchor, version, how))

    def count_repair(self) -> None:
        """A version came out as other bits than it should, and was replaced."""
        self.repairs += 1
        self.metrics.repairs.inc()

    def hurry(self) -> None:
        """The next heartbeat to the coordinator that leases data goes now."""
        self.branches[0].hurry.set()

    def evaluated(self, anchors: Sequence[Anchor], loss: float) -> None:
        """Reports an evaluation of these versions with the next heartbeat. The first coordinator asked for it, and
        counts the tokens of its own fragments."""
        mine = Slice(0, len(self.branches)).of(anchors)
        self.evaluation = Evaluation(tokens=sum(anchor.tokens for anchor in mine) // len(mine), loss=loss)

    # -- life

    async def join(self, patience: float) -> Joined:
        """Joins the run, at each of its coordinators, and begins to send heartbeats. Raises RefusedError, FaultError,
        ConfigError."""
        first = await self._join(self._url, patience)
        for url in received_run(first.config).run.coordinators[1:]:
            try:
                await self._join(url, patience)
            except RefusedError as error:
                raise RefusedError(error.code, f"{url}: {error.detail}") from None
        joined = whole_joined([branch.joined for branch in self.branches])
        self._homes = homes_of(self.branches, joined)
        self._tell_orders()
        return joined

    async def _join(self, url: str, patience: float) -> Joined:
        """Joins the next coordinator. Its lease runs from then on, however long the others take."""
        branch = Branch(self._connect(url), len(self.branches), self)
        self.branches.append(branch)
        await branch.join(patience, like=self.branches[0].joined if branch.index else None)
        self._spawn(branch.heartbeats())
        return branch.joined

    async def ask_orders(self) -> Orders | None:
        """A heartbeat now, and the orders that it brings; None where the coordinator does not answer soon."""
        try:
            return await self.branches[0].ask_orders()
        except IsthmusError as error:
            log.warning("no orders: %s", error)
            return None

    async def describe(self, manifest: Manifest) -> None:
        """Says what this site's data is cut into. Raises RefusedError where it is not what the others have."""
        await self.branches[0].link.describe(manifest.digest, list(manifest.sizes))

    async def leave(self, *, back_soon: bool = False) -> None:
        """Ends all errands, and leaves the run if it can within a few seconds; not where the site will be `back_soon`:
        within its lease it is waited for."""
        under_way = list(self._jobs)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await asyncio.gather(*(branch.leave(back_soon=back_soon) for branch in self.branches))

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

    # -- what the coordinators say

    def heard(self, branch: Branch, orders: Orders) -> None:
        """New orders came from a coordinator; nobody else hears of them before all were joined."""
        news, branch.orders = orders != branch.orders, orders
        if news and self._homes:
            self._tell_orders()

    def _tell_orders(self) -> None:
        told = [branch.orders for branch in self.branches if branch.orders is not None]
        self._post(Ordered(whole_orders(told)))
        for branch, orders in zip(self.branches, told, strict=True):
            # As they would be without a lease to evaluate: a second such lease must count as news, and the first as
            # none when another coordinator has something to say.
            branch.orders = orders.model_copy(update={"evaluate": False})

    def touched(self, changed: bool) -> None:
        """A coordinator answers, or not."""
        self.metrics.connected.set(int(all(branch.answers for branch in self.branches)))
        if changed:
            self._post(Touch(frozenset(p for p, home in enumerate(self._homes) if not home.branch.answers)))

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
                self.metrics.accepted.inc()
                self._post(fate)
                await self._bring(p, parcel.anchor, version, "align")
            case _Turned(anchor, newest, how):
                await self._bring(parcel.fragment, anchor, newest, how)

    async def settled(self) -> None:
        """Until every contribution that was sent is with its coordinator, or refused."""
        while self._undelivered:
            self._delivered.clear()
            await self._delivered.wait()

    async def _offer(self, parcel: Parcel) -> Accepted | _Turned:
        """Sends a contribution until it is known what became of it."""
        p, home = parcel.fragment, self._homes[parcel.fragment]
        branch = home.branch
        await self._versions.kept(p)  # what is in the outbox, can be made again on the version that it was made on
        packed = await asyncio.to_thread(self._prepare, parcel)
        base, body = packed.base_version, packed.body
        digest = blob_digest(body)
        while True:
            session = branch.session
            opening = OpenUpload(
                run=home.address.run,
                site=self._site,
                session=session,
                fragment=home.address.fragment.index,
                base_version=base,
                codec=packed.codec,
                size=len(body),
                digest=digest,
                part_size=PART_BYTES,
                body=None,
            )
            try:
                return Accepted(p, (await branch.link.contribute(opening, body)).version, delivered=True)
            except Refusal as refusal:
                self.metrics.refused.labels(refusal.code).inc()
                newest = refusal.version or base
                match refusal.code:
                    case Code.NOT_A_MEMBER:
                        await branch.rejoin(session)
                    case Code.SUPERSEDED if session != branch.session:
                        pass  # this courier itself has joined again meanwhile
                    case Code.WRONG_DIGEST:
                        log.warning("a contribution was damaged on its way; sending it again")
                    case Code.ALREADY_CONTRIBUTED:
                        # By this site before a restart. Where these are not the very same bytes (it has lost its
                        # memory), what the others left out is not known.
                        return Accepted(p, max(base + 1, newest), delivered=parcel.recorded)
                    case Code.RUN_FINISHED:
                        await asyncio.to_thread(self._forget, parcel)
                        return _Turned(parcel.anchor, newest, "overwrite")
                    case Code.WRONG_CODEC if packed.codec == self._wire.upload_codec:
                        raise  # the next one would be refused as well
                    case Code.TOO_STALE | Code.UNKNOWN_BASE | Code.WRONG_BASE | Code.WRONG_CODEC:
                        log.warning("fragment %d is aligned anew: %s", p, refusal.detail)
                        # First: a contribution that comes up again after a restart counts as delivered.
                        await asyncio.to_thread(self._forget, parcel)
                        sound = refusal.code in (Code.TOO_STALE, Code.WRONG_CODEC)
                        anchor = parcel.anchor if sound else None
                        return _Turned(anchor, newest, "rebase")
                    case _:
                        raise

    def _prepare(self, parcel: Parcel) -> _Packed:
        """The contribution as it is sent. It is in the outbox from here on."""
        p, home = parcel.fragment, self._homes[parcel.fragment]
        if isinstance(parcel.content, bytes):
            with open_container(parcel.content, home.address.fragment) as container:
                header = container.header
            return _Packed(parcel.content, header.base_version, header.codec)
        if home.branch.index:
            parcel = replace(parcel, progress=())  # data is leased by the first alone
        link = home.branch.link.pace.bytes_per_second
        body = pack(parcel, home.address, self._wire, self._site, self._compression, link)
        try:
            self._outbox.put(parcel.number, p, body)
        except OSError as error:
            log.error(
                "a contribution is not in the outbox (%s): if this agent is killed, its steps count as lost", error
            )
        return _Packed(body, parcel.anchor.version, self._wire.upload_codec)

    def _forget(self, parcel: Parcel) -> None:
        try:
            self._outbox.drop(parcel.number, parcel.fragment)
        except OSError as error:
            log.error("a refused contribution stays in the outbox: %s", error)

    # -- versions

    async def _bring(self, p: int, anchor: Anchor | None, version: int, how: How) -> None:
        """Posts the anchor of `version`, waiting for it, or of a newer one where only that is to be had."""
        found, jumped = await self._versions.bring(p, anchor, version)
        self._post(ArrivedAnchor(p, found, how, jumped))

    async def _retrace(self, p: int, anchor: Anchor, version: int, how: How, *, delivered: bool) -> None:
        """Posts the acceptance of what is known to be `delivered`, then the anchor of `version`."""
        if delivered:
            self._post(Accepted(p, version, delivered=True))
        along = await self._versions.by_deltas(p, anchor, version)
        if along is None:
            raise FaultError(f"version {version} of fragment {p} cannot be come back to; start this agent again")
        self._post(ArrivedAnchor(p, along, how))


class CourierThread(Courier):
    """The same in a thread of its own, for a caller that trains meanwhile. What it asks for and needs the answer of,
    it waits for."""

    def __init__(self, connect: Callable[[str], Link], url: str, site: str, metrics: Metrics) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        super().__init__(connect, url, site, metrics, self.events.put)
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
        self._loop.call_soon_threadsafe(super().hurry)

    def orders(self) -> Orders | None:
        return self._wait_for(self.ask_orders())

    def settle(self, seconds: float) -> bool:
        """Whether everything that was sent is with the coordinator within so many seconds."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(self.settled(), seconds), self._loop).result()
        except TimeoutError:
            return False
        return True

    def close(self, *, back_soon: bool = False) -> None:
        """Leaves the run as `leave` does, and ends the thread."""
        if not self._thread.is_alive():
            return
        try:
            leaving = self.leave(back_soon=back_soon)
            asyncio.run_coroutine_threadsafe(leaving, self._loop).result(timeout=LEAVE_SECONDS + 5)
        except TimeoutError:
            log.warning("left without a goodbye: the connections do not close")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, errand: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(errand, self._loop).result()

    def _start(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(job()))
