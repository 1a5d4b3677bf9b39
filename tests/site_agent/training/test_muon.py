from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.config import InnerTable
from shared.task import Shard, build_model
from site_agent.tasks.byte_lm import ByteLM
from site_agent.training.muon import Muon, orthogonal
from site_agent.training.optimizers import build_optimizer

SHAPES = [(8, 8), (24, 10), (10, 24), (2, 40)]


def gradients(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=random) * 10.0 ** (step - 3) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_torch_with_updates_of_adamws_size(dtype: torch.dtype) -> None:
    ours = [nn.Parameter(weights.to(dtype)) for weights in gradients(99)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    muon = Muon(ours, lr=0.02, weight_decay=0.5)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient.to(dtype)
        muon.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_singular_values_of_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6
    singular = torch.linalg.svdvals(orthogonal(matrix).float())
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.3


def test_a_gradient_of_zeros_moves_nothing_but_by_decay() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.zeros(3, 4)
    Muon([parameter], lr=0.5, weight_decay=0.5).step()
    assert torch.equal(parameter, torch.full((3, 4), 0.75))


def test_a_matrix_without_a_gradient_stays() -> None:
    moved, still = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    moved.grad = torch.ones(3, 4)
    muon = Muon([still, moved], lr=0.5, weight_decay=0.5)
    muon.step()
    assert torch.equal(still, torch.ones(3, 4))
    assert list(muon.state) == [moved]


def test_a_language_model_learns_with_muon(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    task = ByteLM({"paths": str(text), "context": 16, "width": 32, "layers": 2, "heads": 2})
    model = build_model(task, 0)
    optimizer, stream = build_optimizer(InnerTable(optimizer="muon"), model), task.train_batches(Shard(0, 1, 0), 8)
    losses = []
    for _ in range(40):
        loss, _ = task.loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.set_lr(1e-2)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
