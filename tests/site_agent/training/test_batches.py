"""What is done to a step's batch on its way: cut, packed, drawn ahead, and nothing of it lost."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError
from site_agent.training.batches import Ahead, cut, pack, sequences_of, to_device, unpack


class Pair(NamedTuple):
    tokens: Tensor
    weights: Tensor


@dataclass
class Record:
    tokens: Tensor


def nested() -> dict[str, Any]:
    """Five sequences in every container there is."""
    tokens = torch.arange(15).reshape(5, 3)
    return {
        "pair": Pair(tokens, tokens.to(torch.bfloat16) / 3),
        "list": [tokens.bool(), {"deep": (tokens.T.contiguous().T, tokens.to(torch.uint8))}],
        7: tokens[:, :0],
        "name": "text",
        "more": (None, 2, 0.5, True, b"raw"),
    }


def same(one: Any, other: Any) -> bool:
    """In types, keys, and every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        alike = type(one).__name__ == type(other).__name__ and isinstance(other, tuple) == isinstance(one, tuple)
        return alike and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


# ---- cut


def test_parts_hold_every_sequence_of_every_tensor_once() -> None:
    batch = nested()
    assert sequences_of(batch) == 5
    parts = [cut(batch, 0, 2), cut(batch, 2, 2), cut(batch, 2, 5)]
    assert [sequences_of(part) for part in (parts[0], parts[2])] == [2, 3]
    for take in (
        lambda part: part["pair"].tokens,
        lambda part: part["pair"].weights,
        lambda part: part["list"][0],
        lambda part: part["list"][1]["deep"][0],
        lambda part: part[7],
    ):
        assert torch.equal(torch.cat([take(part) for part in parts]), take(batch))
    assert all(part["more"] == batch["more"] and part["name"] == "text" for part in parts)
    assert same(cut(batch, 0, 5), batch)


def test_a_part_is_a_view_of_its_batch() -> None:
    batch = torch.arange(6).reshape(3, 2)
    assert cut(batch, 1, 3).data_ptr() == batch[1:].data_ptr()


def test_a_batch_of_any_mapping_is_cut_as_a_dict() -> None:
    part = cut(UserDict(x=torch.arange(4)), 1, 3)
    assert same(part, {"x": torch.tensor([1, 2])})


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (torch.tensor(1.0), "they are 0;"),
        ({"x": torch.zeros(4, 2), "loss": torch.tensor(1.0)}, "they are 0, 4;"),
        ([torch.zeros(4), torch.zeros(3)], "they are 3, 4;"),
        ({"name": "text"}, "they are none;"),
        (torch.zeros(0, 3), "they are 0;"),
        ({"x": torch.zeros(4), "lengths": np.zeros(4)}, "it holds ndarray, where"),
        ([Record(torch.zeros(4)), torch.zeros(4)], "it holds Record, where"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_would_do(batch: Any, why: str) -> None:
    with pytest.raises(ConfigError, match="cannot be cut among devices") as refused:
        sequences_of(batch)
    assert why in str(refused.value)
    assert "train on one device and leave [devices] micro_batch at 0" in str(refused.value)


# ---- pack


def test_what_is_packed_comes_back_bit_for_bit_and_of_its_kind() -> None:
    batch = nested()
    back = unpack(pack(batch))
    assert same(back, batch)
    assert back["pair"].tokens is back["pair"][0]
    assert back["pair"]._fields == ("tokens", "weights")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        torch.randn(3, 2).to(torch.bfloat16),
        torch.randn(3, 2).half(),
        torch.randn(2, 3, dtype=torch.float64).T,
        torch.randint(2**62, (2, 2)),
        torch.tensor([True, False]),
        torch.tensor(3, dtype=torch.int32),
        torch.empty(0, 5, dtype=torch.int16),
        torch.randn(2, 2).to(torch.float8_e4m3fn),
        torch.randn(2, dtype=torch.complex64),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_tensors_of_any_dtype_survive_packing(tensor: Tensor) -> None:
    (back,) = unpack(pack([tensor]))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (back, tensor)]
    assert torch.equal(*bits)
    back.zero_()  # it is one's own, to be written to


def test_a_part_is_packed_alone_and_not_the_batch_it_is_a_view_of() -> None:
    batch = torch.zeros(1000, 10)
    assert len(pack(cut(batch, 0, 1))) < 200


def test_what_is_nearly_plain_is_packed_as_what_it_nearly_is() -> None:
    back = unpack(pack({"number": np.float64(0.5), "ordered": OrderedDict(a=[1]), "user": UserDict(b=())}))
    assert same(back, {"number": 0.5, "ordered": {"a": [1]}, "user": {"b": ()}})


@pytest.mark.parametrize("thing", [np.zeros(3), Record(torch.zeros(3)), {1, 2}, 1j])
def test_what_cannot_be_packed_is_refused_by_its_type(thing: Any) -> None:
    with pytest.raises(ConfigError, match=f"cannot be sent to another process: it holds a {type(thing).__name__}"):
        pack({"x": (torch.zeros(3), thing)})


# ---- devices and streams


def test_on_the_cpu_a_batch_stays_as_it_is() -> None:
    batch = nested()
    assert to_device(batch, torch.device("cpu")) is batch


def test_a_batch_goes_to_its_device_in_containers_of_its_own() -> None:
    moved = to_device(nested(), torch.device("meta"))
    assert moved["pair"].weights.device.type == "meta"
    assert moved["list"][1]["deep"][1].device.type == "meta"
    assert moved["more"] == nested()["more"]


class Counting:
    """Gives 0, 1, 2, …; its state is what it has given, and its own to change."""

    def __init__(self) -> None:
        self.state = {"given": [-1]}

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> int:
        self.state["given"][0] += 1
        return self.state["given"][0]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = {"given": list(state["given"])}


@pytest.mark.parametrize("draws", list(itertools.product([False, True], repeat=3)))
def test_the_state_of_a_stream_drawn_ahead_is_that_of_the_batches_taken(draws: tuple[bool, ...]) -> None:
    ahead = Ahead(Counting())
    assert iter(ahead) is ahead
    for number, drawn in enumerate(draws):
        if drawn:
            ahead.draw()
            ahead.draw()  # once is enough
        state = ahead.state_dict()
        assert state == {"given": [number - 1]}
        resumed = Ahead(Counting())
        resumed.draw()  # of before it was told where to go on
        resumed.load_state_dict(state)
        assert next(resumed) == number
        assert next(ahead) == number
        assert state == {"given": [number - 1]}
        assert ahead.state_dict() == {"given": [number]}
