from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from site_agent.tasks import token_loss as module
from site_agent.tasks.token_loss import token_loss


def some(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """logits (3, 5, 11), targets (3, 5)."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(3, 5, 11, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(0, 11, (3, 5), generator=generator)


@pytest.mark.parametrize("elements", [1, 22, 1 << 25])
def test_loss_and_gradient_are_those_of_torch_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    logits, targets = some()
    loss = token_loss(logits, targets)
    (7 * loss).backward()  # type: ignore[no-untyped-call]
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.view(-1, 11), targets.view(-1))
    (7 * expected).backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_half_precision_logits_are_summed_in_fp32_and_get_a_gradient_of_their_kind() -> None:
    logits, targets = some(torch.bfloat16)
    loss = token_loss(logits, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.detach().double().view(-1, 11), targets.view(-1))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_logit_is_too_large() -> None:
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 2e4
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0]]
    even = token_loss(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))
    assert float(even) == pytest.approx(math.log(8), rel=1e-6)


def test_nothing_is_kept_for_the_backward_pass_but_the_logits_and_a_number_a_row() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits, targets = some(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_loss(logits, targets)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in large] == [(torch.bfloat16, logits.data_ptr())]
