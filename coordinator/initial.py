"""Version 0 of a run: the layout of the task's model and its initial weights, from the seed or from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coordinator.store.state_dir import Initial
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.fragments import F32, Layout, TensorSpec, build_layout
from shared.task import build_model, load_task


def initial_weights(config: RunConfig, base: Path) -> Initial:
    """What the run starts from. Relative files in the config count from `base`. Raises ConfigError."""
    task = load_task(config.task.use, config.task.options(), base)
    model = build_model(task, config.run.seed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not parameters:
        raise ConfigError(f"[task] use: the model of {config.task.use!r} has no parameters")
    specs = [TensorSpec(name, tuple(tensor.shape)) for name, tensor in parameters.items()]
    layout = build_layout(specs, config.rounds.fragments, config.rounds.layout)
    if config.run.init:
        parameters = _from_files(base / Path(config.run.init).expanduser(), layout)
    arrays = {name: _fp32(tensor) for name, tensor in parameters.items()}
    bad = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if bad is not None:
        raise ConfigError(f"initial tensor {bad} holds NaN or infinity; start from other weights")
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
    return Initial(layout, [fragment.flatten(arrays) for fragment in layout.fragments], embeddings, sequence_tokens)


def _fp32(tensor: Tensor) -> F32:
    array: F32 = tensor.to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _from_files(path: Path, layout: Layout) -> dict[str, Tensor]:
    """The run's tensors out of a safetensors file or a directory of them."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            tensors.update(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"[run] init: {path} cannot be read: {error}") from None
    if not tensors:
        raise ConfigError(f"[run] init: {path} holds no safetensors file")
    wanted = [tensor.name for fragment in layout.fragments for tensor in fragment.tensors]
    held = {name: tensors[name] for name in wanted if name in tensors}
    try:
        layout.check_model([TensorSpec(name, tuple(tensor.shape)) for name, tensor in held.items()])
    except ConfigError as error:
        raise ConfigError(f"[run] init: {path} does not fit the task: {error}") from None
    return held
