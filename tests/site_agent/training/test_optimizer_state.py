from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.config import InnerTable
from site_agent.training.optimizer_state import pack_optimizer, restore_optimizer, unpack_optimizer
from site_agent.training.optimizers import InnerOptimizer, build_optimizer


def model(inner: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, inner), nn.LayerNorm(inner), nn.Linear(inner, 9, bias=False))


def built(name: str, net: nn.Module) -> InnerOptimizer:
    return build_optimizer(InnerTable(optimizer=name, lr=0.1), net)  # type: ignore[arg-type]


def step(net: nn.Module, optimizer: InnerOptimizer, seed: int, skipped: str = "") -> None:
    random = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        gradient = torch.randn(p.shape, generator=random)
        p.grad = None if name == skipped else gradient
    optimizer.step()


def trained(name: str, skipped: str = "") -> tuple[nn.Module, InnerOptimizer]:
    net = model()
    optimizer = built(name, net)
    for seed in range(3):
        step(net, optimizer, seed, skipped)
    return net, optimizer


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_restored_optimizer_goes_on_as_if_nothing_had_been(name: str) -> None:
    net, optimizer = trained(name)
    tensors, plain = pack_optimizer(optimizer)
    other = model()
    other.load_state_dict(net.state_dict())
    restored = built(name, other)
    unpack_optimizer(restored, tensors, json.loads(json.dumps(plain)))
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(other, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_state_is_named_by_parameter_and_key() -> None:
    tensors, plain = pack_optimizer(trained("muon")[1])
    adamw = {f"optimizer.{name}.{key}" for name in ("0.weight", "1.bias", "2.weight", "2.bias", "3.weight") for key in
             ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    assert set(tensors) == adamw | {"optimizer.1.weight.momentum_buffer"}
    assert plain["rules"] == dict.fromkeys(["0.weight", "1.bias", "2.weight", "2.bias", "3.weight"], "AdamW") | {
        "1.weight": "Muon"
    }


def test_what_is_not_a_tensor_goes_beside() -> None:
    net, optimizer = trained("adamw")
    next(iter(optimizer.optimizers[0].state.values()))["note"] = 0.25
    tensors, plain = pack_optimizer(optimizer)
    assert plain["values"] == {"optimizer.0.weight.note": 0.25}
    restored = built("adamw", net)
    unpack_optimizer(restored, tensors, plain)
    assert ("0.weight", "note", 0.25) in [entry for entry in restored.state() if entry[1] == "note"]


def test_packed_and_loaded_state_are_copies() -> None:
    net, optimizer = trained("muon")
    tensors, plain = pack_optimizer(optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restored = built("muon", net)
    unpack_optimizer(restored, tensors, plain)
    step(net, optimizer, 7)
    step(net, restored, 7)
    assert all(torch.equal(tensors[name], old) for name, old in before.items())


def test_state_is_given_out_tensor_by_tensor() -> None:
    optimizer = trained("adamw")[1]
    entries = optimizer.state()
    first = next(entries)
    first[2].zero_()
    assert float({n + k: v for n, k, v in entries}["0.weightstep"]) == 3
    assert [value for _, _, value in optimizer.state(wanted=False)] == [None] * 18
    assert pack_optimizer(optimizer, wanted=False)[0] == {}


def test_tensors_are_asked_for_one_after_another() -> None:
    class File(Mapping[str, Tensor]):
        def __init__(self) -> None:
            self.asked: list[str] = []

        def __getitem__(self, name: str) -> Tensor:
            self.asked.append(name)
            return tensors[name]

        def __iter__(self) -> Iterator[str]:
            return iter(tensors)

        def __len__(self) -> int:
            return len(tensors)

    net, optimizer = trained("muon")
    tensors, plain = pack_optimizer(optimizer)
    tensors["model.0.weight"] = torch.zeros(1)
    file = File()
    unpack_optimizer(built("muon", net), file, plain)
    assert file.asked == [name for name in tensors if name.startswith("optimizer.")]


def test_a_parameter_that_has_never_had_a_gradient_has_no_state() -> None:
    net, optimizer = trained("adamw", skipped="1.bias")
    restored = built("adamw", net)
    tensors, plain = pack_optimizer(optimizer)
    assert not any(name.startswith("optimizer.1.bias") for name in tensors)
    unpack_optimizer(restored, tensors, plain)
    step(net, restored, 5)


def refused(tensors: dict[str, Tensor], plain: dict[str, Any], message: str, name: str = "adamw") -> None:
    """They are refused, and what the optimizer had of state stays."""
    optimizer = trained(name)[1]
    before = [(n, k, v.clone()) for n, k, v in optimizer.state()]
    with pytest.raises(ValueError, match=message):
        unpack_optimizer(optimizer, tensors, plain)
    after = list(optimizer.state())
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


def test_state_that_does_not_fit_is_refused_by_name() -> None:
    tensors, plain = pack_optimizer(trained("adamw")[1])
    fewer = {name: rule for name, rule in plain["rules"].items() if name != "1.bias"}
    refused(tensors, plain | {"rules": fewer}, r"1\.bias was trained by nothing, and is by AdamW")
    refused(tensors, plain | {"rules": plain["rules"] | {"x": "AdamW"}}, "x was trained by AdamW, and is by nothing")
    refused(tensors | {"optimizer.a.b.step": torch.zeros(())}, plain, r"no parameter a\.b")
    wrong = tensors | {"optimizer.1.weight.exp_avg": torch.zeros(4, 5)}
    refused(wrong, plain, r"exp_avg of parameter 1\.weight is \[4, 5\], the parameter \[4, 4\]")
    refused(tensors, plain, r"1\.weight was trained by AdamW, and is by Muon", "muon")
    refused({}, {}, "does not say of which parameters")


def test_state_of_another_optimizer_is_left_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensors, plain = pack_optimizer(trained("adamw")[1])
    _, optimizer = trained("muon")
    with caplog.at_level(logging.WARNING):
        assert not restore_optimizer(optimizer, tensors, plain)
    assert "it begins anew" in caplog.text
    assert list(optimizer.state()) == []
    assert restore_optimizer(built("adamw", model()), tensors, plain)
