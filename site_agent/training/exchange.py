"""Gradients of a site's device groups, summed through the host.

Groups of different makes have no collective library in common, so the first rank of each takes its group's gradients to
the host, Gloo sums them there, and the sum goes back the same way. It comes in pieces: while one is on the network,
the next is copied from the device. All groups go through the parameters in the same order, whatever order
their backward passes had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from site_agent.training.forms import assign, gathered

PIECE_BYTES = 1 << 25


class Exchange:
    """`leaders`: the Gloo group of every group's first rank, at these ranks; None at the others. `group`: the ranks of
    this group; None where it is one. `first`: it is the first group, which has the head. Methods are collective over
    all ranks of the site."""

    def __init__(self, leaders: dist.ProcessGroup | None, group: dist.ProcessGroup | None, *, first: bool) -> None:
        self.leaders, self.group, self.first = leaders, group, first

    def sum(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Every gradient ← the sum over the groups of theirs, each times its group's `factor`. A parameter without a
        gradient counts as zero."""
        before: tuple[list[nn.Parameter], Tensor, Tensor | None, dist.Work | None] | None = None
        for piece in _pieces(parameters):
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in piece])
            host, work = None, None
            if self.leaders is not None:
                host = flat.to("cpu", torch.float32).mul_(factor)  # (of the CPU it is the same memory)
                work = dist.all_reduce(host, group=self.leaders, async_op=True)
            if before is not None:
                self._finish(*before)
            before = (piece, flat, host, work)
        if before is not None:
            self._finish(*before)

    def _finish(self, piece: Sequence[nn.Parameter], flat: Tensor, host: Tensor | None, work: dist.Work | None) -> None:
        if work is not None and host is not None:
            work.wait()
            flat.copy_(host)
        if self.group is not None:
            dist.broadcast(flat, group=self.group, group_src=0)
        at = 0
        for parameter in piece:
            full = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            assign(parameter.grad, full)

    def send(self, full: Tensor) -> Tensor:
        """A tensor of the first group (whole at each of its ranks, on its device) at all ranks of the others, where
        `full` is one of its shape that is filled."""
        if self.leaders is not None:
            host = full.cpu()
            dist.broadcast(host, group=self.leaders, group_src=0)
            if not self.first:
                full.copy_(host)
        if self.group is not None and not self.first:
            dist.broadcast(full, group=self.group, group_src=0)
        return full


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    return gathered(parameter.grad)


def _pieces(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        piece.append(parameter)
        size += 4 * parameter.numel()
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
