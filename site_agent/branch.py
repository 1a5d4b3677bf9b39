"""One coordinator, as a site deals with it: the session, its heartbeats, and what was ordered last.

A run has one coordinator, or several that share nothing. The first of them is the one that a site belongs to: it gives
the orders, leases the data and has the weights evaluated. The others are told that this site trains, because their
rounds wait for it, and nothing that only one may act upon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from dataclasses import dataclass
from typing import Protocol

import torch

from shared.config import received_run
from shared.errors import ConfigError, IsthmusError, RefusedError
from shared.protocol import Code, Evaluation, Heartbeat, Joined, Orders, Preview
from site_agent.contribution import Address
from site_agent.link import Link, Refusal
from site_agent.metrics import Metrics
from site_agent.news import Report

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0
CONFIG_CHANGED = "config-changed"
"""Why an agent ends that was told of another config: not a coordinator's word, its own."""


class Speaker(Protocol):
    """What the site says of itself, as of now, to every coordinator; and who hears what they answer."""

    metrics: Metrics
    report: Report
    repairs: int
    evaluates: bool
    evaluation: Evaluation | None
    soon_seconds: float
    heartbeats_per_lease: int

    def heard(self, branch: Branch, orders: Orders) -> None: ...
    def touched(self, changed: bool) -> None: ...


class Branch:
    """Coordinator `index` (from 0) of the run. `joined` is there once it was joined, `orders` after the first
    heartbeat."""

    def __init__(self, link: Link, index: int, speaker: Speaker) -> None:
        self.link, self.index = link, index
        self.session = ""
        self.answers = True
        self.joined: Joined
        self.orders: Orders | None = None
        self.hurry = asyncio.Event()
        self._speaker = speaker
        self._rejoining = asyncio.Lock()
        self._follows = False
        link.in_touch = self._touch

    # -- life

    async def join(self, patience: float, like: Joined | None) -> None:
        """Joins the run and begins the session; `like`: the first coordinator's answer, where this is another. Raises
        RefusedError, FaultError, ConfigError."""
        await self.link.__aenter__()
        begun = False
        while not begun:
            self.joined = await self.link.join(_software(), patience)
            self._check(self.joined, like)
            self.session = self.joined.session
            begun = await self._begin_session()
        self._follows = received_run(self.joined.config).rounds.pacing == "follow"

    def _check(self, joined: Joined, like: Joined | None) -> None:
        check_place(self.link.url, joined.shard, self.index)
        if like is not None:
            check_agreement(self.link.url, joined, like)

    async def rejoin(self, session: str) -> None:
        """Joins again after the lease was lost; once, however many requests found out."""
        async with self._rejoining:
            if self.session != session:
                return
            run = self.link.run
            log.warning("the lease was lost; joining again")
            begun = False
            while not begun:
                joined = await self.link.join(_software())
                if joined.run != run:
                    raise RefusedError(Code.WRONG_RUN, f"the coordinator now serves run {joined.run}, not {run}")
                if joined.config != self.joined.config:
                    raise RefusedError(CONFIG_CHANGED, "the run's config was changed; start this agent again")
                self.session = joined.session
                begun = await self._begin_session()

    async def _begin_session(self) -> bool:
        """A session begins with its first heartbeat, and uploads wait for it; whether the coordinator still knew it."""
        try:
            orders = await self.link.heartbeat(self._heartbeat(self._speaker.report, None))
        except Refusal as refusal:
            if refusal.code != Code.NOT_A_MEMBER:
                raise
            return False
        self._speaker.heard(self, orders)
        return True

    async def leave(self, *, back_soon: bool = False) -> None:
        """Leaves the run if it can within a few seconds, unless the site will be `back_soon`; closes the link."""
        try:
            if self.session and not back_soon:
                async with asyncio.timeout(LEAVE_SECONDS):
                    # A last report, so that the books close on what was really done.
                    await self.ask_orders()
                    await self.link.leave(self.session, LEAVE_SECONDS)
        except (TimeoutError, IsthmusError) as error:
            # (A coordinator that was restored, or serves another run, has nobody to say goodbye to.)
            moved = isinstance(error, RefusedError) and error.code == Code.WRONG_RUN
            log.log(logging.DEBUG if moved else logging.WARNING, "left without a goodbye: %s", error)
        finally:
            await self.link.__aexit__()

    def _touch(self, answers: bool) -> None:
        changed, self.answers = answers != self.answers, answers
        self._speaker.touched(changed)

    # -- heartbeats

    async def ask_orders(self) -> Orders:
        """A heartbeat now, and the orders that it brings. Raises IsthmusError where no answer comes soon."""
        speaker = self._speaker
        return await self.link.heartbeat(self._heartbeat(speaker.report, speaker.evaluation), LEAVE_SECONDS)

    async def heartbeats(self) -> None:
        """Without end. Raises what is not to be mended by joining again."""
        while True:
            report, evaluation, session = self._speaker.report, self._speaker.evaluation, self.session
            try:
                orders = await self.link.heartbeat(self._heartbeat(report, evaluation))
            except Refusal as refusal:
                self._speaker.metrics.refused.labels(refusal.code).inc()
                if refusal.code == Code.NOT_A_MEMBER:
                    await self.rejoin(session)
                elif refusal.code != Code.SUPERSEDED or session == self.session:
                    raise  # (superseded by itself: an upload found out first that the lease was lost)
                continue
            if self.index == 0 and evaluation is not None and evaluation is self._speaker.evaluation:
                self._speaker.evaluation = None
            self._speaker.heard(self, orders)
            await self._pause(report)

    async def _pause(self, report: Report) -> None:
        seconds = self.joined.lease_seconds / self._speaker.heartbeats_per_lease
        if report.state != "training" or (report.starved and self.index == 0) or self._follows:
            # Who wants to join rounds that are about to close must hear of them in time, and who has no data to
            # train on is waiting for some.
            seconds = min(seconds, self._speaker.soon_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.hurry.wait()
        self.hurry.clear()

    def _heartbeat(self, report: Report, evaluation: Evaluation | None) -> Heartbeat:
        first = self.index == 0
        return Heartbeat(
            run=self.link.run,
            session=self.session,
            state=report.state,
            steps=report.steps,
            tokens=report.tokens,
            step_seconds=report.step_seconds,
            overlap_seconds=report.overlap_seconds,
            sync_seconds=report.sync_seconds,
            training_share=min(1.0, max(0.0, report.training_share)),
            download_rate=self.link.download_rate,
            loss=report.loss if report.loss is not None and abs(report.loss) <= 1e6 else None,
            evaluation=evaluation if first else None,
            repairs=self._speaker.repairs,
            evaluates=self._speaker.evaluates and first,
            data=report.data if first else None,
        )


@dataclass(frozen=True)
class Home:
    """Which coordinator has a fragment, and how containers name it there."""

    branch: Branch
    address: Address


def check_place(url: str, shard: int, wanted: int) -> None:
    """Raises ConfigError where the coordinator at `url` is not the one that it should be."""
    if shard == wanted:
        return
    if wanted == 0:
        raise ConfigError(
            f"[site] coordinator: {url} is coordinator {shard} of its run, from 0, and a site joins the first; name "
            "the first URL of [run] coordinators"
        )
    raise ConfigError(
        f"{url} is entry {wanted} of [run] coordinators, from 0, and what answers there is coordinator {shard}; bring "
        "the list into the order of --shard"
    )


def check_agreement(url: str, told: Joined | Preview, first: Joined | Preview) -> None:
    """Raises ConfigError where the coordinator at `url` serves another config than the first one, or began its part of
    the run with a task that says otherwise of itself."""
    if told.config != first.config:
        raise ConfigError(f"{url} serves another config than the first coordinator; serve the same run.toml at all")
    if told.fingerprint != first.fingerprint:
        facts = told.fingerprint.items() ^ first.fingerprint.items()
        raise ConfigError(
            f"{url} began with another {min(name for name, _ in facts)} than the first coordinator; begin its part of "
            "the run again, with the same file and an empty --state"
        )


def _software() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)[:128], "system": platform.system()}
