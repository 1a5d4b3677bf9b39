"""Version 0 of a run: the layout of the task's model and its initial weights, from the seed or from files.

At most the model as its task builds it and one fragment are in memory: weights are flattened, and read from files,
fragment by fragment. Where they come from files the model is needed for its names and shapes alone, and is built
without memory for its weights (torch's device "meta"), if its task can do that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
    named: Named = parameters.__getitem__
    if config.run.init:
        named = _from_files(base / Path(config.run.init).expanduser(), layout)
    embedded = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    embeddings = [name for name, parameter in model.named_parameters() if id(parameter) in embedded]
    # Tasks may be any class with the three methods that are required; this one is not.
    sequence_tokens = getattr(task, "sequence_tokens", lambda: None)()
    if sequence_tokens is not None and not (isinstance(sequence_tokens, int) and sequence_tokens > 0):
        raise ConfigError(f"[task] use: sequence_tokens of {config.task.use!r} is {sequence_tokens!r}, not a count")
    fingerprint = fingerprint_of(task)
    return Initial(layout, lambda fragment: _flat(fragment, named), embeddings, sequence_tokens, fingerprint)


def _without_weights(task: Any, seed: int) -> nn.Module:
    """The task's model on the device "meta", where tensors have shapes and no values; the real one where its task
    needs values to build it. Raises ConfigError where that cannot be built either."""
    try:
        with torch.device("meta"):
            return build_model(task, seed)
    except ConfigError as error:
        log.info("the model is built whole, though its weights come from files: on the device meta, %s", error)
    return build_model(task, seed)


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


def _from_files(path: Path, layout: Layout) -> Named:
    """The run's tensors out of a safetensors file or a directory of them, each read when it is asked for."""
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
        raise ConfigError(f"[run] init: {path} holds no safetensors file")
    wanted = [tensor.name for fragment in layout.fragments for tensor in fragment.tensors]
    try:
        layout.check_model([TensorSpec(name, shapes[name]) for name in wanted if name in where])
    except ConfigError as error:
        raise ConfigError(f"[run] init: {path} does not fit the task: {error}") from None

    def named(name: str) -> Tensor:
        try:
            with safe_open(where[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"[run] init: {where[name]} cannot be read: {error}") from None

    return named
