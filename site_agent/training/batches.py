"""A step's batch on its way to the devices: cut by sequences, packed for other processes, copied ahead of time.

What a batch is, only its task knows; what is done to it here goes by its tensors, whose first dimension counts
sequences. A task whose batches are not like that trains on one device, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.task import Batch, BatchStream

TENSOR = 1
"""The msgpack extension of a tensor: its dtype's name, its shape, its bytes."""


def sequences_of(batch: Batch) -> int:
    """How many sequences the batch has. Raises ConfigError where its tensors do not agree on it."""
    lengths = {tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(batch)}
    if len(lengths) != 1 or 0 in lengths:
        raise ConfigError(
            "a batch of this task cannot be cut among devices: each of its tensors must have the sequences as its "
            f"first dimension, and they are {sorted(lengths) or 'none'}; train on one device and leave [devices] "
            "micro_batch at 0"
        )
    return lengths.pop()


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Sequences `start` to `stop` of it, as views."""
    return _each(batch, lambda tensor: tensor[start:stop])


def pack(batch: Batch) -> bytes:
    """The batch as bytes. Raises ConfigError where it holds other than tensors, containers and plain values."""
    try:
        packed: bytes = msgpack.packb(batch, default=_pack_tensor)
    except TypeError as error:
        raise ConfigError(f"a batch of this task cannot be sent to another process: {error}") from None
    return packed


def unpack(data: bytes) -> Batch:
    """The inverse of `pack`; tuples come back as lists."""
    return msgpack.unpackb(data, ext_hook=_unpack_tensor, strict_map_key=False)


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
        self._drawn: tuple[Batch, Any] | None = None

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
            before = self.stream.state_dict()
            self._drawn = next(self.stream), before

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() if self._drawn is None else dict(self._drawn[1])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = None
        self.stream.load_state_dict(state)


def _each(batch: Batch, work: Any) -> Batch:
    """`work` done to every tensor of the batch, in containers like its own."""
    if isinstance(batch, Tensor):
        return work(batch)
    if isinstance(batch, Mapping):
        return {key: _each(value, work) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, work) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each(value, work) for value in batch)
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each(batch, note)
    yield from found


def _pack_tensor(value: Any) -> msgpack.ExtType:
    if not isinstance(value, Tensor):
        raise TypeError(f"it holds a {type(value).__name__}")
    flat = value.detach().cpu().contiguous()
    raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return msgpack.ExtType(TENSOR, msgpack.packb([str(value.dtype).removeprefix("torch."), list(value.shape), raw]))


def _unpack_tensor(code: int, data: bytes) -> Tensor:
    dtype, shape, raw = msgpack.unpackb(data)
    if not raw:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(getattr(torch, dtype)).reshape(shape)
