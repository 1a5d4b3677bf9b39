"""The processes that train one model at a site, and how they talk.

One of them, rank 0, is the *head*: it has the run, the data and all state, and tells the others what to do next; the
others have devices. What they say to each other goes through Gloo on the host, whatever the devices are: orders and
batches are small, and a make of accelerator cannot talk to another make. Gradients of equal devices go through their
own collective library (`site_agent.training.forms`).

Messages are msgpack and raw bytes: nothing is unpickled here either. Who waits for a rank that has died is told so by
its connection, and raises LostError: the launcher then ends all of them and starts them again from the last local
checkpoint.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import ConfigError, FaultError, IsthmusError, LostError
from shared.fragments import F32

Order = dict[str, Any]
TICK_SECONDS = 60.0


class Team:
    """This process's place among those that train one model: `rank` of `size`. `group` is theirs, of Gloo; None where
    it is alone. Methods are collective: all call the same one, in the same order. Each raises LostError where a rank
    is gone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._posted: list[tuple[dist.Work | None, Tensor]] = []
        """What was said and may not have been taken yet, and the memory that it is in."""

    @property
    def alone(self) -> bool:
        return self.group is None

    @property
    def head(self) -> bool:
        return self.rank == 0

    # -- from the head to the others

    def tell(self, order: Mapping[str, Any]) -> None:
        """The head: says what is to be done. Others `hear`."""
        self.deal_out(order, ())
        self._settle()

    def hear(self) -> Order:
        """Waits for the head's next order."""
        order: Order = msgpack.unpackb(self._broadcast(None).tobytes(), strict_map_key=False)
        return order

    def _broadcast(self, data: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        size = torch.tensor([0 if data is None else len(data)])
        with self._together():
            dist.broadcast(size, group=self.group, group_src=0)
            body = torch.empty(int(size), dtype=torch.uint8) if data is None else torch.from_numpy(data.copy())
            dist.broadcast(body, group=self.group, group_src=0)
        array: np.ndarray[Any, Any] = body.numpy()
        return array

    def share(self, tensor: Tensor) -> Tensor:
        """The head's tensor at everyone (others give one of its shape and dtype, which is filled)."""
        if not self.alone:
            with self._together():
                dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def deal_out(self, order: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """The head: says what is to be done and gives each rank its part for it, which others `hear` and `take`. Nobody
        is waited for until the head has the next thing to say: a slow rank may still be at the work before."""
        if self.alone:
            return
        self._settle()
        told = {**order, "bytes": [len(part) for part in parts]} if parts else order
        body = _tensor(np.frombuffer(msgpack.packb(dict(told)), np.uint8))
        size = torch.tensor([len(body)])
        with self._together():
            for said in (size, body):
                self._posted.append((dist.broadcast(said, group=self.group, group_src=0, async_op=True), said))
            for rank, part in enumerate(parts):
                if rank and part:
                    mine = _tensor(np.frombuffer(part, np.uint8))
                    self._posted.append((dist.isend(mine, group=self.group, group_dst=rank), mine))

    def take(self, order: Order) -> bytes:
        """This rank's part for an order that it has heard."""
        body = torch.empty(order["bytes"][self.rank], dtype=torch.uint8)
        if len(body):
            with self._together():
                dist.recv(body, group=self.group, group_src=0)
        return bytes(body.numpy())

    def _settle(self) -> None:
        """Waits until what was said is taken."""
        posted, self._posted = self._posted, []
        with self._together():
            for work, _ in posted:
                if work is not None:
                    work.wait()

    def deal(self, whole: F32 | None, bounds: Sequence[tuple[int, int]]) -> F32:
        """To each rank its elements of the head's vector (None at the others), fp32 on the CPU."""
        if whole is None:
            start, stop = bounds[self.rank]
            if start == stop:
                return np.empty(0, np.float32)
            with self._together():
                return self._receive(0).view(np.float32)
        self._settle()
        with self._together():
            for rank in range(1, self.size):
                start, stop = bounds[rank]
                if stop > start:
                    self._send(whole[start:stop].view(np.uint8), rank)
        start, stop = bounds[0]
        return whole[start:stop]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the head, while it waits for others than its team, which is to hear nothing else meanwhile: the others
        hear that it is there."""
        over = threading.Event()

        def tick() -> None:
            # (Where a rank is lost the head finds out by itself, when it has the next thing to say.)
            with suppress(LostError):
                while not over.wait(TICK_SECONDS):
                    self.tell({"do": "tick"})

        ticking = threading.Thread(target=tick, name="ticks", daemon=True)
        if not self.alone:
            ticking.start()
        try:
            yield
        finally:
            over.set()
            if not self.alone:
                ticking.join()

    # -- from the others to the head

    def collect(self, part: bytes) -> list[bytes] | None:
        """What every rank has, at the head, in the order of the ranks; None at the others."""
        if self.alone:
            return [part]
        with self._together():
            if not self.head:
                self._send(np.frombuffer(part, np.uint8), 0)
                return None
            return [part, *(bytes(self._receive(rank)) for rank in range(1, self.size))]

    # -- everyone

    def everyone(self, *values: float) -> list[list[float]]:
        """What every rank says, at everyone."""
        if self.alone:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together():
            dist.all_gather(theirs, mine, group=self.group)
        return [each.tolist() for each in theirs]

    def tell_all(self, said: Mapping[str, Any]) -> list[Order]:
        """What every rank says, at everyone; for what is said once."""
        parts = self.collect(msgpack.packb(dict(said)))
        if self.alone or parts is not None:
            together = msgpack.packb(parts)
            if not self.alone:
                self._broadcast(np.frombuffer(together, np.uint8))
        else:
            together = self._broadcast(None).tobytes()
        return [msgpack.unpackb(part, strict_map_key=False) for part in msgpack.unpackb(together)]

    def agree(self, work: Callable[[], Any]) -> Any:
        """Does `work` and returns what it does. Where it fails, at whichever rank, the head raises what was raised
        there, and the others LostError."""
        error: BaseException | None = None
        done: Any = None
        try:
            done = work()
        except Exception as failed:
            error = failed
        told = self.tell_all({"error": None if error is None else [type(error).__name__, str(error)]})
        if self.head and error is not None:
            raise error
        for rank, each in enumerate(told):
            if each["error"] is not None:
                kind, text = each["error"]
                raise _error(kind, text, rank) if self.head else LostError("the head says why")
        return done

    def _send(self, data: np.ndarray[Any, Any], rank: int) -> None:
        dist.send(torch.tensor([len(data)]), group=self.group, group_dst=rank)
        if len(data):
            dist.send(_tensor(data), group=self.group, group_dst=rank)

    def _receive(self, rank: int) -> np.ndarray[Any, Any]:
        size = torch.tensor([0])
        dist.recv(size, group=self.group, group_src=rank)
        body = torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.recv(body, group=self.group, group_src=rank)
        array: np.ndarray[Any, Any] = body.numpy()
        return array

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            raise LostError(f"a process of this site is lost: {first_sentence(error)}") from None


ALONE = Team()


def _tensor(data: np.ndarray[Any, Any]) -> Tensor:
    """The same memory, where it may be written to: a tensor of other memory is none."""
    return torch.from_numpy(data if data.flags.writeable else data.copy())


def first_sentence(error: Exception) -> str:
    """Of what Gloo says, without where in its source it stands."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[[^\]]*\] ", "", first).split(". ")[0]


def _error(kind: str, text: str, rank: int) -> IsthmusError:
    """What another rank has raised, as far as it is for people."""
    if kind == ConfigError.__name__:
        return ConfigError(f"rank {rank}: {text}")
    return FaultError(f"rank {rank}: {text}" if kind == FaultError.__name__ else f"rank {rank}: {text} ({kind})")
