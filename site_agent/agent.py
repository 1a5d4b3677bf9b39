"""The site agent: joins a run and trains until the run is finished or somebody stops it.

The thread that runs `run` owns the model and the core, and does what the core says at every step boundary.
The network lives in the courier's thread; evaluation and checkpoint writing have one each. News are taken in
between steps only, so that a run with a fixed τ takes the same course however messages are timed.
"""

from __future__ import annotations

import copy
import json
import logging
import queue
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shared.codecs import warm_up
from shared.config import RunConfig, SiteConfig, received_run
from shared.errors import FaultError, IsthmusError, RefusedError
from shared.fragments import F32, Layout, digest_flat
from shared.protocol import Code, Evaluation, FragmentVersion, Joined, Orders, ShardMessage
from shared.task import BatchStream, Shard, build_model, load_task
from site_agent import checkpoint
from site_agent.contribution import Anchor, DivergedError, Parcel
from site_agent.core.alignment import How, take_up
from site_agent.core.site import Align, Done, InFlight, Settings, SiteCore, Snapshot, Step, Wait
from site_agent.courier import (
    Accepted,
    ArrivedAnchor,
    Courier,
    Event,
    Failed,
    Ordered,
    Report,
    Stop,
)
from site_agent.link import Credentials, credentials
from site_agent.metrics import Metrics
from site_agent.training.devices import choose_device, describe, set_threads
from site_agent.training.schedules import lr_factor
from site_agent.training.trainer import Trainer, evaluate, load_flat

log = logging.getLogger(__name__)

T = TypeVar("T")

CALIBRATION_STEPS, CALIBRATION_SECONDS = 8, 10.0
REPORT_STEPS = 50


class Stopped(BaseException):
    """Somebody asked the agent to stop; `signal` is the number. As with KeyboardInterrupt, no `except Exception` of a
    task's code may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass
class Ledger:
    """Where the time went since training began, in seconds of a monotonic clock."""

    began: float
    training: float = 0.0

    def share(self, now: float) -> float:
        """Share of the time that was spent in inner steps."""
        return self.training / (now - self.began) if now > self.began else 0.0


def credentials_of(config: SiteConfig) -> Credentials:
    """The site's credentials, from the files that its config names. Raises ConfigError."""
    site = config.site

    def path(name: str) -> Path | None:
        return config.path(name) if name else None

    return credentials(site.name, path(site.token_file), path(site.ca), path(site.client_cert), path(site.client_key))


def task_of(config: SiteConfig, run: RunConfig) -> Any:
    """The run's task as this machine has it: `[task] use` and `[data]` of the site override the run's."""
    use = config.task.use if config.task else run.task.use
    return load_task(use, {**run.task.options(), **config.data}, config.base)


class Agent:
    """One site. `run` returns when the run is finished. Raises Stopped, ConfigError, RefusedError, FaultError."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        site = config.site
        self.courier = Courier(
            site.coordinator, credentials_of(config), self.metrics, site.patience_seconds, site.outage_seconds
        )
        self.courier.evaluates = site.evaluate
        self._directory = config.path(site.state)
        self._clock = time.monotonic
        # One each: a long evaluation must not keep a checkpoint waiting.
        self._saver, self._evaluator = ThreadPoolExecutor(1, "checkpoints"), ThreadPoolExecutor(1, "evaluation")
        self._evaluating: Future[None] | None = None
        self._saving: Future[None] | None = None
        self._loss: float | None = None
        self._training = False

    # -- life

    def run(self) -> None:
        exporter = self.metrics.serve(self.config.metrics)
        try:
            joined = self.courier.join()
            self._prepare(joined)
            self._train()
            log.info("the run is finished: %d steps, %d tokens here", self.core.steps, self.core.tokens)
        except RefusedError as error:
            if error.code != Code.UNAUTHORIZED:
                raise
            file = self.config.site.token_file
            sent = f"the token in {self.config.path(file)} was sent" if file else "[site] token_file is not set"
            raise RefusedError(error.code, f"{error.detail} ({sent})") from None
        except torch.OutOfMemoryError as error:
            raise FaultError(
                f"the device has too little memory: {str(error).splitlines()[0]}; lower [inner] batch_size"
            ) from None
        finally:
            self.courier.close()
            for background in (self._saver, self._evaluator):
                background.shutdown(wait=True, cancel_futures=True)
            if exporter is not None:
                exporter.shutdown()
                exporter.server_close()

    def stop_on_signals(self) -> None:
        """Makes SIGTERM and SIGINT end `run` with Stopped, after a clean leave.

        Training is interrupted between steps, so that what it saves is whole; before it, there is nothing to save.
        """

        def stop(number: int, _frame: object) -> None:
            if not self._training:
                raise Stopped(number)
            self.courier.events.put(Stop(number))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _prepare(self, joined: Joined) -> None:
        """Everything before the first inner step: model, data, speed, weights, the order to start."""
        self.run_config = run = received_run(joined.config)
        self.run_id = joined.run
        self.layout = Layout.from_wire(joined.layout)
        set_threads(self.config.devices.threads)
        device = choose_device(self.config.devices.device)
        self.task = task_of(self.config, run)
        self.trainer = Trainer(
            self.task,
            build_model(self.task, run.run.seed),
            self.layout,
            run.inner,
            device,
            self.config.devices.throttle,
        )
        log.info("site %s in run %s on %s (%s)", self.config.site.name, joined.run, device, describe(device))
        warm_up()
        saved = checkpoint.load_newest(self._directory, joined.run)
        self.courier.begin_exchange(self.layout, run.wire)
        self._orders = joined.orders
        seconds = self.trainer.calibrate(self._stream_of(joined.orders), CALIBRATION_STEPS, CALIBRATION_SECONDS)
        anchors = self._fetch_anchors(joined.fragments)
        self.courier.report = Report("ready", step_seconds=seconds)
        while not self._orders.started:
            self._take_in(self.courier.events.get())
        self.settings = Settings.of(run)
        if saved is None:
            self._begin(anchors, seconds, joined.fragments)
        else:
            self._resume(*saved, anchors, seconds, joined.fragments)

    def _fetch_anchors(self, fragments: list[FragmentVersion]) -> list[Anchor]:
        """Every fragment's newest published version."""
        for p, fragment in enumerate(fragments):
            self.courier.fetch(p, None, fragment.version, "overwrite")
        found: dict[int, Anchor] = {}
        while len(found) < len(fragments):
            event = self.courier.events.get()
            if isinstance(event, ArrivedAnchor):
                found[event.fragment] = event.anchor
            else:
                self._take_in(event)
        return [found[p] for p in range(len(fragments))]

    def _begin(self, anchors: list[Anchor], step_seconds: float, now: list[FragmentVersion]) -> None:
        """A site without a past in this run that it knows of."""
        torch.manual_seed((self.run_config.run.seed * 1_000_003 + self._orders.shard.index) % 2**63)
        self.anchors = anchors
        for p, anchor in enumerate(anchors):
            self.trainer.write(p, anchor.flat)
        versions = [(anchor.version, anchor.tokens) for anchor in anchors]
        pace = self._orders.pace or float(self.run_config.inner.steps)
        self.core = SiteCore.begin(self.settings, versions, pace, self._orders.peers or 1.0)
        self.core.tempo.stepped(step_seconds)
        self.core.told(self._orders.tokens, self._orders.peers)
        self.snapshots: dict[int, F32] = {}
        self.residuals: dict[int, F32] = {}
        self.arrivals: dict[int, Anchor] = {}
        self.stream = self._stream_of(self._orders)
        for p, anchor in enumerate(anchors):
            self._await_own(p, anchor, now[p].contributed)

    def _await_own(self, p: int, newest: Anchor, contributed: int) -> None:
        """Where a contribution of this site, from before it lost its memory, is in a round that is still open: the
        version that will hold it is awaited like that of any other, because its base takes no second one."""
        if contributed < newest.version:
            return
        self.snapshots[p] = newest.flat
        self.core.fragments[p].in_flight = InFlight(
            contributed, self.core.steps, self.core.tokens, 0, 0, self._clock(), holding=contributed + 1
        )
        self.courier.await_version(p, newest, contributed + 1)

    def _resume(
        self,
        tensors: dict[str, torch.Tensor],
        manifest: dict[str, Any],
        newest: list[Anchor],
        step_seconds: float,
        now: list[FragmentVersion],
    ) -> None:
        """Goes on from a local checkpoint. What it contributed after that checkpoint is in the published weights
        already, so there the newest version replaces what it would train again; what it did not contribute stays."""
        fragments = range(len(newest))
        with torch.no_grad():
            for name, parameter in self.trainer.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        checkpoint.unpack_optimizer(self.trainer.optimizer, tensors, manifest["optimizer"])
        torch.set_rng_state(tensors["random"])
        self.core = core = checkpoint.unpack_core(manifest["core"], self.settings, self._clock())
        core.pace = self._orders.pace or core.pace
        core.tempo.stepped(step_seconds)
        core.told(self._orders.tokens, self._orders.peers)
        for view in core.fragments:
            view.complete = view.progress.merged >= self.settings.budget
        self.anchors = [
            Anchor(version, digest, merged, tensors[f"anchor.{p}"].numpy())
            for p, (version, digest, merged) in enumerate(manifest["anchors"])
        ]
        self.snapshots = {p: tensors[f"snapshot.{p}"].numpy() for p in fragments if f"snapshot.{p}" in tensors}
        self.residuals = {p: tensors[f"residual.{p}"].numpy() for p in fragments if f"residual.{p}" in tensors}
        self.arrivals = {}
        self.stream = self._stream_of(self._orders)
        if ShardMessage.model_validate(manifest["shard"]) == self._orders.shard:
            self.stream.load_state_dict(manifest["stream"])
        for p, view in enumerate(core.fragments):
            self._resume_fragment(p, view.in_flight, newest[p], now[p].contributed)
        log.info("continuing from the checkpoint of step %d", core.steps)

    def _resume_fragment(self, p: int, flight: InFlight | None, newest: Anchor, contributed: int) -> None:
        view, anchor = self.core.fragments[p], self.anchors[p]
        sound = digest_flat(anchor.flat, self.layout.fragments[p].chunks()) == anchor.digest
        if not sound:
            log.error("fragment %d: the checkpoint's anchor is damaged; repaired from the published version", p)
            self.courier.count_repair()
        if sound and flight is not None and contributed <= flight.base_version:
            if flight.holding is not None:
                self.courier.await_version(p, anchor, flight.holding)
            else:
                self.courier.send(self._parcel(p, flight.tokens, flight.steps))
            return
        view.in_flight = None
        self.snapshots.pop(p, None)
        if contributed >= anchor.version or not sound:
            # What was trained since is delivered (or unknown): the published weights take its place, at once.
            self.residuals.pop(p, None)
            self._arrive(p, newest, "overwrite")
            self._align(p, "overwrite")
            self._await_own(p, newest, contributed)
        elif newest.version > anchor.version:
            self._arrive(p, newest, "rebase")

    # -- the loop

    def _train(self) -> None:
        """Does what the core says until it is done. Raises Stopped."""
        core = self.core
        self._training = True
        self.ledger = Ledger(self._clock())
        self._saved_at = self._clock()
        self._report()
        self._evaluate_if_ordered()
        while True:
            self._take_in_all()
            match core.next_action():
                case Done():
                    self._report()
                    self._evaluate_the_end()
                    self._save_before_leaving()
                    return
                case Step():
                    self._step()
                case Snapshot() as action:
                    core.snapshot_taken(action, self._clock())
                    self.snapshots[action.fragment] = self.trainer.read(action.fragment)
                    self.courier.send(self._parcel(action.fragment, action.tokens, action.steps))
                case Align(fragment, _, how):
                    self._align(fragment, how)
                case Wait():
                    began = self._clock()
                    self._report()
                    self._save_if_due()
                    self._take_in(self.courier.events.get())
                    self.metrics.waited.inc(self._clock() - began)

    def _step(self) -> None:
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

    def _align(self, p: int, how: How) -> None:
        """Takes up the arrived version of fragment `p`."""
        arrived, rounds = self.arrivals.pop(p), self.run_config.rounds
        theta, anchor, snapshot = self.trainer.read(p), self.anchors[p].flat, self.snapshots.pop(p, None)
        self.trainer.write(p, take_up(how, theta, anchor, snapshot, arrived.flat, rounds.align, rounds.blend))
        self.anchors[p] = arrived
        self.core.aligned(p)
        self.metrics.version.labels(p).set(arrived.version)

    def _parcel(self, p: int, tokens: int, steps: int) -> Parcel:
        return Parcel(p, self.anchors[p], self.snapshots[p], self.residuals.get(p), tokens, steps)

    # -- news

    def _take_in_all(self) -> None:
        while True:
            try:
                event = self.courier.events.get_nowait()
            except queue.Empty:
                return
            self._take_in(event)

    def _take_in(self, event: Event) -> None:
        match event:
            case Accepted(p, version, residual):
                self.core.accepted(p, version, self._clock())
                # Without error feedback there is none: what a run had of it before its config was changed has just
                # been sent, once.
                self.residuals.pop(p, None)
                if residual is not None:
                    self.residuals[p] = residual
            case ArrivedAnchor(p, anchor, how):
                self._arrive(p, anchor, how)
            case Ordered(orders):
                self._obey(orders)
            case Stop(number):
                self._save_before_leaving()
                raise Stopped(number)
            case Failed(error):
                if not isinstance(error, DivergedError):
                    self._save_before_leaving()
                if isinstance(error, IsthmusError):
                    raise error
                raise FaultError(f"the network side failed: {type(error).__name__}: {error}") from error

    def _arrive(self, p: int, anchor: Anchor, how: How) -> None:
        self.arrivals[p] = anchor
        self.core.arrived(p, anchor.version, anchor.tokens, how)

    def _obey(self, orders: Orders) -> None:
        before, self._orders = self._orders, orders
        if not self._training:
            return
        if orders.pace is not None:
            self.core.pace = orders.pace
            self.metrics.pace.set(orders.pace)
        self.core.run_finished = orders.finished
        self.core.awaited = [(round_.fragment, round_.version) for round_ in orders.awaited]
        self.core.closing = [(round_.fragment, round_.version) for round_ in orders.closing]
        self.core.told(orders.tokens, orders.peers)
        if orders.shard != before.shard:
            log.info("this site's part of the data is now %d of %d", orders.shard.index, orders.shard.count)
            self.stream = self._stream_of(orders)
        self._evaluate_if_ordered()

    def _evaluate_if_ordered(self) -> None:
        if self._orders.evaluate and (self._evaluating is None or self._evaluating.done()):
            self._evaluating = _logged(self._begin_evaluation)()

    def _evaluate_the_end(self) -> None:
        """The finished run's weights are evaluated by the site that asks first; the others need not wait for it."""
        if self._evaluating is not None:
            self._evaluating.result()
        orders = self.courier.ask_orders()
        evaluating = _logged(self._begin_evaluation)() if orders is not None and orders.evaluate else None
        if evaluating is not None:
            evaluating.result()

    def _stream_of(self, orders: Orders) -> BatchStream:
        shard = Shard(orders.shard.index, orders.shard.count, orders.shard.seed)
        stream: BatchStream = self.task.train_batches(shard, self.run_config.inner.batch_size)
        return stream

    def _report(self) -> None:
        core, now = self.core, self._clock()
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
        )
        self.metrics.share.set(share)
        self.metrics.step_seconds.set(core.tempo.step_seconds)
        self.metrics.skipped.set(self.trainer.skipped_steps)

    # -- in the background

    def _begin_evaluation(self) -> Future[None]:
        # Copied here, between steps, so that its buffers are of one moment.
        model = copy.deepcopy(self.trainer.model)
        return self._evaluator.submit(_logged(self._evaluate), model, list(self.anchors))

    def _evaluate(self, model: nn.Module, anchors: list[Anchor]) -> None:
        """The held-out loss of the published weights, which are written into `model`."""
        batches = self.task.eval_batches(self.run_config.inner.batch_size)
        if batches is None:
            self.courier.evaluates = False
            return
        load_flat(model, self.layout, (anchor.flat for anchor in anchors))
        loss = evaluate(self.task, model, batches, self.trainer.device)
        if loss is not None and abs(loss) <= 1e6:
            tokens = sum(anchor.tokens for anchor in anchors) // len(anchors)
            self.courier.evaluated(Evaluation(tokens=tokens, loss=loss))

    def _save_if_due(self) -> None:
        """Copies the state now and writes it in the background; a write that is still under way is left to finish."""
        if self._clock() - self._saved_at < self.config.site.checkpoint_seconds:
            return
        self._saved_at = self._clock()
        if self._saving is not None and not self._saving.done():
            return
        tensors, manifest = self._state()
        self._saving = self._saver.submit(_logged(checkpoint.save), self._directory, self.core.steps, tensors, manifest)

    def _save_before_leaving(self) -> None:
        if not self._training:
            return
        try:
            if self._saving is not None:
                self._saving.result()
            checkpoint.save(self._directory, self.core.steps, *self._state())
            log.info("saved at step %d", self.core.steps)
        except OSError as error:
            log.error("no checkpoint could be written to %s: %s", self._directory, error)

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A checkpoint's tensors (copies) and manifest."""
        tensors, plain = checkpoint.pack_optimizer(self.trainer.optimizer)
        tensors |= {f"model.{name}": p.detach().cpu().clone() for name, p in self.trainer.parameters.items()}
        tensors |= {f"anchor.{p}": torch.from_numpy(anchor.flat) for p, anchor in enumerate(self.anchors)}
        tensors |= {f"snapshot.{p}": torch.from_numpy(flat) for p, flat in self.snapshots.items()}
        tensors |= {f"residual.{p}": torch.from_numpy(flat) for p, flat in self.residuals.items()}
        tensors["random"] = torch.get_rng_state()
        manifest = {
            "run": self.run_id,
            "core": checkpoint.pack_core(self.core),
            "anchors": [[anchor.version, anchor.digest, anchor.tokens] for anchor in self.anchors],
            "optimizer": plain,
            "shard": self._orders.shard.model_dump(mode="json"),
            "stream": self.stream.state_dict(),
        }
        # Through JSON and back: a copy, whatever live objects the task's stream gave.
        return tensors, json.loads(json.dumps(manifest))


def _logged(work: Callable[..., T]) -> Callable[..., T | None]:
    """Work on the side, whose failure is logged: training goes on without it."""

    def run(*args: Any) -> T | None:
        try:
            return work(*args)
        except Exception:
            log.exception("%s failed", getattr(work, "__name__", "work"))
            return None

    return run
