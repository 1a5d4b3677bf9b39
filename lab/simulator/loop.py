"""An event loop in virtual time, and threads that are none: all runs in one thread, in an order that a seed decides.

Time stands still while code runs and jumps to the next thing that is due. A job for a thread pool takes its time and
then happens at once; jobs of one pool of one thread happen in order, as they do in production.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any

from typing_extensions import TypeVarTuple

Ts = TypeVarTuple("Ts")


class Deadlock(Exception):
    """Nothing is due any more, and somebody still waits."""


class _Clock(selectors.SelectSelector):
    """A selector that has no files to look at: what would be waited for, passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("nothing is due any more")
        self.now += max(0.0, timeout)
        return []


class Lanes(Executor):
    """A pool of `count` imagined threads. `duration` says how long the next job takes, in seconds.

    What is submitted directly, from within a job, happens at once.
    """

    def __init__(self, count: int, duration: Callable[[], float]) -> None:
        self._free = [0.0] * count
        self._duration = duration

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Any:
        return map(fn, *iterables)

    def ends_at(self, now: float) -> float:
        """When a job that is given now will have been done."""
        end = max(now, heapq.heappop(self._free)) + self._duration()
        heapq.heappush(self._free, end)
        return end


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module's docstring. `default` takes what goes to `asyncio.to_thread`."""

    # asyncio's own.
    _ready: deque[Any]
    _scheduled: list[Any]
    _stopping: bool

    def __init__(self, duration: Callable[[], float]) -> None:
        self._virtual = _Clock()
        super().__init__(self._virtual)
        self.default = Lanes(64, duration)

    def time(self) -> float:
        return self._virtual.now

    def _run_once(self) -> None:
        """One turn, as asyncio's own but for what virtual time has no use for: it is a quarter of a schedule's time."""
        ready, scheduled = self._ready, self._scheduled
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False
            if scheduled:
                self._virtual.now = max(self._virtual.now, scheduled[0]._when)
            elif not self._stopping:
                raise Deadlock("nothing is due any more")
        now = self._virtual.now
        while scheduled and scheduled[0]._when <= now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], Any], *args: *Ts) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        lanes = executor if isinstance(executor, Lanes) else self.default
        self.call_at(lanes.ends_at(self.time()), work)
        return future
