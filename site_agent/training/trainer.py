"""The trainer: one rank of a site with its model (or its share of one), its inner optimizer and its device.

A step is some forward and backward passes here, the sum of their gradients over all ranks of the site, each pass
weighed by its tokens, and an optimizer step that is the same everywhere: what a single process would do with the whole
batch, to within the rounding of sums. The inner optimizer's state stays through every alignment (DiLoCo, 2311.08105).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.config import RunConfig
from shared.fragments import F32, Layout, TensorSpec
from shared.task import Batch
from site_agent.core.memory import ALIGNING
from site_agent.training.batches import to_device
from site_agent.training.forms import Computing, Form, Parallel, Replicated, Sharded, assign, gathered
from site_agent.training.gradients import clip
from site_agent.training.loss_scale import LossScale
from site_agent.training.optimizer_state import pack_optimizer, restore_optimizer
from site_agent.training.optimizers import build_optimizer
from site_agent.training.replica import Part, Replica
from site_agent.training.seats import SINGLE, Seat
from site_agent.training.spread import spread

TIMED_EXCHANGES = 5


@dataclass(frozen=True)
class Work:
    """A pass of this rank: a batch of so many sequences. Where it does not `weigh` it is another's."""

    batch: Batch
    sequences: int = 1
    weighs: bool = True


@dataclass(frozen=True)
class Stepped:
    """What became of a step of the whole site: the mean loss over its tokens, and the seconds that each device group
    took for its passes and the optimizer step before them."""

    loss: float
    tokens: int
    seconds: tuple[float, ...]


class Trainer(Replica):
    """A rank in training. `layout` must hold exactly the model's parameters (checked). Raises ConfigError.

    All ranks of a team call the same methods in the same order; `read`, `write`, `step` and what uses them are
    collective.
    """

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        layout: Layout,
        run: RunConfig,
        device: torch.device,
        throttle: float = 1.0,
        how: Computing = Computing(),  # noqa: B008 (it is frozen)
        parallel: Parallel = "ddp",
        seat: Seat = SINGLE,
    ) -> None:
        layout.check_model(TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters())
        super().__init__([seat.parts(fragment)[seat.team.rank] for fragment in layout.fragments], run.wire, run.rounds)
        self.task, self.layout, self.inner, self.device = task, layout, run.inner, device
        self.seat, self.team = seat, seat.team
        self.form = _form(task, model, device, how, parallel, seat)
        self.model = self.form.model
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self._trained = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = build_optimizer(run.inner, self.model)
        self.skipped_steps = 0
        self.scale = LossScale(moves=how.precision == "fp16")
        self._throttle = throttle
        self._compute: deque[float] = deque(maxlen=32)
        self._optimizing: deque[float] = deque(maxlen=32)
        self._optimizing_seconds = 0.0
        self._aside: list[Tensor] = []

    # -- steps

    def step(self, passes: Sequence[Work], lr: float, meanwhile: Callable[[], object] | None = None) -> Stepped:
        """One inner step at learning rate `lr`. A step whose gradient is not finite is skipped and counted: one bad
        batch must not poison weights that the whole run shares. `meanwhile` is done while a device computes."""
        began = time.perf_counter()
        self.model.train()
        self.optimizer.set_lr(lr)
        self.optimizer.zero_grad()
        losses, counts = self._backward(passes)
        if meanwhile is not None:
            meanwhile()
        sequences, exchange = sum(work.sequences for work in passes), self.seat.exchange
        if exchange is not None:
            # What others wait for is what a group takes for its passes, and nothing that it waits for itself.
            self._synchronize()
            self._slow_down(self._compute, time.perf_counter() - began, sequences)
        # A group's optimizer step counts with its passes: others are not waited for between them.
        took = time.perf_counter() - began + self._optimizing_seconds
        said = self.team.everyone(sum(counts), _total(losses, counts), took)
        tokens = round(sum(count for count, _, _ in said))
        factor = self.form.divisor / self.scale.value
        if exchange is not None:
            exchange.sum(self._trained, factor)
            factor = 1.0
        optimizing = time.perf_counter() if exchange is not None else began
        self._optimize(factor / max(1, tokens), any_tokens=tokens > 0)
        if exchange is not None:
            self._slow_down(self._optimizing, time.perf_counter() - optimizing, 1)
            self._optimizing_seconds = time.perf_counter() - optimizing
        else:
            self._slow_down(self._compute, time.perf_counter() - began, sequences)
        seconds = tuple(max(said[rank][2] for rank in group.ranks) for group in self.seat.groups)
        return Stepped(sum(loss for _, loss, _ in said) / max(1, tokens), tokens, seconds)

    def _backward(self, passes: Sequence[Work]) -> tuple[list[Tensor], list[int]]:
        losses, counts = [], []
        for index, work in enumerate(passes):
            batch, last = to_device(work.batch, self.device), index == len(passes) - 1
            loss, tokens = self.form.backward(batch, weighs=work.weighs, last=last, scale=self.scale.value)
            if work.weighs:
                losses.append(loss)
                counts.append(tokens)
        return losses, counts

    def _optimize(self, factor: float, *, any_tokens: bool) -> None:
        group = self.seat.collective if self.form.sharded else None
        norm_limit = self.inner.clip_norm or float("inf")
        finite = clip(self._trained, norm_limit, factor, group)[1]
        if any_tokens:
            self.scale.stepped(finite=finite)
        if finite and any_tokens:
            self.optimizer.step()
        else:
            self.skipped_steps += 1

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _slow_down(self, known: deque[float], seconds: float, units: int) -> None:
        """Sleeps until what was done has taken 1/throttle of its usual time, of which `known` has that of a unit. The
        median makes the emulated device steady: a step that another process delayed is not made slower still."""
        known.append(seconds / units)
        if self._throttle < 1.0:
            time.sleep(max(0.0, units * statistics.median(known) / self._throttle - seconds))

    @property
    def tries(self) -> bool:
        """Whether trying tells how much the device has memory for. (A CPU's ends otherwise, and ranks that share a
        model meet in each pass: one that fails would leave the others there.)"""
        return self.device.type != "cpu" and not self.form.sharded

    def fits(self, batch: Batch) -> bool:
        """Whether the device has memory for a pass over so much beside all that training needs, by trying; where that
        tells nothing, True. The optimizer is a fresh one after it, and weights are the caller's to write."""
        if not self.tries:
            return True
        self.optimizer.set_lr(0.0)
        reserved: Tensor | None = None
        try:
            # What is not there yet: feedback, snapshots, an alignment, and the model of an evaluation beside it.
            reserved = torch.empty(self._reserve(), dtype=torch.uint8, device=self.device)
            for _ in range(2):  # in the second pass the optimizer has its state
                self.form.pass_alone(to_device(batch, self.device))
                self.optimizer.step()
            self._synchronize()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        del reserved
        # Not before here has the pass let go of what it held.
        self.optimizer.zero_grad()
        self.optimizer.reset()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        return fits

    def _reserve(self) -> int:
        """Bytes that training holds on this device besides weights, gradients, optimizer and passes."""
        largest = max(part.size for part in self.parts)
        feedback = sum(part.size for part in self.parts) * (1 + bool(self.wire.error_feedback))
        beside = self.layout.parameters if self.team.alone else 0
        return 4 * (feedback + beside) + ALIGNING * largest

    def time_exchange(self) -> float:
        """Median seconds in which the groups' gradients are summed; 0 where there is one group."""
        if self.seat.exchange is None:
            return 0.0
        times = []
        for _ in range(1 + TIMED_EXCHANGES):
            self.team.everyone()  # nobody is waited for in what is timed
            began = time.perf_counter()
            self.seat.exchange.sum(self._trained, 0.0)
            self._synchronize()
            times.append(time.perf_counter() - began)
        self.optimizer.zero_grad()
        return max(each for (each,) in self.team.everyone(statistics.median(times[1:])))

    def reset(self) -> None:
        """A fresh optimizer, as if no step had been taken; weights are the caller's to write."""
        self.optimizer.reset()
        self.optimizer.zero_grad()
        self.scale.reset()
        self._compute.clear()
        self._optimizing.clear()
        self.skipped_steps = 0

    def seed(self, seed: int) -> None:
        """Sets the random state of every device, which dropout draws from."""
        torch.manual_seed(seed + self.team.rank)

    # -- weights

    def read(self, fragment: int) -> Tensor:
        part, pieces = self.parts[fragment], []
        if self.seat.first:
            for name, (start, stop) in self.layout.fragments[fragment].offsets.items():
                low, high = max(start, part.start), min(stop, part.stop)
                if low < high or self.form.sharded:
                    full = gathered(self.parameters[name].detach())
                    if low < high:
                        pieces.append(full.reshape(-1)[low - start : high - start].to(torch.float32))
        return torch.cat(pieces) if pieces else torch.empty(0, device=self.device)

    def write(self, fragment: int, flat: Tensor) -> None:
        described = self.layout.fragments[fragment]
        owners = self.seat.parts(described)
        for tensor in described.tensors:
            start, stop = described.offsets[tensor.name]
            full = flat[start:stop] if self.team.alone else self._assembled(start, stop, flat, owners)
            assign(self.parameters[tensor.name], full.view(tensor.shape))

    def _assembled(self, start: int, stop: int, flat: Tensor, owners: Sequence[Part]) -> Tensor:
        """Elements `start` to `stop` of a fragment, all of them on this device. Each owner has those of its part."""
        full, mine = torch.empty(stop - start, device=self.device), owners[self.team.rank].start
        if self.seat.first:
            for rank, part in enumerate(owners):
                low, high = max(start, part.start), min(stop, part.stop)
                if low >= high:
                    continue
                piece = full[low - start : high - start]
                if rank == self.team.rank:
                    piece.copy_(flat[low - mine : high - mine])
                if self.seat.collective is not None:
                    source = self.seat.groups[0].ranks.index(rank)
                    dist.broadcast(piece, group=self.seat.collective, group_src=source)
        return self.seat.exchange.send(full) if self.seat.exchange is not None else full

    # -- checkpoints

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as named tensors (on the CPU, and not written to any more), and what is not a tensor; at the head.
        One tensor after the other comes there, whole."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        wanted = self.team.head
        if self.seat.first:
            for name, parameter in self.parameters.items():
                full = gathered(parameter.detach())
                if wanted:
                    tensors[f"model.{name}"] = full.to("cpu", copy=True)
            of_optimizer, plain = pack_optimizer(self.optimizer, wanted)
            tensors, plain = {**tensors, **of_optimizer}, {**plain, "scale": self.scale.state()}
        for name, flat in self.kept():
            if self.team.alone:
                tensors[name] = flat
            elif (pieces := self.team.collect(flat.numpy().tobytes())) is not None:
                tensors[name] = torch.from_numpy(np.frombuffer(bytearray(b"".join(pieces)), np.float32))
        return tensors, plain

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """The inverse of `state`, from what the head has; a tensor at a time goes to everyone. Where the optimizer was
        another, it begins anew."""
        tensors, plain = spread(self.team, tensors, plain)
        for name, parameter in self.parameters.items():
            assign(parameter, tensors[f"model.{name}"])
        kept = {}
        for p, part in enumerate(self.parts):
            for name in (f"snapshot.{p}", f"residual.{p}"):
                if name in tensors:
                    flat = tensors[name]
                    kept[name] = flat if self.team.alone else flat[part.start : part.stop].clone()
        self.keep(kept)
        if "scale" in plain:
            self.scale.load_state(plain["scale"])
        restore_optimizer(self.optimizer, tensors, plain)

    # -- evaluation in place of the weights, where there is no room for another model

    def set_aside(self) -> None:
        """Keeps the weights on the host until `take_back`."""
        self._aside = [_local(parameter).detach().to("cpu", copy=True) for parameter in self.parameters.values()]

    def take_back(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self.parameters.values(), self._aside, strict=True):
                _local(parameter).copy_(kept)
        self._aside = []

    def forward(self, passes: Sequence[Work]) -> tuple[float, int]:
        """(Σ of loss times tokens, tokens) of passes without gradients, over all ranks."""
        self.model.eval()
        losses, counts = [], []
        for work in passes:
            loss, count = self.form.forward(to_device(work.batch, self.device))
            if work.weighs:
                losses.append(loss)
                counts.append(count)
        self.model.train()
        self.form.settle()
        said = self.team.everyone(_total(losses, counts), sum(counts))
        return sum(part for part, _ in said), round(sum(count for _, count in said))


def _form(task: Any, model: nn.Module, device: torch.device, how: Computing, parallel: Parallel, seat: Seat) -> Form:
    if seat.collective is None:
        return Form(task, model, device, how)
    form = Sharded if parallel == "fsdp" else Replicated
    return form(task, model, device, how, seat.collective)


def _local(parameter: Tensor) -> Tensor:
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _total(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Σ of loss times tokens; a mean over none may be anything."""
    return sum(float(loss) * count for loss, count in zip(losses, counts, strict=True) if count)


def evaluate(task: Any, model: nn.Module, batches: Iterable[Any], device: torch.device) -> float | None:
    """Mean loss over `batches` in nats, weighted by tokens; None where there are none."""
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            loss, tokens = task.loss(model, to_device(batch, device))
            total += _total([loss], [int(tokens)])
            count += int(tokens)
    model.train(was_training)
    return total / count if count else None


def load_flat(model: nn.Module, layout: Layout, flats: Iterable[F32]) -> None:
    """Sets all of a model's parameters from its fragments' flat vectors. Raises ConfigError where they differ."""
    parameters = dict(model.named_parameters())
    layout.check_model(TensorSpec(name, tuple(p.shape)) for name, p in parameters.items())
    with torch.no_grad():
        for fragment, flat in zip(layout.fragments, flats, strict=True):
            for name, array in fragment.unflatten(flat).items():
                parameters[name].copy_(torch.from_numpy(array))
