"""Several processes as the ranks of one process group, for tests of what is distributed.

Real processes and Gloo, which meet at a file: no port is bound. They are forked from a server that has imported torch
once, so that a test takes a fraction of a second and not the time of its imports.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.optim"]


class RankError(AssertionError):
    """A rank failed, ended without a word or was too slow; the message says which, with its traceback."""


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    group: bool = True,
    lost: Collection[int] = (),
) -> list[Any]:
    """What `function(*args)` returns at each of `ranks` processes, in the order of ranks.

    `function` stands at the top of a module, and what it takes and returns can be pickled (tensors are copied). Each
    process has one thread of torch, RANK, LOCAL_RANK and WORLD_SIZE in its environment, and a Gloo group as the
    default one, unless `group` is false. Raises RankError with the traceback of the first rank that fails, or after
    `timeout` seconds; all are killed then. `lost` are ranks that are meant to end without a word, of which there is
    None; the others do not wait for them in the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes: list[BaseProcess] = []
    ends: list[Connection] = []
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store" if group else None
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                ends.append(ours)
                process = context.Process(
                    target=_rank,
                    args=(theirs, rank, ranks, store, timeout, not lost, _plain((function, args))),
                    daemon=True,
                )
                process.start()
                processes.append(process)
                theirs.close()
            return _collect(ends, time.monotonic() + timeout, lost)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            for end in ends:
                end.close()


def _collect(ends: list[Connection], deadline: float, lost: Collection[int]) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(lost)
    while len(results) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank for rank in range(len(ends)) if rank not in results]
            raise RankError(f"no answer in time from ranks {silent}; a rank may wait for another in a collective")
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.index(end)
            try:
                worked, value = pickle.loads(end.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} ended without a word (killed, or a crash in native code)") from None
            if not worked:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]


def _rank(
    answer: Connection, rank: int, ranks: int, store: Path | None, timeout: float, together: bool, work: bytes
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not lead to an address
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if store is not None:
            dist.init_process_group(
                "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
            )
        function, args = pickle.loads(work)
        said = _plain((True, function(*args)))
        if store is not None and together:
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        said = _plain((False, traceback.format_exc()))
    answer.send_bytes(said)


def _plain(value: Any) -> bytes:
    """As bytes that need nothing of this process: torch would send tensors as shared memory, which ends with it."""
    file = io.BytesIO()
    pickle.Pickler(file).dump(value)
    return file.getvalue()
