"""The learner: one site's training from the answer to its join until the run is finished, without a thread or a clock.

`course` is a generator. It says what it needs next (an inner step, or to hear news) and is sent the news that came
meanwhile; whoever drives it owns time, threads and the network. The agent drives it in real time, the simulator in
virtual time. News are taken in between steps only, so that a run with a fixed τ takes the same course however messages
are timed.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.codecs.kernels import U8
from shared.config import RunConfig
from shared.errors import FaultError, IsthmusError
from shared.files import DISK, Disk
from shared.fragments import F32, Layout, digest_flat
from shared.protocol import FragmentVersion, Joined, Orders, ShardMessage
from shared.task import BatchStream, Shard
from shared.wire import open_container
from site_agent import checkpoint
from site_agent.contribution import Anchor, Parcel
from site_agent.core.alignment import How
from site_agent.core.site import Align, Done, InFlight, Settings, SiteCore, Snapshot, Step, Wait
from site_agent.courier import Courier
from site_agent.history import History
from site_agent.metrics import Metrics
from site_agent.news import Accepted, ArrivedAnchor, Event, Failed, Ordered, Report, Stop, Touch
from site_agent.outbox import Outbox, Replays
from site_agent.training.leased import LeasedStream
from site_agent.training.replica import DivergedError
from site_agent.training.schedules import lr_factor

log = logging.getLogger(__name__)

REPORT_STEPS = 50
TOLD_SECONDS = 60.0
LEASED_SECONDS = 30.0
"""For so long, or for `outage_steps`, a site has data that is leased to it in advance."""


class Stopped(BaseException):
    """Somebody asked the agent to stop; `signal` is the number. As with KeyboardInterrupt, no `except Exception` of a
    task's code may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass(frozen=True)
class Hear:
    """Nothing to do until there is news."""


@dataclass(frozen=True)
class Train:
    """Call `step`."""


Need = Hear | Train
Course = Generator[Need, Sequence[Event], None]


class Trains(Protocol):
    """What the learner needs of a trainer; see site_agent.training.trainer and .replica. All vectors are fp32
    (fragment.size,) on the CPU."""

    @property
    def skipped_steps(self) -> int: ...
    def seed(self, seed: int) -> None: ...
    def step(self, stream: BatchStream, lr: float) -> tuple[float, int, float]: ...
    def begin(self, fragment: int, published: F32) -> None: ...
    def snapshot(self, fragment: int) -> None: ...
    def forget(self, fragment: int) -> None: ...
    def encode(self, fragment: int, anchor: F32) -> list[U8]: ...
    def leave(self, fragment: int, anchor: F32, delivered: F32) -> None: ...
    def settle(self, fragment: int, *, delivered: bool) -> None: ...
    def take_up(self, fragment: int, how: How, anchor: F32, published: F32) -> None: ...
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None: ...


class Evaluates(Protocol):
    """What the learner needs of an evaluator; see site_agent.evaluation."""

    def begin(self, anchors: Sequence[Anchor]) -> None: ...
    def finish(self) -> None: ...


@dataclass
class Ledger:
    """Where the time went since training began, in seconds of a monotonic clock."""

    began: float
    training: float = 0.0

    def share(self, now: float) -> float:
        """Share of the time that was spent in inner steps."""
        return self.training / (now - self.began) if now > self.began else 0.0


@dataclass(frozen=True)
class _Missing:
    """A version that is to be fetched before training goes on: from `anchor` (None: whole), and how to take it up.
    `exactly`: this site has been at it before, and goes on from it."""

    anchor: Anchor | None
    version: int
    how: How
    exactly: bool = False


@dataclass(frozen=True)
class Place:
    """Where a learner keeps its checkpoints: the directory, how often (seconds), who writes them, and the disk."""

    directory: Path
    every: float
    saver: Executor
    disk: Disk = DISK


class Learner:
    """One site's training of one run. Drive `course`; it raises Stopped, ConfigError, RefusedError, FaultError.

    `streams` gives the training data of a shard; `calibrated` is the measured seconds of an inner step,
    `outage_steps` how many to take without the coordinator.
    """

    def __init__(
        self,
        run: RunConfig,
        joined: Joined,
        trainer: Trains,
        streams: Callable[[Shard], BatchStream],
        courier: Courier,
        evaluator: Evaluates,
        metrics: Metrics,
        place: Place,
        clock: Callable[[], float],
        calibrated: float,
        outage_steps: int = 0,
    ) -> None:
        self.run_config, self.run_id, self.layout = run, joined.run, Layout.from_wire(joined.layout)
        self.lineage = joined.lineage
        self.trainer, self.courier, self.metrics, self.place = trainer, courier, metrics, place
        self.settings = Settings.of(run, outage_steps)
        self.training = False
        self.core: SiteCore
        self.stream: BatchStream
        self.anchors: list[Anchor] = []
        self.arrivals: dict[int, ArrivedAnchor] = {}
        self._streams, self._evaluator, self._clock = streams, evaluator, clock
        self._orders, self._at_join, self._step_seconds = joined.orders, joined.fragments, calibrated
        self._saving: Future[bool] | None = None
        self._alone = False
        self._outbox = Outbox(place.directory / "outbox", place.disk)
        self._history = History(place.directory / "versions", place.disk)
        self._replays = Replays()
        self._jumped = False
        """A version was taken up that the history does not lead to."""
        self._numbers: dict[int, int] = {}
        """Of the contributions on their way, by fragment: their numbers in the outbox."""
        courier.begin_exchange(run.wire, self._outbox, self._history)
        self._loss: float | None = None
        self._to_evaluate = joined.orders.evaluate

    # -- life

    def course(self) -> Course:
        """All of it."""
        self.stream = self._stream_of(self._orders)
        saved = checkpoint.load_newest(self.place.directory, self.run_id, self.lineage)
        if saved is not None and saved[1]["run"] == self.run_id:
            missing = self._restore(*saved)
            self._resume((yield from self._fetch(missing)))
        else:
            missing = {p: _Missing(None, at.version, "overwrite") for p, at in enumerate(self._at_join)}
            found = yield from self._fetch(missing)
            newest = [found[p].anchor for p in range(len(found))]
            if saved is None:
                self._begin(newest)
            else:
                self._begin_again(*saved, newest)
        yield from self._train()

    def _fetch(self, missing: Mapping[int, _Missing]) -> Generator[Need, Sequence[Event], dict[int, ArrivedAnchor]]:
        """Versions of fragments, once they are here and the run has started."""
        for p, each in missing.items():
            if each.exactly and each.anchor is not None:
                self.courier.retrace(p, each.anchor, each.version, each.how)
            else:
                self.courier.fetch(p, each.anchor, each.version, each.how)
        found: dict[int, ArrivedAnchor] = {}
        while len(found) < len(missing):
            others: list[Event] = []
            for event in (yield Hear()):
                if isinstance(event, ArrivedAnchor):
                    found[event.fragment] = event
                else:
                    others.append(event)
            self._take_in(others)
        self.courier.report = Report("ready", step_seconds=self._step_seconds)
        while not self._orders.started:
            self._take_in((yield Hear()))
        return found

    def _begin_again(self, tensors: dict[str, Tensor], manifest: dict[str, Any], newest: list[Anchor]) -> None:
        """The coordinator was restored from a mirror, to an earlier time: what this site has delivered since, and which
        versions it has seen, no longer holds. Its inner optimizer and its place in the data do."""
        log.warning("the run was restored as it was earlier, as %s; going on from its versions", self.run_id)
        self.trainer.load_state(tensors, manifest["optimizer"])
        self._alone = True  # the checkpoints of before go once the first of now is there
        self._begin(newest, manifest)

    def _begin(self, anchors: list[Anchor], before: Mapping[str, Any] | None = None) -> None:
        """A site without a past in this run that it knows of; `before` is the manifest of its life before a restore."""
        self.trainer.seed((self.run_config.run.seed * 1_000_003 + self._orders.shard.index) % 2**63)
        self.anchors = anchors
        for p, anchor in enumerate(anchors):
            self.trainer.begin(p, anchor.flat)
        versions = [(anchor.version, anchor.tokens) for anchor in anchors]
        pace = self._orders.pace or float(self.run_config.inner.steps)
        self.core = SiteCore.begin(self.settings, versions, pace, self._orders.peers or 1.0)
        self.core.tempo.stepped(self._step_seconds)
        self.core.told(self._orders.tokens, self._orders.peers)
        self.stream = self._stream_of(self._orders)
        if (leased := self._leased) is not None:
            leased.begin()  # what of leased data is in the model, the coordinator knows
        elif before is not None:
            self._go_on_in_the_data(before)
        self._outbox.prune(sys.maxsize)
        self._history.clear()
        for p, anchor in enumerate(anchors):
            self._await_own(p, anchor, self._at_join[p])
        # Before the first contribution: from here on whatever is sent can be accounted for after a restart.
        self._save(0, *self._state())

    def _go_on_in_the_data(self, manifest: Mapping[str, Any]) -> None:
        leased, was_leased = self._leased, "newest" in manifest["stream"]
        if was_leased != (leased is not None):
            log.warning("[data] partition was changed since the checkpoint; beginning with the data anew")
            if leased is not None:
                leased.begin()
        elif was_leased or ShardMessage.model_validate(manifest["shard"]) == self._orders.shard:
            self.stream.load_state_dict(manifest["stream"])

    def _await_own(self, p: int, newest: Anchor, at_join: FragmentVersion) -> None:
        """Where a contribution of this site, from before it lost its memory, is in a round that is still open: the
        version that will hold it is awaited like that of any other, because its base takes no second one."""
        contributed = at_join.contributed
        if contributed < newest.version:
            return
        self.trainer.snapshot(p)  # which is the newest version now
        self.core.fragments[p].in_flight = InFlight(
            contributed, self.core.steps, self.core.tokens, 0, 0, self._clock(), holding=contributed + 1
        )
        self.courier.await_version(p, newest, contributed + 1)

    def _restore(self, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> dict[int, _Missing]:
        """The state of a local checkpoint: what is trained from here on are the steps since again, and what was
        contributed of them comes up as it was; see site_agent.outbox. What versions that takes, by fragment."""
        fragments = range(len(self._at_join))
        self.trainer.load_state(tensors, manifest["optimizer"])
        # (The head's CPU goes on where it was; devices and other ranks draw anew, each its own.)
        self.trainer.seed((self.run_config.run.seed * 1_000_003 + manifest["core"]["steps"]) % 2**63)
        torch.set_rng_state(tensors["random"])
        self.core = core = checkpoint.unpack_core(manifest["core"], self.settings, self._clock())
        core.pace = self._orders.pace or core.pace
        core.tempo.stepped(self._step_seconds)
        core.told(self._orders.tokens, self._orders.peers)
        for view in core.fragments:
            view.complete = view.progress.merged >= self.settings.budget
        self.anchors = [
            Anchor(version, digest, merged, tensors[f"anchor.{p}"].numpy())
            for p, (version, digest, merged) in enumerate(manifest["anchors"])
        ]
        self.stream = self._stream_of(self._orders)
        self._go_on_in_the_data(manifest)
        records = self._outbox.load(self.courier.addresses)
        self._replays.restore(records, manifest["outbox"])
        self._numbers = {int(p): number for p, number in manifest["numbers"].items()}
        self._check_the_history()
        sent = {record.number for record in records}
        missing = {p: each for p in fragments if (each := self._missing(p, sent)) is not None}
        self._note_records()
        log.info(
            "continuing from the checkpoint of step %d: steps since are trained again, not delivered twice", core.steps
        )
        return missing

    def _check_the_history(self) -> None:
        """Contributions come up again on the versions that they were made on, or not at all."""
        bases = {p: [record.base_version for record in self._replays.pending(p)] for p in range(len(self.anchors))}
        if all(self._history.covers(p, self.anchors[p].version, max(each, default=0)) for p, each in bases.items()):
            return
        log.error("versions that were contributed to since the checkpoint are not in the history; starting from newer")
        delivered = max(sum(record.steps for record in self._replays.pending(p)) for p in bases)
        for p in bases:
            self._replays.forget(p)
        for _ in range(delivered):
            if not self._starved():
                next(self.stream)  # it is in the model

    def _missing(self, p: int, sent: Collection[int]) -> _Missing | None:
        """What fragment `p` lacks to go on from the checkpoint. `sent`: the numbers of what is in the outbox."""
        view, anchor, at_join = self.core.fragments[p], self.anchors[p], self._at_join[p]
        flight, recorded, contributed = view.in_flight, self._replays.pending(p), at_join.contributed
        sound = digest_flat(anchor.flat, self.layout.fragments[p].chunks()) == anchor.digest
        if not sound:
            log.error("fragment %d: the checkpoint's anchor is damaged; repaired from the published version", p)
            self.courier.count_repair()
        known = max([-1 if flight is None else flight.base_version, *(record.base_version for record in recorded)])
        if sound and contributed <= known:
            refused = recorded and flight is not None and flight.holding is None and self._numbers[p] not in sent
            if refused:
                self._abandon(p)  # or it would be in the outbox, as those after it
            if view.in_flight is not None:
                return None
            if recorded:
                ahead = recorded[0].base_version > anchor.version
                return _Missing(anchor, recorded[0].base_version, "rebase", exactly=True) if ahead else None
            return _Missing(anchor, at_join.version, "rebase") if at_join.version > anchor.version else None
        self._abandon(p)
        self._replays.forget(p)
        if contributed >= anchor.version or not sound:
            # What was trained since was delivered, and how much of it is not known (the outbox is lost): the published
            # weights take its place, at once.
            log.warning(
                "fragment %d: the outbox does not know what was contributed; starting from the newest version", p
            )
            self.trainer.settle(p, delivered=False)
            return _Missing(anchor if sound else None, at_join.version, "overwrite")
        return _Missing(anchor, at_join.version, "rebase") if at_join.version > anchor.version else None

    def _abandon(self, p: int) -> None:
        """The contribution of fragment `p` that was on its way in the checkpoint is not any more."""
        self.core.fragments[p].in_flight = None
        self.trainer.forget(p)

    def _resume(self, found: Mapping[int, ArrivedAnchor]) -> None:
        """Training goes on, with the versions that were missing."""
        for p, arrival in found.items():
            self._arrive(arrival)
            if arrival.how == "overwrite":
                self._align(p, "overwrite")
                self._await_own(p, arrival.anchor, self._at_join[p])
        for p, view in enumerate(self.core.fragments):
            flight, anchor, follows = view.in_flight, self.anchors[p], self._replays.next_base(p)
            if flight is None or p in found:
                continue
            if flight.holding is None:
                self._send(p, flight.tokens, flight.steps, self._numbers[p], recorded=True)
            elif follows is None:
                self.courier.await_version(p, anchor, flight.holding)
            else:
                self.courier.retrace(p, anchor, follows, "align")

    def _note_records(self) -> None:
        """Tells the core when contributions from before a restart come up again."""
        pending = {p: self._replays.pending(p) for p in range(len(self.core.fragments))}
        self.core.recorded = {p: records[0].steps for p, records in pending.items() if records}

    def replays(self, p: int) -> bool:
        """Whether contributions of fragment `p` from before a restart are still to come up again."""
        return bool(self._replays.pending(p))

    # -- the loop

    def _train(self) -> Generator[Need, Sequence[Event], None]:
        """Does what the core says until it is done."""
        core = self.core
        core.run_finished = self._orders.finished
        self.training = True
        self.ledger = Ledger(self._clock())
        self._saved_at = self._clock()
        self._report()
        self._evaluate_if_ordered()
        hurried, told_at = False, -math.inf
        while True:
            match core.next_action():
                case Done():
                    self._report()
                    return
                case Step() if self._starved():
                    self._report()
                    if not hurried:
                        often = self._clock() - told_at < TOLD_SECONDS
                        log.log(logging.DEBUG if often else logging.INFO, "waiting for data")
                        told_at = told_at if often else self._clock()
                        self.courier.hurry()
                        hurried = True
                    self._take_in((yield Hear()))
                case Step():
                    hurried = False
                    self._take_in((yield Train()))
                case Snapshot() as action:
                    self._contribute(action)
                case Align(fragment, _, how):
                    self._align(fragment, how)
                case Wait():
                    began = self._clock()
                    self._report()
                    self._save_if_due()
                    self._take_in((yield Hear()))
                    self.metrics.waited.inc(self._clock() - began)

    def step(self) -> None:
        """One inner step, where `course` asked for it."""
        core, run = self.core, self.run_config
        factor = lr_factor(run.inner.schedule, core.furthest, run.run.tokens, run.inner.warmup_tokens)
        began = self._clock()
        loss, tokens, seconds = self.trainer.step(self.stream, run.inner.lr * factor)
        self.ledger.training += self._clock() - began
        core.stepped(tokens, seconds)
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self.metrics.steps.inc()
        self.metrics.tokens.inc(tokens)
        self.metrics.loss.set(loss)
        self.metrics.lr.set(run.inner.lr * factor)
        self._report()
        if core.steps % REPORT_STEPS == 0:
            log.info("step %d: loss %.4f, %.3f s a step", core.steps, self._loss, core.tempo.step_seconds)
        self._save_if_due()

    def _contribute(self, due: Snapshot) -> None:
        """Sends the fragment's progress; what was sent of it before a restart, as it was."""
        if self._jumped:
            # The history does not lead here: whoever goes on from a checkpoint must not have to come here again.
            self.save_before_leaving()
            self._saved_at, self._jumped = self._clock(), False
        p, record = due.fragment, self._replays.take(due.fragment)
        if record is not None:
            due = Snapshot(p, record.base_version, record.tokens, record.steps)
        self._note_records()
        self.core.snapshot_taken(due, self._clock())
        self.trainer.snapshot(p)
        self._numbers[p] = number = record.number if record is not None else self._replays.number()
        self._send(p, due.tokens, due.steps, number, recorded=record is not None)

    def _send(self, p: int, tokens: int, steps: int, number: int, *, recorded: bool) -> None:
        """Where another one was sent after it before a restart, it was accepted, and what version came next is known:
        nobody need be asked."""
        anchor, content = self.anchors[p], self._outbox.read(number, p) if recorded else None
        if content is None:
            sections = self.trainer.encode(p, anchor.flat)
        else:
            with open_container(content, self.courier.addresses[p].fragment) as container:
                self.trainer.leave(p, anchor.flat, container.decode())
        progress = tuple(self._leased.progress()) if self._leased is not None and not recorded else ()
        parcel = Parcel(p, anchor, content or sections, tokens, steps, number, recorded, progress)
        follows = self._replays.next_base(p) if recorded else None
        if follows is None:
            self.courier.send(parcel)
        else:
            self.courier.repeat(parcel, follows)

    def _align(self, p: int, how: How) -> None:
        """Takes up the arrived version of fragment `p`."""
        arrival = self.arrivals.pop(p)
        arrived, self._jumped = arrival.anchor, self._jumped or arrival.jumped
        self.trainer.take_up(p, how, self.anchors[p].flat, arrived.flat)
        self.anchors[p] = arrived
        self.core.aligned(p)
        self.metrics.version.labels(p).set(arrived.version)

    # -- news

    def _take_in(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Accepted(p, version, delivered):
                    self.core.accepted(p, version, self._clock())
                    self.trainer.settle(p, delivered=delivered)
                case ArrivedAnchor():
                    self._arrive(event)
                case Ordered(orders):
                    self._obey(orders)
                case Touch(silent):
                    self._note_touch(silent)
                case Stop(number):
                    self.save_before_leaving()
                    raise Stopped(number)
                case Failed(error):
                    if not isinstance(error, DivergedError):
                        self.save_before_leaving()
                    if isinstance(error, IsthmusError):
                        raise error
                    raise FaultError(f"the network side failed: {type(error).__name__}: {error}") from error

    def _note_touch(self, silent: frozenset[int]) -> None:
        if not self.training:
            return
        self.core.out_of_touch = silent
        who = "the coordinator"
        if silent and len(silent) < len(self.anchors):
            who += f" of fragments {', '.join(map(str, sorted(silent)))}"
        if not silent:
            log.info("the coordinator answers again")
        elif self.settings.everyone:
            log.warning("%s cannot be reached; this run waits for it, as it waits for everyone", who)
        else:
            steps = self.settings.outage_steps
            log.warning("%s cannot be reached; training goes on for up to %d steps without it", who, steps)

    def _arrive(self, arrival: ArrivedAnchor) -> None:
        self.arrivals[arrival.fragment] = arrival
        self.core.arrived(arrival.fragment, arrival.anchor.version, arrival.anchor.tokens, arrival.how)

    def _obey(self, orders: Orders) -> None:
        before, self._orders = self._orders, orders
        self._to_evaluate |= orders.evaluate
        if not self.training:
            return
        if orders.pace is not None:
            self.core.pace = orders.pace
            self.metrics.pace.set(orders.pace)
        self.core.run_finished = orders.finished
        self.core.awaited = [(round_.fragment, round_.version) for round_ in orders.awaited]
        self.core.closing = [(round_.fragment, round_.version) for round_ in orders.closing]
        self.core.told(orders.tokens, orders.peers)
        if (leased := self._leased) is not None and orders.data is not None:
            leased.obey(orders.data)
        elif orders.shard != before.shard:
            log.info("this site's part of the data is now %d of %d", orders.shard.index, orders.shard.count)
            self.stream = self._stream_of(orders)
        self._evaluate_if_ordered()

    def _evaluate_if_ordered(self) -> None:
        if self._to_evaluate:
            self._to_evaluate = False
            self._evaluator.begin(self.anchors)

    def _stream_of(self, orders: Orders) -> BatchStream:
        return self._streams(Shard(orders.shard.index, orders.shard.count, orders.shard.seed))

    @property
    def _leased(self) -> LeasedStream | None:
        return self.stream if isinstance(self.stream, LeasedStream) else None

    def _starved(self) -> bool:
        """Whether there is nothing to train on before the coordinator has leased more."""
        return self._leased is not None and not self._leased.ready

    def _report(self) -> None:
        core, now = self.core, self._clock()
        if (leased := self._leased) is not None:
            steps = max(self.settings.outage_steps, LEASED_SECONDS / max(core.tempo.step_seconds, 1e-6))
            leased.want(steps * self.run_config.inner.batch_size)
        share = self.ledger.share(now)
        self.courier.report = Report(
            "training",
            steps=core.steps,
            tokens=core.tokens,
            step_seconds=core.tempo.step_seconds,
            overlap_seconds=core.overlap_seconds,
            sync_seconds=core.tempo.sync_seconds,
            training_share=share,
            loss=self._loss,
            data=leased.report() if leased is not None else None,
            starved=self._starved(),
        )
        self.metrics.share.set(share)
        self.metrics.step_seconds.set(core.tempo.step_seconds)
        self.metrics.skipped.set(self.trainer.skipped_steps)

    # -- local checkpoints

    def _save_if_due(self) -> None:
        """Copies the state now and writes it in the background; a write that is still under way is left to finish."""
        if self._clock() - self._saved_at < self.place.every:
            return
        self._saved_at = self._clock()
        if self._saving is not None and not self._saving.done():
            return
        self._saving = self.place.saver.submit(self._save, self.core.steps, *self._state())

    def save_before_leaving(self) -> None:
        """A checkpoint of now, if there is anything to save."""
        if not self.training:
            return
        if self._saving is not None:
            self._saving.result()
        if self._save(self.core.steps, *self._state()):
            log.info("saved at step %d", self.core.steps)

    def _save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> bool:
        """Training goes on without it where the disk refuses."""
        try:
            checkpoint.save(self.place.directory, step, tensors, manifest, self.place.disk, alone=self._alone)
            self._alone = False
            self._outbox.prune(checkpoint.oldest_record(self.place.directory))
            self._history.prune(checkpoint.oldest_versions(self.place.directory))
        except OSError as error:
            log.error("no checkpoint could be written to %s: %s", self.place.directory, error)
            return False
        return True

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A checkpoint's tensors (copies) and manifest."""
        tensors, plain = self.trainer.state()
        tensors |= {f"anchor.{p}": torch.from_numpy(anchor.flat) for p, anchor in enumerate(self.anchors)}
        tensors["random"] = torch.get_rng_state()
        manifest = {
            "run": self.run_id,
            "lineage": self.lineage,
            "core": checkpoint.pack_core(self.core),
            "anchors": [[anchor.version, anchor.digest, anchor.tokens] for anchor in self.anchors],
            "optimizer": plain,
            "shard": self._orders.shard.model_dump(mode="json"),
            "stream": self.stream.state_dict(),
            "outbox": self._replays.state(),
            "numbers": {str(p): number for p, number in self._numbers.items() if self.core.fragments[p].in_flight},
        }
        # Through JSON and back: a copy, whatever live objects the task's stream gave.
        return tensors, json.loads(json.dumps(manifest))
