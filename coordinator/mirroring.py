"""When the mirror is made: beside everything else, and never in its way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable

from coordinator.machine import Machine
from coordinator.store.mirror import Cancelled, Mirror, Pass, Place
from coordinator.store.state_dir import StateDir
from coordinator.workers import Workers
from shared.config import StoreTable

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
SLOW_SECONDS = 300.0


class Mirroring:
    """The passes of a mirror at `place` (None: there is none): one at a time, `mirror_seconds` apart. What fails is
    told, counted, and tried again with the next one."""

    def __init__(
        self, place: Place | None, store: StateDir, config: StoreTable, workers: Workers, machine: Machine
    ) -> None:
        self._mirror = Mirror(place, store, config.keep_checkpoints) if place is not None else None
        self._every, self._workers = config.mirror_seconds, workers
        self._clock, self._wall = machine.clock, machine.wall
        self._cancelled = threading.Event()
        self._begun: float | None = None
        self._under_way: asyncio.Task[None] | None = None
        self._again: int | None = None
        self._slow_at = math.inf
        self._faulty = False

    def due(self) -> bool:
        """Whether a pass should begin with the checkpoint that has just been written."""
        if self._mirror is None or self._under_way is not None:
            return False
        return self._begun is None or self._clock() - self._begun >= self._every

    def begin(self, tokens: int) -> None:
        """Begins a pass over what is durable now, `tokens` of the run merged; after the one that is under way, if one
        is."""
        if self._mirror is None or self._cancelled.is_set():
            return
        if self._under_way is not None:
            self._again = tokens
            return
        self._begun, self._again = self._clock(), None
        self._slow_at = self._begun + max(self._every, SLOW_SECONDS)
        self._under_way = asyncio.create_task(self._pass(self._mirror, tokens))

    def retry(self, tokens: int) -> None:
        """Begins again where the last pass failed and nothing else will: after some time. Tells where the pass that is
        under way takes long; what a far file system does cannot be broken off."""
        if self._under_way is not None and self._begun is not None and self._clock() >= self._slow_at:
            log.warning("a pass of the mirror has been under way for %.0f s", self._clock() - self._begun)
            self._slow_at = math.inf
        if self._faulty and self._begun is not None and self._clock() - self._begun >= RETRY_SECONDS:
            self.begin(tokens)

    async def stop(self) -> None:
        """Breaks off what is under way; the pass before it stays good."""
        self._cancelled.set()
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.gather(self._under_way, return_exceptions=True)

    async def _pass(self, mirror: Mirror, tokens: int) -> None:
        cancelled = self._cancelled.is_set
        try:
            versions = await self._workers.on(self._workers.merger, mirror.stage)
            done = await _on_a_daemon_thread(lambda: mirror.copy(versions, tokens, self._wall(), cancelled))
            self._faulty = False
            self._workers.metrics.mirrored_at.set(done.written_at)
            log.info("mirrored: %d files, %.1f MB", len(done.files), sum(done.files.values()) / 1e6)
        except Cancelled:
            log.info("a pass of the mirror was broken off")
        except Exception as error:  # file systems raise whatever their libraries do, and a mirror stops nothing
            self._failed(error)
        finally:
            self._under_way = None
        if (again := self._again) is not None:
            self.begin(again)

    def _failed(self, error: Exception) -> None:
        self._faulty = True
        self._workers.metrics.mirror_faults.inc()
        log.error("the mirror could not be written (%s: %s); it is tried again later", type(error).__name__, error)


async def _on_a_daemon_thread(work: Callable[[], Pass]) -> Pass:
    """On a thread that nobody waits for when the program ends: a far file system may not answer for long."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Pass] = loop.create_future()

    def settle(done: Pass | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif done is not None:
            future.set_result(done)

    def body() -> None:
        done, error = None, None
        try:
            done = work()
        except Exception as fault:
            error = fault
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, done, error)

    threading.Thread(target=body, name="mirror", daemon=True).start()
    return await future
