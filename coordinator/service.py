"""The coordinator at work: carries out what the core decides, and answers what the API asks.

One event loop owns the core; nothing else touches it. The order of things is the promise: a round's row is
in the journal before its merge begins, the delta is on disk before the version's row, and the row is there
before anyone is told of the version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.core.membership import Report
from coordinator.core.run import CloseRound, Decision, Enrol, FinishRun, Refusal, RunCore, SiteActive, StartRun
from coordinator.history import History
from coordinator.intake import Intake
from coordinator.lending import Lending
from coordinator.machine import MACHINE, Machine
from coordinator.metrics import Metrics
from coordinator.mirroring import Mirroring
from coordinator.opening import open_states
from coordinator.outer.step import OuterState, Room, Stepped
from coordinator.plans import plan_of, rule_of
from coordinator.publication import Publication, Published
from coordinator.refused import Refused
from coordinator.store.files import tree_bytes
from coordinator.store.mirror import Place
from coordinator.store.recovery import execute
from coordinator.store.state_dir import StateDir
from coordinator.workers import Workers
from shared.codecs import DENSE
from shared.compression import Compression, usual_level
from shared.config import RunConfig
from shared.errors import IsthmusError
from shared.names import MOST_LEARNERS, site_of
from shared.protocol import (
    PROTOCOL,
    AwaitedRound,
    Code,
    DataOrders,
    FragmentVersion,
    Heartbeat,
    Join,
    Joined,
    Manifest,
    Orders,
    Preview,
    ShardMessage,
)
from shared.sharding import slice_of
from shared.wire import container_bound, unpacked

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
INVITATIONS = 4
"""Sessions that a site may have been given and not begun; more than one where an answer was lost."""


class Coordinator:
    """A run being coordinated: `open` it, `start` it on a running loop, let the API call it, `stop` it.

    `failure` is done with an exception once the coordinator cannot go on (a blob that it acknowledged cannot
    be read, say); the daemon then exits, and a restart recovers or says what is broken.
    """

    def __init__(
        self,
        config: RunConfig,
        store: StateDir,
        states: list[OuterState],
        workers: Workers,
        machine: Machine,
        mirror: Place | None = None,
    ) -> None:
        self.config, self.store = config, store
        self.run_id, self.layout, self.slice = store.run_id, store.layout, store.slice
        self._told_config = config.model_dump(mode="json", exclude={"store"})
        """Sites have no use for the coordinator's storage, and its mirror's URL may hold a secret."""
        self._fingerprint = store.fingerprint
        self.metrics, self.workers = workers.metrics, workers
        self.core = RunCore(plan_of(config, len(store.layout.fragments), store.sequence_tokens))
        self.clock, self._wall = machine.clock, machine.wall
        self.reader = store.journal.reader()
        self.evaluations = self.reader.evaluations()
        if self.evaluations:
            self.metrics.eval_loss.set(self.evaluations[-1][1])
        self._history = History(store.journal.reader())
        self.tick_seconds = TICK_SECONDS
        self._looking_back = asyncio.Lock()
        self._rounds: list[dict[str, Any]] = []
        self.failure: asyncio.Future[None] = asyncio.Future()
        self._delta_compression = Compression(config.wire.zstd_level)
        self._delta_level = usual_level(config.wire.zstd_level)
        snapshots = Compression(config.wire.zstd_level)
        link = self.core.members.slowest_download
        self.publication = Publication(store, states, self.reader, workers, snapshots, link, self.clock)
        self.lending = Lending(store.journal, self.reader, workers, len(states), config.run.seed)
        self.intake = Intake(
            self.core,
            store,
            self.reader,
            self.publication,
            workers,
            self.metrics,
            config.wire.upload_codec,
            self.lending,
            machine,
            self._carry_out,
        )
        self._states = states
        self._delta_bound = sum(container_bound(fragment, config.wire.publish) for fragment in self.layout.fragments)
        self._checkpoints = store.checkpoints(config.store.keep_checkpoints)
        self._merge_reader = store.journal.reader()
        self._mirroring = Mirroring(mirror, store, config.store, workers, machine)
        self._steady = [asyncio.Lock() for _ in states]
        self._merges: set[asyncio.Task[None]] = set()
        self._room = Room()
        publish = DENSE[config.wire.publish]
        self._room.reserve(max(sum(publish.size(chunk.size) for chunk in f.chunks()) for f in self.layout.fragments))
        self._stepping = asyncio.Lock()
        """Held from a step until its delta is on disk: however many rounds close at once, memory holds one delta."""
        self._timekeeper: asyncio.Task[None] | None = None
        self._news, self._due = asyncio.Event(), -math.inf
        """Whoever keeps time sleeps until `_due`, or until there is news that changes that."""
        self._disk_is_low = False
        self._absurd: set[tuple[str, str]] = set()
        self._stalled: set[str] = set()
        self._started = self.reader.meta("started") == "1"
        self._enrolled = {site.name for site in self.reader.sites() if site.enrolled}
        """Both as the journal has them: what a site is told, no crash may undo."""
        self._invited: dict[str, deque[str]] = {}
        self._joined = {site.name for site in self.reader.sites()}

    # -- life

    @classmethod
    async def open(
        cls, config: RunConfig, path: Path, base: Path, machine: Machine = MACHINE, shard: int | None = None
    ) -> Coordinator:
        """Holds the state directory; starts the run, or recovers it. Relative files in the config count from `base`.
        `shard`: which of the run's coordinators this is; None where it has but one.

        Raises ConfigError, CorruptError, OSError.
        """
        own = slice_of(config.run.coordinators, shard)
        mirror = Place(config.store.mirror) if config.store.mirror else None  # refused before anything is made
        store = StateDir.hold(path, machine.disk)
        workers = Workers(Metrics(), machine)
        try:
            states = await asyncio.to_thread(open_states, config, store, workers, machine, base, own)
            coordinator = cls(config, store, states, workers, machine, mirror)
        except BaseException:
            workers.shutdown()
            store.discard()
            raise
        return coordinator

    async def start(self) -> None:
        """Takes up the rounds where the journal left them, and begins to keep time."""
        sites = self.reader.sites()
        decisions = self.core.restore(
            versions=[(published.version, published.tokens) for published in self.publication.newest],
            accepted=((s.contribution, s.merged) for s in self.reader.contributions(newest_of_each=True)),
            roster=(site.name for site in sites if site.enrolled),
            active=((site.name, site.session or "") for site in sites if site.active),
            started=self._started,
            evaluated=max((tokens for tokens, _ in self.evaluations), default=-1),
            now=self.clock(),
        )
        self._timekeeper = asyncio.create_task(self._keep_time())
        self._timekeeper.add_done_callback(self._ended)
        await self._carry_out(decisions)
        # Whether the mirror can be written shows here, and not when the first checkpoint is due.
        self._mirroring.begin(self.core.tokens)

    async def stop(self) -> None:
        """Lets the merges and writes that are under way finish, then closes everything."""
        self.publication.close()
        self.workers.stopping.set()
        await self._mirroring.stop()
        if self._timekeeper is not None:
            self._timekeeper.cancel()
        while self._merges:
            await asyncio.gather(*self._merges, return_exceptions=True)
        await asyncio.to_thread(self.workers.shutdown)
        self.store.disk.remove(self.store.states)
        for journal in (self.reader, self._merge_reader, self._history.journal):
            journal.close()
        self.store.close()
        self.failure.cancel()

    # -- the control plane

    async def join(self, site: str, message: Join) -> Joined:
        """A new session for a site, and all that it needs to train. The session begins with its first heartbeat: this
        request may have been held up or repeated on its way, and must not end the session of an agent that lives."""
        if message.protocol != PROTOCOL:
            raise Refused(
                Code.WRONG_PROTOCOL, f"site {site} speaks protocol {message.protocol}, this coordinator {PROTOCOL}"
            )
        self._refuse_too_many_learners(site)
        session = uuid.uuid4().hex
        self._invited.setdefault(site, deque(maxlen=INVITATIONS)).append(session)
        self._joined.add(site)
        log.info("site %s joins (%s)", site, ", ".join(f"{k} {v}" for k, v in message.software.items()))
        return Joined(
            run=self.run_id,
            lineage=self.store.lineage,
            session=session,
            config=self._told_config,
            layout=self.layout.to_wire(),
            fragments=[
                FragmentVersion(
                    version=newest.version,
                    digest=newest.digest,
                    tokens=newest.tokens,
                    contributed=self.core.contributed(site, p),
                )
                for p, newest in enumerate(self.publication.newest)
            ],
            lease_seconds=self.core.members.lease_seconds,
            orders=self._orders(site),
            shard=self.slice.index,
            fingerprint=self._fingerprint,
        )

    def _refuse_too_many_learners(self, name: str) -> None:
        """Names are remembered for the run's life; who may make up how many is bounded."""
        site = site_of(name)
        others = [each for each in self._joined if each != site and site_of(each) == site]
        if name != site and name not in others and len(others) >= MOST_LEARNERS:
            raise Refused(
                Code.TOO_MANY_LEARNERS,
                f"site {site} has had {MOST_LEARNERS} learners in this run, the most that it may: use one of their "
                f"names again, such as {min(others)}",
            )

    def preview(self) -> Preview:
        """What a site would join."""
        return Preview(
            run=self.run_id,
            config=self._told_config,
            layout=self.layout.to_wire(),
            versions=[newest.version for newest in self.publication.newest],
            sites=len(self.core.roster),
            shard=self.slice.index,
            fingerprint=self._fingerprint,
        )

    async def heartbeat(self, site: str, message: Heartbeat) -> Orders:
        """Renews the site's lease, takes its report, and answers with its orders. A session's first one begins it."""
        self.check_run(message.run)
        await self._begin_session(site, message.session)
        report = Report(
            state=message.state,
            steps=message.steps,
            tokens=message.tokens,
            step_seconds=message.step_seconds,
            overlap_seconds=message.overlap_seconds,
            sync_seconds=message.sync_seconds,
            training_share=message.training_share,
            download_rate=message.download_rate,
            loss=message.loss,
            repairs=message.repairs,
            evaluates=message.evaluates,
        )
        await self._carry_out(_allowed(self.core.heartbeat(site, message.session, report, self.clock())))
        self._note_absurd_reports()
        self.metrics.show_report(site, report)
        if message.evaluation is not None:
            await self._evaluated(site, message.evaluation.tokens, message.evaluation.loss)
        data = None
        if message.data is not None:
            data = await self.lending.report(site, message.data, len(self.core.members.live))
        elif message.state == "training":
            await self.lending.give_back(site)
        return self._orders(site, data)

    async def describe(self, site: str, message: Manifest) -> None:
        """What the site's data is cut into, where it is to be leased."""
        self.check_run(message.run)
        await self.lending.describe(site, message)

    async def _begin_session(self, site: str, session: str) -> None:
        """A session that was given out begins; those that were given out before it never will."""
        invited = self._invited.get(site, deque())
        if session not in invited:
            return
        while invited.popleft() != session:
            continue
        try:
            await self.workers.write(self.store.journal.site_joined, site, session)
        except Refused:
            invited.appendleft(session)
            raise
        await self._carry_out(self.core.join(site, session, self.clock()))

    def _note_absurd_reports(self) -> None:
        """Counts and names a site whose report is bounded, once until it is believable again."""
        absurd = set(self.core.absurd_reports())
        for site, what in sorted(absurd - self._absurd):
            self.metrics.bounded.labels(site, what).inc()
            report = self.core.members.live[site].report
            said = f"{report.step_seconds:g} s a step" if what == "speed" else f"{report.overlap_seconds:g} s to spare"
            log.warning("site %s reports %s, too far from the others; bounded", site, said)
        self._absurd = absurd

    def _note_stalled(self) -> None:
        """Names a site that has gone silent, once until it sends something again."""
        stalled = set(self.core.stalled())
        for site in sorted(stalled - self._stalled):
            log.warning(
                "site %s is alive and has sent nothing for long; rounds do not count with it until it does", site
            )
        self._stalled = stalled

    async def leave(self, site: str, run: str, session: str) -> None:
        """A clean leave: rounds no longer wait for this site."""
        self.check_run(run)
        await self._carry_out(_allowed(self.core.leave(site, session, self.clock())))
        log.info("site %s left", site)

    def knows_site(self, name: str) -> bool:
        """Whether the site has a token or has taken part: a name that a metric may carry."""
        return name in self._joined or name in self.core.roster or self.reader.token(name) is not None

    async def rounds(self) -> list[dict[str, Any]]:
        """The last published rounds, newest first; as they were last read where the disk refuses."""
        async with self._looking_back:
            try:
                self._rounds = await self.workers.on(self.workers.screeners, self._history.read)
            except OSError as error:
                self.workers.storage_refusal(error)
            return self._rounds

    def check_run(self, run: str) -> None:
        """Every request names its run. Raises Refused where it is another one."""
        if run != self.run_id:
            raise Refused(Code.WRONG_RUN, f"this coordinator serves run {self.run_id}, not {run}")

    async def exposition(self) -> bytes:
        """The metrics, with the sizes on disk as of now."""
        sizes = await asyncio.to_thread(_sizes, self.store)
        self.metrics.show_sizes(*sizes, self._disk_needed())
        self._warn_of_the_disk(sizes[2])
        return self.metrics.exposition()

    def _disk_needed(self) -> int:
        """Bytes that may be written before anything is dropped again: until each fragment's next checkpoint, and it."""
        rounds, sites = self.config.store.checkpoint_versions, max(1, len(self.core.roster))
        states = sum(4 * state.fragment.size * (2 + len(state.slots)) for state in self._states)
        return rounds * (self._delta_bound + sites * self.intake.contribution_bound) + states

    def _warn_of_the_disk(self, free: int) -> None:
        """Once, until there is room again."""
        low, needed = free < self._disk_needed(), self._disk_needed()
        if low and not self._disk_is_low:
            log.warning("%d MB are free under %s; up to %d MB may be needed", free >> 20, self.store.path, needed >> 20)
        self._disk_is_low = low

    # -- carrying out decisions

    async def _carry_out(self, decisions: Iterable[Decision]) -> None:
        journal, durably = self.store.journal, self.workers.durably
        for decision in decisions:
            match decision:
                case StartRun(sites):
                    await durably(self.workers.writer, "the start", journal.start_run, sites)
                    self._started = True
                    self._enrolled.update(sites)
                    log.info("training starts with %s", ", ".join(sites))
                case SiteActive(site, active, expired):
                    if expired:
                        self.metrics.leases_lost.labels(site).inc()
                        log.warning("nothing was heard of site %s within its lease; rounds go on without it", site)
                    await durably(self.workers.writer, "a site's standing", journal.site_active, site, active)
                case Enrol(site):
                    await durably(self.workers.writer, "a site's enrolment", journal.enrol, site)
                    self._enrolled.add(site)
                case CloseRound():
                    members = list(zip(decision.contributions, decision.weights, strict=True))
                    await durably(
                        self.workers.writer,
                        "a round",
                        journal.close_round,
                        decision.fragment,
                        decision.version,
                        decision.reason,
                        members,
                        rule_of(self.config, decision, self._delta_level),
                        self._wall(),
                    )
                    task = asyncio.create_task(self._merge(decision))
                    self._merges.add(task)
                    task.add_done_callback(self._ended)
                case FinishRun():
                    log.info("run %s is finished: %d tokens merged", self.run_id, self.core.tokens)
                    await durably(self.workers.merger, "the last checkpoint", self._checkpoint_all, self.core.stalest())
                    self._mirroring.begin(self.core.tokens)
        self._note_stalled()
        self.metrics.show_core(self.core)
        wakeup = self.core.next_wakeup()
        if wakeup is not None and wakeup < self._due:
            self._news.set()

    async def _merge(self, close: CloseRound) -> None:
        """One round from its journal row to its publication."""
        # Held until a due checkpoint is written: it must not catch a step that the journal does not know yet.
        async with self._steady[close.fragment]:
            await self._merge_steadily(close)

    async def _merge_steadily(self, close: CloseRound) -> None:
        closed = self.clock()
        p, version, workers = close.fragment, close.version, self.workers
        async with self._stepping:
            link = self.core.members.slowest_download()
            stepped, seconds = await workers.on(workers.merger, self._execute, p, version, link)
            put = partial(self.store.blobs.put, executor=workers.chunks)
            digest = await workers.durably(workers.merger, "a delta", put, *stepped.delta)
            stepped = replace(stepped, delta=())
        await workers.durably(workers.writer, "a version", self.store.journal.publish, p, stepped, digest, self._wall())
        decisions = self.core.published(p, version, stepped.tokens, self.clock())
        self.publication.publish(p, Published(version, stepped.digests.published, self.core.fragments[p].tokens))
        self.metrics.show_round(close, stepped.merged_norm, stepped.cosine, seconds, self.clock() - closed)
        log.debug("fragment %d is at version %d (%s, %d)", p, version, close.reason, len(close.contributions))
        await self._carry_out(decisions)
        if version % self.config.store.checkpoint_versions == 0:
            await workers.durably(workers.merger, "a checkpoint", self._checkpoint, p, self.core.stalest())
            if self._mirroring.due():
                self._mirroring.begin(self.core.tokens)

    def _execute(self, fragment: int, version: int, link: float | None) -> tuple[Stepped, float]:
        """On the merge thread: the round's step and its seconds; and how hard the next deltas are compressed for sites
        whose `link` brings so many bytes per second."""
        round_ = self._merge_reader.round(fragment, version)
        if round_ is None:
            raise IsthmusError(f"round {fragment}/{version} is not in the journal")
        state, embeddings = self._states[fragment], self.store.embeddings
        began = self.clock()
        stepped = execute(
            state,
            round_,
            self._merge_reader,
            self.store.blobs,
            self.run_id,
            embeddings,
            self.workers.chunks,
            self._room,
        )
        seconds = self.clock() - began
        state.vectors.rest()
        self._delta_level = self._delta_compression.level(
            unpacked(stepped.delta[len(stepped.delta) // 2], round_.rule.zstd_level), link
        )
        return stepped, seconds

    def _checkpoint_all(self, stalest: int) -> None:
        for p in range(len(self._states)):
            self._checkpoint(p, stalest)

    def _checkpoint(self, fragment: int, stalest: int) -> None:
        """On the merge thread: saves the fragment, then drops what no checkpoint, no site and no contribution, which
        may have a base `stalest` versions old, needs any more."""
        self._checkpoints.save(self._states[fragment])
        self._states[fragment].vectors.rest()
        oldest = self._checkpoints.entries(fragment)[-1].version
        version, store = self._states[fragment].version, self.config.store
        # The digests of bases that a contribution may still have are in the rounds' rows.
        oldest_row = version - max(store.keep_rounds, stalest + 1)
        pruned = self.workers.writer.submit(
            self.store.journal.prune, fragment, oldest, version - store.keep_versions + 1, oldest_row
        )
        for digest in pruned.result():
            self.store.blobs.remove(digest)
        self._warn_of_the_disk(shutil.disk_usage(self.store.path).free)

    async def _keep_time(self) -> None:
        while True:
            self._news.clear()
            wakeup = self.core.next_wakeup()
            pause = self.tick_seconds if wakeup is None else min(self.tick_seconds, max(0.01, wakeup - self.clock()))
            self._due = self.clock() + pause
            with contextlib.suppress(TimeoutError):
                # What comes in meanwhile may bring the next time nearer.
                async with asyncio.timeout(pause):
                    await self._news.wait()
            self._due = -math.inf
            await self._carry_out(self.core.tick(self.clock()))
            await self.lending.take_back(self.core.members.live, self.clock())
            self._mirroring.retry(self.core.tokens)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._merges.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error(
            "the coordinator cannot go on: %s", error, exc_info=None if isinstance(error, IsthmusError) else error
        )
        if not self.failure.done():
            self.failure.set_exception(error)

    async def _evaluated(self, site: str, tokens: int, loss: float) -> None:
        if not self.core.evaluated(site, tokens):
            log.info("not counted: an evaluation by %s at %d tokens, not asked for or not news", site, tokens)
            return
        await self.workers.write(self.store.journal.evaluate, site, tokens, loss, self._wall())
        self.evaluations.append((tokens, loss))
        self.metrics.eval_loss.set(loss)
        log.info("eval loss %.4f at %d tokens (by %s)", loss, tokens, site)

    def _orders(self, site: str, data: DataOrders | None = None) -> Orders:
        index, count = self.core.shard(site, self._enrolled)
        pace = self.core.pacer.pace(site)
        if pace is not None:
            self.metrics.site_pace.labels(site).set(pace)
        return Orders(
            started=self._started,
            finished=self.core.finished,
            peers=self.core.pacer.peers(site),
            pace=pace,
            shard=ShardMessage(index=index, count=count, seed=self.config.run.seed),
            tokens=self.core.tokens,
            evaluate=self.core.take_evaluation(site, self.clock()),
            awaited=[AwaitedRound(fragment=p, version=version) for p, version in self.core.awaited(site)],
            closing=[AwaitedRound(fragment=p, version=version) for p, version in self.core.closing(site)],
            data=data,
        )


def _allowed(decisions: list[Decision] | Refusal) -> list[Decision]:
    if isinstance(decisions, Refusal):
        raise Refused(decisions.code, decisions.detail)
    return decisions


def _sizes(store: StateDir) -> tuple[int, int, int]:
    """Bytes of the journal, of the whole state directory, and free on its disk."""
    journal = store.journal.path
    files = (journal, journal.with_name(journal.name + "-wal"))
    held = sum(file.stat().st_size for file in files if file.exists())
    return held, tree_bytes(store.path), shutil.disk_usage(store.path).free
