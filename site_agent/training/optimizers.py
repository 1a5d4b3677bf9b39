"""Inner optimizers by the names in `run.toml`."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from shared.config import InnerTable

BETAS = (0.9, 0.95)
"""AdamW's βs as is usual for language models."""


def build_optimizer(inner: InnerTable, model: nn.Module) -> Optimizer:
    """The optimizer over the model's trainable parameters. Weight decay acts on matrices only: norms and biases
    have nothing to shrink towards zero for."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if inner.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.lr)
    return torch.optim.AdamW(groups, lr=inner.lr, betas=BETAS)
