"""A step's batch on its way to the devices: cut by sequences, packed for other processes, copied ahead of time.

What a batch is, only its task knows; what is done to it here goes by its tensors, whose first dimension counts
sequences. A task whose batches are not like that trains on one device, in one pass.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.task import Batch, BatchStream

TENSOR = 1
"""The msgpack extension of a tensor: its dtype's name, its shape, its bytes."""
TUPLE = 2
"""That of a tuple: its name and fields where it is a named one, its items packed."""
Plain = bool | int | float | str | bytes | None


def sequences_of(batch: Batch) -> int:
    """How many sequences the batch has. Raises ConfigError where its tensors do not agree on it, or where it holds what
    cannot be cut."""
    leaves = list(_leaves(batch))
    strange = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor | Plain)}
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if not strange and len(lengths) == 1 and 0 not in lengths:
        return lengths.pop()
    why = (
        f"it holds {', '.join(sorted(strange))}, where there may be tensors, containers of them and plain values"
        if strange
        else f"each of its tensors must have the sequences as its first dimension, and they are "
        f"{', '.join(map(str, sorted(lengths))) or 'none'}"
    )
    raise ConfigError(
        f"a batch of this task cannot be cut among devices: {why}; train on one device and leave [devices] micro_batch "
        "at 0"
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Sequences `start` to `stop` of its tensors, as views; plain values come along as they are."""
    return _each(batch, lambda tensor: tensor[start:stop])


def pack(batch: Batch) -> bytes:
    """The batch as bytes. Raises ConfigError where it holds other than tensors, containers and plain values."""
    try:
        packed: bytes = msgpack.packb(batch, default=_pack_other, strict_types=True)
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"a batch of this task cannot be sent to another process: {error}") from None
    return packed


def unpack(data: bytes) -> Batch:
    """The inverse of `pack`. A named tuple comes back as one of a class of that name with those fields; other mappings
    and lists as dict and list."""
    return msgpack.unpackb(data, ext_hook=_unpack_other, strict_map_key=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Its tensors on the device; to an accelerator through pinned memory, so that the copy runs beside computing."""
    if device.type == "cpu":
        return batch
    pins = device.type == "cuda"

    def move(tensor: Tensor) -> Tensor:
        host = tensor.pin_memory() if pins and tensor.device.type == "cpu" and not tensor.is_pinned() else tensor
        return host.to(device, non_blocking=True)

    return _each(batch, move)


class Ahead:
    """A stream whose next batch can be drawn before it is asked for, while a device is at work. Its state is always
    that of the batches that were taken."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream
        self._drawn: tuple[Batch, dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.draw()
        assert self._drawn is not None
        (batch, _), self._drawn = self._drawn, None
        return batch

    def draw(self) -> None:
        """Has the next batch ready, if it is not."""
        if self._drawn is None:
            before = self.state_dict()
            self._drawn = next(self.stream), before

    def state_dict(self) -> dict[str, Any]:
        state = self.stream.state_dict() if self._drawn is None else self._drawn[1]
        return deepcopy(state)  # a task's own may be live

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = None
        self.stream.load_state_dict(state)


def _each(batch: Batch, work: Any) -> Batch:
    """`work` done to every tensor of the batch, in containers like its own; a mapping becomes a dict."""
    if isinstance(batch, Tensor):
        return work(batch)
    if isinstance(batch, Mapping):
        return {key: _each(value, work) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, work) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each(value, work) for value in batch)
    return batch


def _leaves(batch: Batch) -> Iterator[Any]:
    """What is in the batch besides containers."""
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        yield batch
        return
    for each in batch:
        yield from _leaves(each)


def _pack_other(value: Any) -> Any:
    """What msgpack does not know, or knows as something else."""
    match value:
        case Tensor():
            return _pack_tensor(value)
        case tuple():
            fields: Any = getattr(value, "_fields", None)
            described = None if fields is None else [type(value).__name__, list(fields)]
            return msgpack.ExtType(TUPLE, pack([described, list(value)]))
        case Mapping():
            return dict(value)
        case list():
            return list(value)
        case bool() | int() | float() | str():
            return next(plain(value) for plain in (int, float, str) if isinstance(value, plain))
    raise TypeError(f"it holds a {type(value).__name__}")


def _unpack_other(code: int, data: bytes) -> Any:
    if code == TENSOR:
        return _unpack_tensor(data)
    described, items = unpack(data)
    return tuple(items) if described is None else _named(described[0], tuple(described[1]))(*items)


@cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


def _pack_tensor(tensor: Tensor) -> msgpack.ExtType:
    flat = tensor.detach().cpu().contiguous()
    raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return msgpack.ExtType(TENSOR, msgpack.packb([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw]))


def _unpack_tensor(data: bytes) -> Tensor:
    dtype, shape, raw = msgpack.unpackb(data)
    if not raw:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(getattr(torch, dtype)).reshape(shape)
