"""Text from the weights of a run, and their held-out loss; the daemon may be running or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from coordinator.export import read_states
from shared.config import RunConfig
from shared.fragments import Layout
from shared.task import build_model, load_task
from site_agent.training.trainer import evaluate, load_flat


def load_model(state_dir: Path, *, published: bool = False) -> tuple[RunConfig, Any, nn.Module]:
    """(config, task, model) with the masters of a state directory, or with `published` what the sites hold."""
    config, _, states = read_states(state_dir)
    task = load_task(config.task.use, config.task.options())
    model = build_model(task, config.run.seed)
    layout = Layout(tuple(state.fragment for state in states))
    load_flat(model, layout, (state.published if published else state.master for state in states))
    return config, task, model


def sample(state_dir: Path, prompt: str, tokens: int, seed: int) -> str:
    """`prompt` continued. Raises ConfigError, CorruptError."""
    _, task, model = load_model(state_dir)
    text: str = task.generate(model, prompt, tokens, seed)
    return text


def held_out_loss(task: Any, model: nn.Module, batch_size: int) -> float | None:
    """Mean loss in nats over the task's held-out set; None where it has none."""
    batches = task.eval_batches(batch_size)
    return None if batches is None else evaluate(task, model, batches, torch.device("cpu"))
