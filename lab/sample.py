"""Text from the weights of a run, and their held-out loss; the daemon may be running or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from coordinator.export import stored_run
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.task import build_model, load_task
from site_agent.training.trainer import evaluate, load_flat


def load_model(state_dirs: Sequence[Path], *, published: bool = False) -> tuple[RunConfig, Any, nn.Module]:
    """(config, task, model) with the masters of a run, whose coordinators' state directories are given, or with
    `published` what the sites hold."""
    with stored_run(state_dirs) as stored:
        config = stored.config
        task = load_task(config.task.use, config.task.options(), stored.base)
        model = build_model(task, config.run.seed)
        load_flat(model, stored.layout, (state.published if published else state.master for state in stored.states))
        return config, task, model


def load_exported(file: Path, config: RunConfig, base: Path) -> tuple[Any, nn.Module]:
    """(task, model) with the weights of an exported safetensors file. Raises ConfigError where they do not fit."""
    task = load_task(config.task.use, config.task.options(), base)
    model = build_model(task, config.run.seed)
    weights = load_file(file)
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise ConfigError(f"{file} does not hold the tensors of task {config.task.use!r}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return task, model


def sample(state_dirs: Sequence[Path], prompt: str, tokens: int, seed: int) -> str:
    """`prompt` continued. Raises ConfigError, CorruptError."""
    _, task, model = load_model(state_dirs)
    text: str = task.generate(model, prompt, tokens, seed)
    return text


def held_out_loss(task: Any, model: nn.Module, batch_size: int) -> float | None:
    """Mean loss in nats over the task's held-out set; None where it has none."""
    batches = task.eval_batches(batch_size)
    return None if batches is None else evaluate(task, model, batches, torch.device("cpu"))
