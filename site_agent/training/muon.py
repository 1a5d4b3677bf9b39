"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/), also for matrices of which each rank has some rows.

The momentum of a matrix is made orthogonal before it is applied: every direction then moves as far as every other.
The update is scaled by 0.2·√(longer side), which gives it the root mean square of AdamW's, so that learning rate and
weight decay mean the same for both (Moonlight, arXiv 2502.16982, section 2.2).

`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` is the same to the bit, and is what the tests compare with. On
DTensors it refuses matrices of fewer rows than there are ranks, and for others it communicates 11 to 16 times a matrix
and step, rounding to bf16 on the way (torch 2.13). Here the rows of a matrix go to one rank and come back orthogonal,
which ends in the bits of a single process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
RMS = 0.2
"""That of AdamW's updates, about."""


class Muon(Optimizer):
    """`parameters` are matrices: tensors, or DTensors, whose group then takes every step together and has gradients
    for the same of them."""

    def __init__(self, parameters: Iterable[Any], lr: float, weight_decay: float, momentum: float = MOMENTUM) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_size = sorted(moved, key=lambda parameter: (_dealt_among(parameter) is not None, parameter.numel()))
            for dealt, alike in groupby(by_size, key=_dealt_among):
                if dealt is None:
                    for parameter in alike:
                        self._apply(group, parameter, _alone(parameter, self._momentum(group, parameter)))
                else:
                    self._deal(group, list(alike), *dealt)

    def _momentum(self, group: dict[str, Any], parameter: Any) -> Tensor:
        """Nesterov's, of this rank's part of the matrix."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, buffer = _local(parameter.grad), _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"])

    def _apply(self, group: dict[str, Any], parameter: Tensor, direction: Tensor) -> None:
        """`direction` is this rank's part of the orthogonal matrix."""
        weights = _local(parameter)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.add_(direction, alpha=-group["lr"] * RMS * math.sqrt(max(parameter.shape)))

    def _deal(self, group: dict[str, Any], parameters: list[Tensor], mesh: DeviceMesh, dim: int) -> None:
        """As many matrices at a time as the group has ranks, of about one size: the j-th rank gets the rows of the j-th
        from all others, and gives them back orthogonal. bf16 goes both ways, as that is what the iteration works in."""
        ranks = mesh.size(dim)
        for first in range(0, len(parameters), ranks):
            batch = parameters[first : first + ranks]
            rows = [self._momentum(group, parameter).bfloat16() for parameter in batch]
            for parameter, direction in zip(batch, _exchanged(batch, rows, mesh, dim), strict=True):
                self._apply(group, parameter, direction)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix in bf16, about: quintic Newton-Schulz iteration, singular values in 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x  # (short, long)
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T  # (short, short)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _alone(parameter: Tensor, momentum: Tensor) -> Tensor:
    """This rank's part of the orthogonal matrix, where it is not dealt: the matrix is whole here, or cut in a way that
    nobody uses (by columns, along two dimensions of a mesh), and then gathered at every rank."""
    if not isinstance(parameter, DTensor):
        return orthogonal(momentum)
    mesh, placements = parameter.device_mesh, parameter.placements
    part = DTensor.from_local(
        momentum.bfloat16(), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = orthogonal(part.full_tensor()).contiguous()
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _dealt_among(parameter: Tensor) -> tuple[DeviceMesh, int] | None:
    """The mesh and its dimension along which the matrix is cut by rows, as fully_shard does."""
    if not isinstance(parameter, DTensor):
        return None
    cuts = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(cuts) != 1:
        return None
    placement = parameter.placements[cuts[0]]
    return (parameter.device_mesh, cuts[0]) if type(placement) is Shard and placement.dim == 0 else None


def _exchanged(batch: list[Tensor], rows: list[Tensor], mesh: DeviceMesh, dim: int) -> Iterator[Tensor]:
    """This rank's rows of each orthogonal matrix, from its `rows` of each matrix (bf16)."""
    ranks, rank, group = mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim)
    given = [part.numel() for part in rows] + [0] * (ranks - len(rows))
    mine = batch[rank].shape if rank < len(batch) else torch.Size((0, 0))
    height = -(-mine[0] // ranks)  # torch.chunk's
    taken = [max(0, min(height, mine[0] - height * other)) * mine[1] for other in range(ranks)]
    whole = rows[0].new_empty(sum(taken))
    dist.all_to_all_single(whole, torch.cat([part.reshape(-1) for part in rows]), taken, given, group)
    if rank < len(batch):
        whole = orthogonal(whole.view(mine)).reshape(-1)
    back = rows[0].new_empty(sum(given))
    dist.all_to_all_single(back, whole, given, taken, group)
    for part, flat in zip(rows, torch.split(back, given), strict=False):
        yield flat.view(part.shape)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
