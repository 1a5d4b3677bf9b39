"""The threads beside the event loop, and writes that must happen.

One thread writes the journal, so that its rows have an order; one carries out merges and everything that
needs a fragment's state to stand still. As many as there are cores (two at least) screen uploads and write what comes
in: a contribution is screened by one of them, because its digest needs its bytes in order, and others beside it. As
many again serve whichever merge runs, a chunk each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

from coordinator.machine import MACHINE, Machine
from coordinator.metrics import Metrics
from coordinator.refused import Refused
from shared.errors import FaultError
from shared.protocol import Code

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """The coordinator's thread pools. `storage_fault` is the newest unmended refusal of the disk."""

    def __init__(self, metrics: Metrics, machine: Machine = MACHINE) -> None:
        self.writer = machine.pool(1, "journal")
        self.merger = machine.pool(1, "merge")
        self.screeners = machine.pool(max(2, machine.cores), "screen")
        self.chunks = machine.pool(machine.cores, "chunks")
        self.storage_fault: str | None = None
        self.stopping = asyncio.Event()
        self.metrics = metrics

    async def on(self, pool: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(…)` on a thread of `pool`."""
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: function(*args, **kwargs))

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A journal write for a request: where the disk refuses, so do we, and nothing was acknowledged."""
        try:
            result = await self.on(self.writer, function, *args, **kwargs)
        except OSError as error:
            raise self.storage_refusal(error) from error
        self.storage_fault = None
        return result

    async def durably(
        self, pool: Executor, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """A write that must happen for the run to go on: tried again until the disk takes it, or `stopping` is
        set; then FaultError, and the next start does it."""
        pause = 0.5
        while True:
            try:
                result = await self.on(pool, function, *args, **kwargs)
            except OSError as error:
                self.storage_refusal(error)
                if self.stopping.is_set():
                    raise FaultError(f"{what} was not written: {error}; the next start does it") from error
                log.error("%s cannot be written: %s; trying again in %.1f s", what, error, pause)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), pause)
                pause = min(30.0, pause * 2)
            else:
                self.storage_fault = None
                return result

    def storage_refusal(self, error: OSError) -> Refused:
        """Counts a fault of the disk, and says it as a refusal."""
        self.metrics.storage_faults.inc()
        self.storage_fault = str(error)
        return Refused(Code.STORAGE, f"the coordinator's disk refuses: {error}; try again later")

    def shutdown(self) -> None:
        """Lets what is under way finish; nothing new begins."""
        for pool in (self.screeners, self.merger, self.writer, self.chunks):
            pool.shutdown(wait=True, cancel_futures=True)
