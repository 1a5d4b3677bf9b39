"""Cross entropy over large vocabularies without fp32 copies of all logits.

The logits of a batch are often its largest tensor: 8 sequences of 2048 tokens over 128,000 words are 4 GB in bf16. The
plain way keeps them, their fp32 copy, the log-softmax and two gradients: five times as much and more. Here fp32 exists
for a chunk of rows at a time, and what is kept for the backward pass are the logits themselves and one number a row;
the gradient is made in the logits' own dtype. It costs one more exponential of each logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Logits in fp32 at once (128 MiB)."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, an fp32 scalar. logits (…, V) in any float dtype; targets (…) int64."""
    flat = logits.reshape(-1, logits.shape[-1])  # (N, V)
    loss: Tensor = _TokenLoss.apply(flat, targets.reshape(-1))  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows = _rows(logits)
        sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)  # (N,) log Σ exp
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for at in range(0, len(logits), rows):
            chunk = logits[at : at + rows].float()
            sums[at : at + rows] = chunk.logsumexp(-1)
            total += (sums[at : at + rows] - chunk.gather(1, targets[at : at + rows, None])[:, 0]).sum()
        ctx.save_for_backward(logits, targets, sums)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        rows, scale = _rows(logits), gradients[0].float() / len(logits)
        gradient = torch.empty_like(logits)
        for at in range(0, len(logits), rows):
            p = (logits[at : at + rows].float() - sums[at : at + rows, None]).exp_()  # softmax
            p.scatter_add_(1, targets[at : at + rows, None], p.new_full((1, 1), -1.0).expand(len(p), 1))
            gradient[at : at + rows] = p.mul_(scale)
        return gradient, None


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[-1])
