"""The ensemble: all ranks that train one model at a site, as the learner sees them: as one trainer.

The head says what is to be done, deals out what each needs of it, and does its own part; the others `serve`. There is
one order at a time, and everybody carries it out before the next. A site of one device is an ensemble of one, in which
nothing is said.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import msgpack
import numpy as np
from torch import Tensor, nn

from shared.codecs.kernels import U8
from shared.errors import ConfigError, FaultError
from shared.fragments import F32
from shared.task import Batch, BatchStream
from site_agent.core.alignment import How
from site_agent.core.shares import Balance, Pass, passes
from site_agent.training.batches import Ahead, cut, pack, sequences_of, unpack
from site_agent.training.replica import DivergedError
from site_agent.training.team import Order, Team
from site_agent.training.trainer import Trainer, Work, evaluate

log = logging.getLogger(__name__)

__all__ = ["Ensemble", "serve"]

MEASURED_STEPS = 3
PER_FRAGMENT = ("begin", "snapshot", "forget", "encode", "leave", "settle", "take_up")
"""Orders about one fragment, with up to two of its vectors, of which each rank gets its part."""


class Ensemble:
    """`trainer` is the head's own. `micro_batch`: the most sequences of a pass; 0: as many as a rank has in a step.
    `speeds` of the device groups in sequences per second, where they have been measured. See
    `site_agent.learner.Trains` for the rest. Raises FaultError where a rank is lost."""

    def __init__(self, trainer: Trainer, micro_batch: int = 0, speeds: Sequence[float] = ()) -> None:
        self.trainer, self.team, self.micro_batch = trainer, trainer.team, micro_batch
        groups = trainer.seat.groups
        self.balance = Balance(trainer.inner.batch_size, speeds or [float(len(group.ranks)) for group in groups])

    @property
    def skipped_steps(self) -> int:
        return self.trainer.skipped_steps

    # -- steps

    def step(self, stream: BatchStream, lr: float) -> tuple[float, int, float]:
        """One inner step on the stream's next batch: (loss, tokens, seconds)."""
        began = time.perf_counter()
        work = self._dealt("step", next(stream), lr=lr)
        stepped = self.trainer.step(work, lr, stream.draw if isinstance(stream, Ahead) else None)
        if self.balance.stepped(stepped.seconds):
            log.info("the batch is dealt anew: %s", self.describe())
        return stepped.loss, stepped.tokens, time.perf_counter() - began

    def describe(self) -> str:
        """Who gets how much of the batch."""
        groups = zip(self.trainer.seat.groups, self.balance.shares, self.balance.speeds, strict=True)
        return ", ".join(f"{group.name} {share} sequences at {speed:.3g}/s" for group, share, speed in groups)

    def _dealt(self, do: str, batch: Batch, **more: Any) -> list[Work]:
        """The head's own passes over the batch; the others are told theirs, to `do` it with them."""
        if self.team.alone and not self.micro_batch:
            return [Work(batch)]
        sequences = sequences_of(batch)
        plan = self.plan(sequences)
        stated = [[_stated(one, cut(batch, one.start, one.stop)) for one in mine] for mine in plan]
        if not self.team.alone:
            packed = [b"" if rank == 0 else pack(parts) for rank, parts in enumerate(stated)]
            self.team.deal_out({"do": do, **more}, packed)
        return [_work(each) for each in stated[0]]

    def plan(self, sequences: int) -> list[list[Pass]]:
        """Of each rank its passes over a batch of so many sequences."""
        shares = self.balance.shares
        if sequences != self.balance.batch:
            shares = Balance(sequences, self.balance.speeds).shares
        groups = self.trainer.seat.groups
        return _plan(sequences, tuple(shares), tuple(group.ranks for group in groups), self.micro_batch)

    def fit(self, batch: Batch) -> None:
        """Sets the micro-batch to the most sequences that every device has memory for, by trying, unless it is set. The
        caller writes the weights afterwards. Raises FaultError where there is none for one."""
        if self.micro_batch or (self.team.alone and not self.trainer.tries):
            return
        try:
            sequences = sequences_of(batch)
        except ConfigError:
            if self.team.alone:
                return  # it is trained as it is
            raise
        most = max(one.stop - one.start for mine in self.plan(sequences) for one in mine)
        self.micro_batch = most
        while not self._all_fit(batch):
            if self.micro_batch == 1:
                raise FaultError(
                    "the devices have too little memory for a pass over one sequence: set [devices] recompute = true "
                    'or parallel = "fsdp", or train shorter sequences or a smaller model'
                )
            self.micro_batch = (self.micro_batch + 1) // 2
        if self.micro_batch < most:
            log.info("a pass is over at most %d sequences, which is what the devices have memory for", self.micro_batch)
        elif not self.team.alone:
            self.micro_batch = 0  # shares may change; what one rank had in a pass says nothing of another

    def _all_fit(self, batch: Batch) -> bool:
        return _all_fit(self.trainer, self._dealt("fits", batch))

    def calibrate(self, stream: BatchStream, steps: int, seconds: float) -> float:
        """Median seconds of an inner step, from at most `steps` real ones and about `seconds`, after those that warm
        up and measure the groups. The model's weights are moved by it; the caller writes them afterwards."""
        lr = self.trainer.inner.lr
        self.step(stream, lr)
        if len(self.balance.shares) > 1:
            self._measure_groups(stream, lr)
        self.reset()
        times: list[float] = []
        while len(times) < steps and (not times or sum(times) < seconds):
            times.append(self.step(stream, lr)[2])
        self.reset()
        return median(times)

    def _measure_groups(self, stream: BatchStream, lr: float) -> None:
        """Shares by what each group does in a step, for the first one; they settle while it trains."""
        for _ in range(2):
            steps = (self.trainer.step(self._dealt("step", next(stream), lr=lr), lr) for _ in range(MEASURED_STEPS))
            took = [median(seconds) for seconds in zip(*(stepped.seconds for stepped in steps), strict=True)]
            speeds = [max(1, share) / each for share, each in zip(self.balance.shares, took, strict=True)]
            self.balance = Balance(self.balance.batch, speeds)

    def exchange_seconds(self) -> float:
        """How long the groups take to sum their gradients, after once to warm up."""
        self.team.tell({"do": "time_exchange"})
        return self.trainer.time_exchange()

    def reset(self) -> None:
        """As if no step had been taken."""
        self.team.tell({"do": "reset"})
        self.trainer.reset()

    def seed(self, seed: int) -> None:
        self.team.tell({"do": "seed", "seed": seed})
        self.trainer.seed(seed)

    # -- fragments

    def begin(self, fragment: int, published: F32) -> None:
        self._do("begin", fragment, published)

    def snapshot(self, fragment: int) -> None:
        self._do("snapshot", fragment)

    def forget(self, fragment: int) -> None:
        self._do("forget", fragment)

    def encode(self, fragment: int, anchor: F32) -> list[U8]:
        sections: list[U8] = self._do("encode", fragment, anchor)
        return sections

    def leave(self, fragment: int, anchor: F32, delivered: F32) -> None:
        self._do("leave", fragment, anchor, delivered)

    def settle(self, fragment: int, *, delivered: bool) -> None:
        self._do("settle", fragment, delivered=delivered)

    def take_up(self, fragment: int, how: How, anchor: F32, published: F32) -> None:
        self._do("take_up", fragment, anchor, published, how=how)

    def _do(self, do: str, fragment: int, *vectors: F32, **more: Any) -> Any:
        self.team.tell({"do": do, "fragment": fragment, "vectors": len(vectors), "more": more})
        return _one_fragment(self.trainer, do, fragment, vectors, more)

    # -- state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See Trainer.state."""
        self.team.tell({"do": "state"})
        return self.trainer.state()

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """See Trainer.load_state."""
        self.team.tell({"do": "load_state"})
        self.trainer.load_state(tensors, plain)

    def evaluate(self, published: Sequence[F32], batches: Iterable[Batch]) -> float | None:
        """Mean loss over `batches` of these weights (a flat vector of each fragment), with the ranks' own models. The
        weights in training are on the host meanwhile."""
        self.team.tell({"do": "set_aside"})
        self.trainer.set_aside()
        try:
            for fragment, flat in enumerate(published):
                self._do("begin", fragment, flat)
            total, tokens = 0.0, 0
            for batch in batches:
                part, count = self.trainer.forward(self._dealt("forward", batch))
                total, tokens = total + part, tokens + count
        finally:
            self.team.tell({"do": "take_back"})
            self.trainer.take_back()
        return total / tokens if tokens else None

    def evaluate_beside(self, model: nn.Module, batches: Iterable[Batch]) -> float | None:
        """Mean loss over `batches` of another model on this device, in passes as training has them; for one rank, and
        beside its steps."""
        pieces = batches
        if self.micro_batch:
            most = self.micro_batch
            pieces = (cut(batch, at, at + most) for batch in batches for at in range(0, sequences_of(batch), most))
        with self.trainer.form.autocast():
            return evaluate(self.trainer.task, model, pieces, self.trainer.device)

    def tick(self) -> None:
        """Nothing, at everyone: those who wait for an order know that the head is there."""
        self.team.tell({"do": "tick"})

    def end(self) -> None:
        """The others need not wait any longer."""
        self.team.tell({"do": "end"})


def serve(trainer: Trainer) -> Order:
    """Carries out the head's orders until there is one that is not for a trainer, which is returned."""
    team = trainer.team
    while True:
        order = team.hear()
        match order["do"]:
            case "step":
                trainer.step(_given(team, order), order["lr"])
            case "forward":
                trainer.forward(_given(team, order))
            case do if do in PER_FRAGMENT:
                _one_fragment(trainer, do, order["fragment"], [None] * order["vectors"], order["more"])
            case "fits":
                _all_fit(trainer, _given(team, order))
            case "reset" | "state" | "set_aside" | "take_back" | "time_exchange" as do:
                getattr(trainer, do)()
            case "seed":
                trainer.seed(order["seed"])
            case "load_state":
                trainer.load_state({}, {})
            case "tick":
                pass
            case _:
                return order


def _one_fragment(
    trainer: Trainer, do: str, fragment: int, vectors: Sequence[F32 | None], more: Mapping[str, Any]
) -> Any:
    """Does it with this rank's part of the vectors, which the head has."""
    parts: list[F32] = []
    if vectors:
        bounds = [(part.start, part.stop) for part in trainer.seat.parts(trainer.layout.fragments[fragment])]
        parts = [vector if trainer.team.alone else trainer.team.deal(vector, bounds) for vector in vectors]  # type: ignore[misc]
    if do == "encode":
        return _encode(trainer, fragment, parts[0])
    if do == "take_up":
        return trainer.take_up(fragment, more["how"], *parts)
    return getattr(trainer, do)(fragment, *parts, **more)


def _encode(trainer: Trainer, fragment: int, anchor: F32) -> list[U8]:
    """The sections of all ranks, at the head. Raises DivergedError, FaultError, wherever it was."""
    if trainer.team.alone:
        return trainer.encode(fragment, anchor)
    said: dict[str, Any] = {"error": None, "sections": []}
    try:
        said["sections"] = [section.tobytes() for section in trainer.encode(fragment, anchor)]
    except FaultError as error:
        said["error"] = [isinstance(error, DivergedError), str(error)]
    together = trainer.team.collect(msgpack.packb(said))
    if together is None:
        return []
    everyone = [msgpack.unpackb(part) for part in together]
    for rank, each in enumerate(everyone):
        if each["error"] is not None:
            diverged, text = each["error"]
            raise DivergedError(text) if diverged else FaultError(f"rank {rank}: {text}")
    return [np.frombuffer(raw, np.uint8) for each in everyone for raw in each["sections"]]


def _all_fit(trainer: Trainer, passes: Sequence[Work]) -> bool:
    """Whether every rank has memory for its largest pass."""
    largest = max(passes, key=lambda work: work.sequences)
    return all(fits for (fits,) in trainer.team.everyone(float(trainer.fits(largest.batch))))


@lru_cache(maxsize=64)
def _plan(sequences: int, shares: tuple[int, ...], groups: tuple[tuple[int, ...], ...], most: int) -> list[list[Pass]]:
    firsts = itertools.accumulate(shares, initial=0)
    taken: dict[int, list[Pass]] = {}
    for first, share, ranks in zip(firsts, shares, groups, strict=False):
        taken |= dict(zip(ranks, passes(first, share, len(ranks), most or sequences), strict=True))
    return [taken[rank] for rank in range(len(taken))]


def _stated(one: Pass, part: Batch) -> list[Any]:
    return [part, one.stop - one.start, one.weighs]


def _given(team: Team, order: Order) -> list[Work]:
    """The passes that the head gives to this rank."""
    return [_work(each) for each in unpack(team.take(order))]


def _work(stated: Sequence[Any]) -> Work:
    batch, sequences, weighs = stated
    return Work(batch, sequences, weighs)
