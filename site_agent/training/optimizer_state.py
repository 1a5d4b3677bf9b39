"""The inner optimizer in a checkpoint: tensors named `optimizer.{parameter}.{key}`, and plain data beside them.

Tensors are those of the whole model, so that a site that is restarted on more or fewer devices goes on from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from site_agent.training.optimizers import InnerOptimizer

log = logging.getLogger(__name__)

PREFIX = "optimizer."


def tensor_name(parameter: str, key: str) -> str:
    """That of a tensor of the optimizer's state in a checkpoint."""
    return f"{PREFIX}{parameter}.{key}"


def pack_optimizer(optimizer: InnerOptimizer, wanted: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All state as named tensors (copies on the CPU), and as plain data what is none, with what steps each parameter.
    All ranks of a model call it; those without `wanted` get no tensors."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, key, value in optimizer.state(wanted):
        if isinstance(value, Tensor):
            tensors[tensor_name(parameter, key)] = value
        elif wanted:
            values[tensor_name(parameter, key)] = value
    return tensors, plain_state(optimizer, values)


def plain_state(optimizer: InnerOptimizer, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of an optimizer beside its tensors; `values` are those of its state that are none."""
    return {"rules": dict(optimizer.rules), "values": dict(values)}


def unpack_optimizer(optimizer: InnerOptimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """The inverse of `pack_optimizer`; learning rates and decay stay as the run's config makes them. Tensors are asked
    for one after another: a mapping may load each when it is.

    Raises ValueError, and changes nothing, where the state is that of other parameters or of another optimizer.
    """
    rules = plain.get("rules")
    if not isinstance(rules, Mapping):
        raise ValueError("it does not say of which parameters it is")
    for name in [*optimizer.rules, *rules]:
        was, now = rules.get(name), optimizer.rules.get(name)
        if was != now:
            raise ValueError(f"parameter {name} was trained by {was or 'nothing'}, and is by {now or 'nothing'}")
    optimizer.load_state(_entries(tensors, plain["values"]))


def restore_optimizer(optimizer: InnerOptimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> bool:
    """`unpack_optimizer`, or a fresh optimizer and a warning where it does not fit: all else in a checkpoint is as good
    as it was when a run's `[inner] optimizer` has been changed. All ranks that are given the same decide the same."""
    try:
        unpack_optimizer(optimizer, tensors, plain)
    except ValueError as error:
        log.warning("the checkpoint's inner optimizer cannot be continued (%s); it begins anew", error)
        optimizer.reset()
        return False
    return True


def _entries(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for source in (tensors, values):
        for name in source:
            if name.startswith(PREFIX):
                parameter, _, key = name.removeprefix(PREFIX).rpartition(".")
                yield parameter, key, source[name]
