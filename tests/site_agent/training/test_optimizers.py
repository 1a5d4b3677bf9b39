from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from shared.config import InnerTable
from shared.errors import ConfigError
from site_agent.tasks.byte_lm import ByteLM
from site_agent.training.muon import Muon
from site_agent.training.optimizers import build_optimizer, fastest, hidden_matrices, kernel

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))


def byte_lm(**options: Any) -> nn.Module:
    return ByteLM({"context": 8, "width": 64, "layers": 2, "heads": 2, **options}).build_model()


def inside(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if ".layers." in name and p.dim() == 2}


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("sgd", SGD)])
def test_weight_decay_acts_on_matrices_only(name: str, kind: type) -> None:
    net = model()
    built = build_optimizer(InnerTable(optimizer=name, lr=0.25, weight_decay=0.3), net)  # type: ignore[arg-type]
    (optimizer,) = built.optimizers
    assert type(optimizer) is kind
    decayed, plain = optimizer.param_groups
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.25


def test_adamw_has_the_betas_of_language_models() -> None:
    (optimizer,) = build_optimizer(InnerTable(), model()).optimizers
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_sgd_has_no_momentum() -> None:
    (optimizer,) = build_optimizer(InnerTable(optimizer="sgd"), model()).optimizers
    assert optimizer.param_groups[0]["momentum"] == 0


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)  # type: ignore[index]
    assert set(build_optimizer(InnerTable(), net).rules) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    (optimizer,) = build_optimizer(InnerTable(), net).optimizers
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 8 + 2 + 2 + 2


def test_a_model_of_one_kind_of_parameter_has_one_group() -> None:
    def decays(net: nn.Module) -> list[float]:
        return [group["weight_decay"] for group in build_optimizer(InnerTable(), net).optimizers[0].param_groups]

    assert decays(nn.LayerNorm(3)) == [0.0]
    assert decays(nn.Linear(3, 2, bias=False)) == [0.1]


# ---- Muon's part of a model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 96, 256])
def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(tied: bool, width: int) -> None:
    """Also of networks with matrices as long as the vocabulary of 256: the MLP of width 96, everything of width 256."""
    net = byte_lm(width=width, tie_embeddings=tied)
    assert hidden_matrices(net) == inside(net)
    muon, adamw = build_optimizer(InnerTable(optimizer="muon", lr=0.5, weight_decay=0.25), net).optimizers
    assert type(muon) is Muon
    assert type(adamw) is AdamW
    assert [len(group["params"]) for group in muon.param_groups] == [2 * 7]
    assert [len(group["params"]) for group in adamw.param_groups] == [1 if tied else 2, 5]
    assert [group["weight_decay"] for group in (*muon.param_groups, *adamw.param_groups)] == [0.25, 0.25, 0.0]
    assert {group["lr"] for group in (*muon.param_groups, *adamw.param_groups)} == {0.5}


def test_muon_leaves_a_tied_head_of_another_module_to_adamw() -> None:
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7))
    assert hidden_matrices(net) == {"1.weight"}
    net[2].weight = net[0].weight  # type: ignore[union-attr]
    assert hidden_matrices(net) == {"1.weight"}


def test_muon_leaves_vectors_experts_and_frozen_matrices_to_others() -> None:
    net = nn.Module()
    net.inside = nn.Linear(4, 3)
    net.row = nn.Parameter(torch.zeros(1, 4))
    net.experts = nn.Parameter(torch.zeros(2, 4, 3))
    net.frozen = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    assert hidden_matrices(net) == {"inside.weight"}


def test_a_model_without_a_matrix_for_muon_is_told_to_use_adamw() -> None:
    with pytest.raises(ConfigError, match=r'\[inner\] optimizer: "muon".*use "adamw"'):
        build_optimizer(InnerTable(optimizer="muon"), nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)))


def test_a_model_of_matrices_only_needs_no_adamw() -> None:
    assert len(build_optimizer(InnerTable(optimizer="muon"), nn.Linear(4, 4, bias=False)).optimizers) == 1


# ---- one optimizer for the trainer


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_learning_rate_is_that_of_every_part(name: str) -> None:
    net = byte_lm()
    optimizer = build_optimizer(InnerTable(optimizer=name, weight_decay=0.0), net)  # type: ignore[arg-type]
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.set_lr(0.0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    optimizer.set_lr(0.5)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_reset_optimizer_steps_like_a_new_one() -> None:
    used, new = byte_lm(), byte_lm()
    new.load_state_dict(used.state_dict())
    optimizers = [build_optimizer(InnerTable(optimizer="muon"), net) for net in (used, new)]
    for p in used.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].set_lr(0.0)
    optimizers[0].step()
    optimizers[0].reset()
    assert list(optimizers[0].state()) == []
    for net, optimizer in zip((used, new), optimizers, strict=True):
        for p in net.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
        optimizer.set_lr(0.5)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), new.parameters(), strict=True))


# ---- kernels


def test_the_fastest_kernel_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest(AdamW, CPU, torch.float32, None) == {"fused": True}
    refused: list[str] = []

    class Lacks(SGD):
        def step(self, closure: Any = None) -> Any:
            for kind in ("fused", "foreach"):
                if self.defaults.get(kind) and kind not in allowed:
                    refused.append(kind)
                    raise RuntimeError(f"{kind} is not for this device")
            return super().step(closure)

    allowed = ["foreach"]
    assert fastest(Lacks, CPU, torch.float32, None) == {"foreach": True}
    allowed = []
    assert fastest(Lacks, CPU, torch.float64, None) == {"foreach": False}
    assert refused == ["fused", "fused", "foreach"]


def test_on_the_cpu_a_step_rounds_alike_however_a_tensor_is_cut() -> None:
    def trained(cut: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        pieces = [nn.Parameter(piece.clone()) for piece in torch.randn(1003, generator=random).split(cut)]
        optimizer = AdamW(pieces, lr=1e-2, **kernel(AdamW, pieces))
        for _ in range(20):
            gradients = torch.randn(1003, generator=random) * 10 ** torch.randint(-6, 3, (1003,), generator=random)
            for piece, gradient in zip(pieces, gradients.split(cut), strict=True):
                piece.grad = gradient.clone()
            optimizer.step()
        return torch.cat([piece.detach() for piece in pieces])

    assert torch.equal(trained(1003), trained(7))
