from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.config import InnerTable
from site_agent.training.optimizers import build_optimizer


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_weight_decay_acts_on_matrices_only(name: str, kind: type) -> None:
    net = model()
    optimizer = build_optimizer(InnerTable(optimizer=name, lr=0.25, weight_decay=0.3), net)  # type: ignore[arg-type]
    assert type(optimizer) is kind
    decayed, plain = optimizer.param_groups
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.25


def test_adamw_has_the_betas_of_language_models() -> None:
    assert build_optimizer(InnerTable(), model()).param_groups[0]["betas"] == (0.9, 0.95)


def test_sgd_has_no_momentum() -> None:
    assert build_optimizer(InnerTable(optimizer="sgd"), model()).param_groups[0]["momentum"] == 0


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)  # type: ignore[index]
    groups = build_optimizer(InnerTable(), net).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 8 + 2 + 2 + 2


def test_a_model_of_one_kind_of_parameter_has_one_group() -> None:
    assert [g["weight_decay"] for g in build_optimizer(InnerTable(), nn.LayerNorm(3)).param_groups] == [0.0]
    assert [g["weight_decay"] for g in build_optimizer(InnerTable(), nn.Linear(3, 2, bias=False)).param_groups] == [0.1]
