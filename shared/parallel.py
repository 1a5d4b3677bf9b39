"""Work on the chunks of a fragment, on all cores: a chunk is a section of a container, and needs nothing of the others.

Codecs, zstd and hashes leave Python's lock alone, so threads are enough. Results are in the order of the chunks, and
what becomes of them does not depend on how many threads there were. Vectors that one core is through with sooner than
it has called others (a chunk, or many tensors of a few elements) stay on the thread that asks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar, cast

from shared.fragments import CHUNK_ELEMENTS, Chunk

T = TypeVar("T")
CORES = os.cpu_count() or 1
AHEAD = 2
"""Results for each core that may wait for whoever takes them in order."""

_THREADS = ThreadPoolExecutor(CORES, "chunks")
"""For whoever has no threads of their own. They are started with the first work for them."""


def over_chunks(chunks: Sequence[Chunk], work: Callable[[int, Chunk], T], executor: Executor | None = None) -> list[T]:
    """`work(section, chunk)` of every chunk on the threads of `executor` (None: this process's); the results in order.

    Raises what the first chunk raises that cannot be worked on, once no thread is at work any more: nothing may still
    write to a state that is given up. Not to be called from within `work`.
    """
    if _too_little(chunks):
        return [work(section, chunk) for section, chunk in enumerate(chunks)]
    done: list[T | None] = [None] * len(chunks)
    failed: dict[int, BaseException] = {}
    left = iter(enumerate(chunks))

    def go() -> None:
        # Each thread takes the next chunk itself: a task of the executor for each costs as much as decoding it.
        # What has been taken is worked on, so the first chunk that fails is among those that have failed.
        while not failed and (taken := next(left, None)) is not None:
            section, chunk = taken
            try:
                done[section] = work(section, chunk)
            except BaseException as error:
                failed[section] = error

    threads = [(executor or _THREADS).submit(go) for _ in range(min(CORES, len(chunks)))]
    wait(threads)
    for thread in threads:
        thread.result()
    if failed:
        raise failed[min(failed)]
    return cast(list[T], done)


def in_order(
    chunks: Sequence[Chunk], work: Callable[[int, Chunk], T], executor: Executor | None = None
) -> Generator[T]:
    """The same for results that are large and used one by one: AHEAD for each core, and no more, are there or in the
    making beyond the one that was taken last. Once it is closed, or has raised, no thread is at work any more."""
    if _too_little(chunks):
        yield from (work(section, chunk) for section, chunk in enumerate(chunks))
        return
    coming: deque[Future[T]] = deque()
    try:
        for section, chunk in enumerate(chunks):
            if len(coming) == AHEAD * CORES:
                yield coming.popleft().result()
            coming.append((executor or _THREADS).submit(work, section, chunk))
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()
        wait(coming)


def _too_little(chunks: Sequence[Chunk]) -> bool:
    return CORES == 1 or not chunks or chunks[-1].stop - chunks[0].start <= CHUNK_ELEMENTS
