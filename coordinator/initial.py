"""Version 0 of a run: the layout of the task's model and its initial weights, from the seed or from files.

At most the model as its task builds it and one fragment are in memory: weights are flattened, and read from files,
fragment by fragment. Where they come from files the model is needed for its names and shapes alone, and is built
without memory for its weights (torch's device "meta"), if its task can do that. Files that have tensors under other
names than the model are left to the task, which reads them whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coordinator.store.state_dir import Initial
from shared.codecs.kernels import square_sum
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.fragments import F32, Fragment, Layout, TensorSpec, build_layout
from shared.task import build_model, fingerprint_of, load_task

log = logging.getLogger(__name__)

Named = Callable[[str], Tensor]
"""The tensor of this name."""


def initial_weights(config: RunConfig, base: Path) -> Initial:
    """What the run starts from. Relative files in the config count from `base`. Raises ConfigError, now or when the
    weights are asked for."""
    task = load_task(config.task.use, config.task.options(), base)
    model = _without_weights(task, config.run.seed) if config.run.init else build_model(task, config.run.seed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not parameters:
        raise ConfigError(f"[task] use: the model of {config.task.use!r} has no parameters")
    specs = [TensorSpec(name, tuple(tensor.shape)) for name, tensor in parameters.items()]
    layout = build_layout(specs, config.rounds.fragments, config.rounds.layout)
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    embeddings = [name for name, parameter in model.named_parameters() if id(parameter) in embedded]
    # Tasks may be any class with the three methods that are required; this one is not.
    sequence_tokens = getattr(task, "sequence_tokens", lambda: None)()
    if sequence_tokens is not None and not (isinstance(sequence_tokens, int) and sequence_tokens > 0):
        raise ConfigError(f"[task] use: sequence_tokens of {config.task.use!r} is {sequence_tokens!r}, not a count")
    fingerprint = fingerprint_of(task)
    named: Named = parameters.__getitem__
    if config.run.init:
        del model, parameters
        named = _from_files(base / Path(config.run.init).expanduser(), layout, task)
    return Initial(layout, lambda fragment: _flat(fragment, named), embeddings, sequence_tokens, fingerprint)


def _without_weights(task: Any, seed: int) -> nn.Module:
    """The task's model on the device "meta", where tensors have shapes and no values; the real one where its task
    needs values to build it. Raises ConfigError where that cannot be built either."""
    try:
        with torch.device("meta"):
            return build_model(task, seed)
    except ConfigError as error:
        model = build_model(task, seed)  # what is wrong with the task itself is said by this
        log.info("the model is built whole, though its weights come from files: on the device meta, %s", error)
    return model


def _flat(fragment: Fragment, named: Named) -> F32:
    """The fragment's tensors end to end. Raises ConfigError where a value is not finite."""
    flat = np.empty(fragment.size, dtype=np.float32)
    for name, (start, stop) in fragment.offsets.items():
        flat[start:stop] = _fp32(named(name)).reshape(-1)
        if not math.isfinite(square_sum(flat[start:stop])):
            raise ConfigError(f"initial tensor {name} holds NaN or infinity; start from other weights")
    return flat


def _fp32(tensor: Tensor) -> F32:
    array: F32 = tensor.to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _from_files(path: Path, layout: Layout, task: Any) -> Named:
    """The run's tensors out of a safetensors file or a directory of them, each read when it is asked for. Where some
    are not there by their names, the task is asked for the whole model."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    where[name], shapes[name] = file, tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"[run] init: {path} cannot be read: {error}") from None
    if not where:
        raise ConfigError(
            f"[run] init: {path} holds no safetensors file, and others are not read; save_pretrained writes one"
        )
    wanted = [tensor.name for fragment in layout.fragments for tensor in fragment.tensors]
    if path.is_dir() and any(name not in where for name in wanted) and (model := _pretrained(task, path)):
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        _check(path, layout, {name: tuple(tensor.shape) for name, tensor in parameters.items()})
        return parameters.__getitem__
    _check(path, layout, shapes)
    if left := sorted(where.keys() - wanted):
        log.warning("%s: %d tensors are not the model's and are left out, the first is %s", path, len(left), left[0])

    def named(name: str) -> Tensor:
        try:
            with safe_open(where[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"[run] init: {where[name]} cannot be read: {error}") from None

    return named


def _pretrained(task: Any, path: Path) -> nn.Module | None:
    """`task.pretrained(path)`, where the task has such a thing."""
    model: nn.Module | None = task.pretrained(path) if hasattr(task, "pretrained") else None
    return model


def _check(path: Path, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError naming the first of the layout's tensors that is not among `shapes` as it should be."""
    for tensor in (tensor for fragment in layout.fragments for tensor in fragment.tensors):
        there = shapes.get(tensor.name)
        if there != tensor.shape:
            how = "is not there" if there is None else f"is {list(there)} there"
            raise ConfigError(
                f"[run] init: {path} does not fit the task: tensor {tensor.name} {how} and {list(tensor.shape)} in the "
                "model; name weights that were saved from this model"
            )
