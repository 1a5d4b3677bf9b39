"""The norm of all gradients, and clipping to it, also where every rank has a part of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 1 << 20
"""Elements of which a norm is taken at once: on the CPU a copy of them in fp64 is made."""


def clip(
    parameters: Iterable[Tensor], limit: float, scale: float = 1.0, group: dist.ProcessGroup | None = None
) -> tuple[float, bool]:
    """Multiplies all gradients by `scale` and clips them to the norm `limit` (inf: only measures them), in place and in
    one pass. Returns the norm of the scaled gradients before they were clipped, and whether it is finite; where it is
    not, gradients are as they were.

    The factor is that of `torch.nn.utils.clip_grad_norm_`: limit / (norm + 1e-6), at most 1. Squares are summed in fp64
    where the device has it and the norm is rounded to fp32, so that it is the same number however many ranks share the
    model: what is left of the order of summation is far below fp32's last bit. Gradients that are cut (DTensors with a
    sharded placement) need `group`, the ranks among which they are; whole ones are the same at all of them, and
    count once.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0, True
    cut = [_local(gradient) for gradient in gradients if _is_cut(gradient)]
    whole = [_local(gradient) for gradient in gradients if not _is_cut(gradient)]
    if cut and group is None:
        raise ValueError("gradients are sharded, and no group was named among which")
    with torch.no_grad():
        squares = _squares(cut, gradients[0].device)
        if cut:
            dist.all_reduce(squares, group=group)
        squares += _squares(whole, gradients[0].device)
        norm = float((squares.sqrt() * scale).to(torch.float32))
        finite = math.isfinite(norm)
        factor = scale * min(1.0, limit / (norm + 1e-6)) if finite else 1.0
        if factor != 1.0:
            torch._foreach_mul_([*cut, *whole], factor)
    return norm, finite


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Σ of all squares, a scalar on `device`."""
    exact = torch.float64 if _has_fp64(device) else torch.float32
    pieces = [piece for tensor in tensors if tensor.numel() for piece in torch.split(tensor.reshape(-1), PIECE)]
    if not pieces:
        return torch.zeros((), dtype=exact, device=device)
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=exact)).square().sum()


@cache
def _has_fp64(device: torch.device) -> bool:
    try:
        return bool(torch.ones(1, dtype=torch.float64, device=device).isfinite())
    except (RuntimeError, TypeError):
        return False


def _is_cut(gradient: Tensor) -> bool:
    return isinstance(gradient, DTensor) and not all(placement.is_replicate() for placement in gradient.placements)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
