"""How a device group holds the model: whole on each device, or in shards; and how a pass over it is computed.

A group of one device has the model as it is. Several have a replica each and sum gradients while the backward pass
goes on (`DistributedDataParallel`), or a shard each of weights, gradients and optimizer state, gathered layer by layer
(FSDP2, `fully_shard`). Master weights are fp32 in either case; with bf16 or fp16 passes compute under autocast.

Gradients are of the *sum* over tokens, which adds up over passes and ranks whatever their sizes are; the trainer
divides by the step's tokens in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shared.task import Batch

Precision = Literal["fp32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Computing:
    """What a pass computes in, whether its layers are compiled, and whether they keep their activations or compute
    them again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

    precision: Precision = "fp32"
    compile: bool = False
    recompute: bool = False


class Form:
    """A group's model on this rank. `group` is the ranks' collective library, None where it is one."""

    sharded = False
    divisor = 1.0
    """What the gradients have been divided by once they are summed over the group."""

    def __init__(self, task: Any, model: nn.Module, device: torch.device, how: Computing) -> None:
        self.task, self.device, self.how = task, device, how
        self.group: dist.ProcessGroup | None = None
        self.model = self._placed(model)
        if how.recompute:
            for block in blocks_of(self.model):
                block.forward = partial(_recomputed, block.forward)
        if how.compile:
            # Layer by layer: they are the same code, compiled once; the model as a whole would take minutes.
            for block in blocks_of(self.model) or [self.model]:
                if type(block).__module__.startswith("torch."):
                    # Calls of torch's own modules are not compiled, only what calls them.
                    block.forward = partial(_called, block.forward)
                block.compile()

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def backward(self, batch: Batch, *, weighs: bool, last: bool, scale: float = 1.0) -> tuple[Tensor, int]:
        """A forward and a backward pass: (mean loss, tokens). `last`: of this step's passes, when gradients are summed
        over the group. Where it does not weigh, it leaves no gradient. `scale` is fp16's."""
        loss, tokens = self._loss(batch, last=last)
        torch.autograd.backward(loss * (scale * tokens if weighs else 0.0))
        return loss.detach(), tokens

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """The same without gradients."""
        with torch.no_grad(), self.autocast():
            loss, tokens = self.task.loss(self.model, batch)
        return loss, int(tokens)

    def pass_alone(self, batch: Batch) -> None:
        """A forward and a backward pass of which no other rank of the group knows; its gradient is this rank's own."""
        with self.autocast():
            loss, _ = self.task.loss(self.model, batch)
        torch.autograd.backward(loss)

    def settle(self) -> None:
        """After forward passes alone: the next one is to see weights that are written now."""

    def _loss(self, batch: Batch, *, last: bool) -> tuple[Tensor, int]:
        with self.autocast():
            loss, tokens = self.task.loss(self.model, batch)
        return loss, int(tokens)

    def autocast(self) -> AbstractContextManager[Any]:
        """What passes compute in."""
        dtype = DTYPES.get(self.how.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


class Replicated(Form):
    """The whole model at every rank of the group."""

    def __init__(
        self, task: Any, model: nn.Module, device: torch.device, how: Computing, group: dist.ProcessGroup
    ) -> None:
        super().__init__(task, model, device, how)
        self.group = group
        self.divisor = float(dist.get_world_size(group))
        # What is wrapped is the loss: tasks use their model in ways of their own, and see it as it is.
        self._wrapped = DistributedDataParallel(
            _Loss(task, self.model), process_group=group, gradient_as_bucket_view=True
        )

    def _loss(self, batch: Batch, *, last: bool) -> tuple[Tensor, int]:
        # The context must hold around the forward pass, which is where it is looked at.
        with nullcontext() if last else self._wrapped.no_sync(), self.autocast():
            loss, tokens = self._wrapped(batch)
        return loss, int(tokens)


class Sharded(Form):
    """A shard of every parameter at each rank of the group."""

    sharded = True

    def __init__(
        self, task: Any, model: nn.Module, device: torch.device, how: Computing, group: dist.ProcessGroup
    ) -> None:
        self._among = group
        super().__init__(task, model, device, how)
        self.group = group
        self.divisor = float(dist.get_world_size(group))

    def _placed(self, model: nn.Module) -> nn.Module:
        mesh = DeviceMesh.from_group(self._among, self.device.type)
        dtype = DTYPES.get(self.how.precision)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model.to(self.device)

    def settle(self) -> None:
        # What lies outside the layers stays gathered for a backward pass.
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()


class _Loss(nn.Module):
    """A task's loss as a module, over the model."""

    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        loss: tuple[Tensor, int] = self._task.loss(self.model, batch)
        return loss


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: what is in its lists of modules, the outermost ones. Containers that only hold others, and
    cannot be called, are looked into."""
    return list(_blocks(model, listed=False))


def _blocks(module: nn.Module, *, listed: bool) -> Iterator[nn.Module]:
    for child in module.children():
        if listed and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from _blocks(child, listed=listed or isinstance(child, nn.ModuleList))


def _called(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def gathered(tensor: Tensor) -> Tensor:
    """All of a parameter, or of its gradient; where it is sharded a collective of the group."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(own: Tensor, full: Tensor) -> None:
    """Sets what this rank has of a tensor from all of it (on any device), without asking another."""
    with torch.no_grad():
        if isinstance(own, DTensor):
            there = full.to(own.to_local().device)
            mine = distribute_tensor(there, own.device_mesh, own.placements, src_data_rank=None)
            own.to_local().copy_(mine.to_local())
        else:
            own.copy_(full)
