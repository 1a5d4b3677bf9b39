"""The site agent: joins a run and trains until the run is finished or somebody stops it.

The thread that runs `run` drives the learner. The network lives in the courier's thread; evaluation and checkpoint
writing have one each.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from shared.codecs import warm_up
from shared.config import SiteConfig, received_run
from shared.errors import LostError, RefusedError
from shared.fragments import Layout
from shared.program import name_in_log
from shared.protocol import Code, Joined
from shared.task import BatchStream, Shard, manifest_of
from site_agent.asking import credentials_of
from site_agent.branch import LEAVE_SECONDS
from site_agent.checkpoint import oldest_lease
from site_agent.courier import CourierThread
from site_agent.crew import Crew, enlist, follow, in_words
from site_agent.evaluation import Evaluator, TogetherEvaluator
from site_agent.groups import apart, settled
from site_agent.learner import Evaluates, Hear, Learner, Place, Stopped, Train
from site_agent.link import Link
from site_agent.metrics import Metrics
from site_agent.news import Event, Stop
from site_agent.survey import calibrate, decision, recruit, stream_for
from site_agent.training.leased import LeasedStream
from site_agent.training.team import TICK_SECONDS
from site_agent.transport import Http

log = logging.getLogger(__name__)


def train(config: SiteConfig) -> None:
    """This process's part of a site until the run is finished or a signal stops it. Raises what `Agent.run` raises."""
    crew = enlist(config)
    if settled(crew, config, lambda: decision(crew, config)) == "learners":
        crew, config = apart(crew, config)
        name_in_log(config.site.name)
    if crew.team.head:
        lead(crew, config)
        crew.team.tell({"do": "end"})
    else:
        follow(crew, config)


def lead(crew: Crew, config: SiteConfig) -> None:
    """One learner, also where the coordinator is restored from a mirror meanwhile, and the run goes by another name."""
    lineage = None
    while True:
        agent = Agent(config, lineage, crew)
        agent.stop_on_signals()
        try:
            return agent.run()
        except RefusedError as error:
            if error.code != Code.WRONG_RUN or not agent.joined:
                raise
            if agent.stopped_by is not None:
                raise Stopped(agent.stopped_by) from None
            log.warning("%s; asking whether it was restored", error)
            lineage = agent.lineage


class Agent:
    """One site. `run` returns when the run is finished. Raises Stopped, ConfigError, RefusedError, FaultError."""

    learns: type[Learner] = Learner

    def __init__(self, config: SiteConfig, lineage: str | None = None, crew: Crew | None = None) -> None:
        """`lineage`: the run to train, where it is known which; None: whichever the coordinator serves. `crew`: those
        that train with this process, the head of them; None: nobody."""
        self.config, self.lineage = config, lineage
        self.crew = crew or enlist(config)
        self.joined = False
        self.metrics = Metrics()
        site, who = config.site, credentials_of(config)

        def connect(url: str) -> Link:
            return Link(Http(url, who, self._count), site.name, site.outage_seconds)

        self.courier = CourierThread(connect, site.coordinator, site.name, self.metrics)
        self.courier.evaluates = config.site.evaluate
        # One each: a long evaluation must not keep a checkpoint waiting.
        self._saver, self._evaluations = ThreadPoolExecutor(1, "checkpoints"), ThreadPoolExecutor(1, "evaluation")
        self.learner: Learner | None = None
        self._ends_at = math.inf
        self._over = False
        self.stopped_by: int | None = None
        """The signal that asked it to stop."""

    def run(self) -> None:
        exporter = self.metrics.serve(self.config.metrics)
        back_soon = False
        try:
            with in_words(self.crew.team):
                self._run()
        except Stopped as stopped:
            # A machine that is taken away may not come back: what is on its way should arrive. Somebody at a keyboard
            # comes back, and it is in the outbox.
            log.info("%s: leaving", signal.Signals(stopped.signal).name)
            left = self.config.site.stop_seconds - 2 * LEAVE_SECONDS if stopped.signal != signal.SIGINT else 1.0
            if not self.courier.settle(max(0.0, min(left, self._ends_at - time.monotonic()))):
                log.warning("a contribution is still on its way; it is sent again when this site comes back")
            raise
        except RefusedError as error:
            if error.code != Code.UNAUTHORIZED:
                raise
            file = self.config.site.token_file
            sent = f"the token in {self.config.path(file)} was sent" if file else "[site] token_file is not set"
            raise RefusedError(error.code, f"{error.detail} ({sent})") from None
        except LostError:
            back_soon = True  # the launcher starts all of them again
            raise
        finally:
            self._over = True
            self.courier.close(back_soon=back_soon)
            for background in (self._saver, self._evaluations):
                background.shutdown(wait=True, cancel_futures=True)
            if exporter is not None:
                exporter.shutdown()
                exporter.server_close()

    def _run(self) -> None:
        with self.crew.team.waiting():
            joined = self.courier.begin(self.config.site.patience_seconds)
        if self.lineage not in (None, joined.lineage):
            raise RefusedError(Code.WRONG_RUN, f"the coordinator now serves run {joined.run}, not {self.lineage}")
        self.lineage, self.joined = joined.lineage, True
        self.learner, evaluator = self._prepare(joined)
        self._drive(self.learner)
        self.learner.save_before_leaving()
        self.learner.training = False  # from here on a stop is one at once
        self._evaluate_the_end(self.learner, evaluator)
        core = self.learner.core
        log.info("the run is finished: %d steps, %d tokens here", core.steps, core.tokens)

    def stop_on_signals(self) -> None:
        """Makes SIGTERM and SIGINT end `run` with Stopped, after a clean leave and within [site] stop_seconds.

        Training is interrupted between steps, so that what it saves is whole; before it, there is nothing to save.
        Where a step, a disk or a link takes too long, the program ends where it is: a start goes on from the last
        checkpoint, whatever the end was.
        """
        limit = self.config.site.stop_seconds

        def give_up(number: int) -> None:
            log.error("not stopped within [site] stop_seconds = %g; ending here", limit)
            os._exit(128 + number)

        def stop(number: int, _frame: object) -> None:
            self.stopped_by = number
            if self._ends_at == math.inf:
                self._ends_at = time.monotonic() + limit
                watchdog = threading.Timer(limit, give_up, (number,))
                watchdog.daemon = True
                watchdog.start()
            if self._over:
                return  # it is leaving as it is
            if self.learner is None or not self.learner.training:
                raise Stopped(number)
            self.courier.events.put(Stop(number))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _prepare(self, joined: Joined) -> tuple[Learner, Evaluates]:
        """The model, the data and how fast they go together."""
        run, config = received_run(joined.config), self.config
        layout = Layout.from_wire(joined.layout)
        self.ensemble = recruit(self.crew, config, joined.config, layout, joined.fingerprint)
        self.task = task = self.ensemble.trainer.task
        log.info("site %s in run %s on %s", config.site.name, joined.run, self.crew.describe())
        warm_up()

        def dealt(shard: Shard) -> BatchStream:
            return stream_for(self.crew, task.train_batches(shard, run.inner.batch_size))

        shard = joined.orders.shard
        stream_of: Callable[[Shard], Any] = dealt
        with self.crew.team.waiting():  # data are opened, which may mean that they are tokenised
            stream = dealt(Shard(shard.index, shard.count, shard.seed))
            if (manifest := manifest_of(task)) is not None:
                self.courier.describe_data(manifest)
        if manifest is not None:
            state = config.path(config.site.state)
            leased = LeasedStream(
                task,
                manifest,
                run.inner.batch_size,
                run.run.seed,
                state,
                run=joined.run,
                settled=partial(oldest_lease, state),
            )
            stream_of = lambda _: leased  # noqa: E731
        seconds = calibrate(self.crew, self.ensemble, stream)
        evaluator: Evaluates
        if self.crew.team.alone:
            evaluator = Evaluator(self.ensemble, self.courier, self._evaluations)
        else:
            evaluator = TogetherEvaluator(self.ensemble, self.courier)
        place = Place(config.path(config.site.state), config.site.checkpoint_seconds, self._saver)
        learner = self.learns(
            run,
            joined,
            self.ensemble,
            stream_of,
            self.courier,
            evaluator,
            self.metrics,
            place,
            time.monotonic,
            seconds,
            config.site.outage_steps,
        )
        return learner, evaluator

    def _drive(self, learner: Learner) -> None:
        """The learner's course in real time."""
        course = learner.course()
        try:
            need = next(course)
            while True:
                match need:
                    case Train():
                        learner.step()
                        need = course.send(self._news())
                    case Hear():
                        need = course.send([self._next(), *self._news()])
        except StopIteration:
            return

    def _next(self) -> Event:
        """Waits for news; the other ranks hear meanwhile that nothing is wrong."""
        while True:
            try:
                return self.courier.events.get(timeout=None if self.crew.team.alone else TICK_SECONDS)
            except queue.Empty:
                self.ensemble.tick()

    def _news(self) -> Sequence[Event]:
        """What has come in, without waiting."""
        events: list[Event] = []
        while True:
            try:
                events.append(self.courier.events.get_nowait())
            except queue.Empty:
                return events

    def _evaluate_the_end(self, learner: Learner, evaluator: Evaluates) -> None:
        """The finished run's weights are evaluated by the site that asks first; the others need not wait for it."""
        evaluator.finish()
        with self.crew.team.waiting():
            orders = self.courier.orders()
        if orders is not None and orders.evaluate:
            evaluator.begin(learner.anchors)
            evaluator.finish()

    def _count(self, up: int, down: int) -> None:
        self.metrics.bytes_up.inc(up)
        self.metrics.bytes_down.inc(down)
