"""The yardstick: the same model on the same tokens as plain synchronous data-parallel, in one process.

Every step takes one batch from each site's shard, so the global batch, the data and the schedule are those
that a data-parallel run over the same sites would have. Run as a program it reads a run config and prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.sample import held_out_loss
from shared.config import RunConfig, load_run
from shared.task import Shard, build_model, load_task
from site_agent.training.optimizers import build_optimizer
from site_agent.training.schedules import lr_factor


@dataclass(frozen=True)
class Result:
    """Losses in nats on the held-out set before and after, and what the training took."""

    initial_eval_loss: float
    eval_loss: float
    steps: int
    tokens: int
    seconds: float


def train(
    config: RunConfig,
    base: Path,
    sites: int,
    tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    watch: Callable[[int, int, float], None] | None = None,
    evaluations: int = 20,
) -> Result:
    """Trains on at least `tokens` tokens with a global batch of `sites` times the site's batch.

    `watch` gets (steps, tokens, held-out loss) about `evaluations` times on the way.
    """
    task = load_task(config.task.use, config.task.options(), base)
    model = build_model(task, config.run.seed)
    inner, seed = config.inner, config.run.seed
    initial = held_out_loss(task, model, inner.batch_size)
    optimizer = build_optimizer(inner, model)
    streams = [task.train_batches(Shard(i, sites, seed), inner.batch_size) for i in range(sites)]
    torch.manual_seed(seed)
    done = steps = watched = 0
    began = time.perf_counter()
    model.train()
    while done < tokens:
        optimizer.set_lr(inner.lr * lr_factor(inner.schedule, done, tokens, inner.warmup_tokens))
        optimizer.zero_grad()
        done += _accumulate(task, model, [next(stream) for stream in streams])
        nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm or float("inf"))
        optimizer.step()
        steps += 1
        progress(done)
        if watch is not None and done >= watched + tokens // evaluations and done < tokens:
            watched = done
            watch(steps, done, held_out_loss(task, model, inner.batch_size) or 0.0)
            model.train()
    seconds = time.perf_counter() - began
    final = held_out_loss(task, model, inner.batch_size)
    return Result(initial or 0.0, final or 0.0, steps, done, seconds)


def _accumulate(task: Any, model: nn.Module, batches: list[Any]) -> int:
    """The mean gradient over the sites' batches; returns their tokens. One pass where they are plain tensors of one
    shape, as a data-parallel step would be."""
    if all(isinstance(batch, torch.Tensor) and batch.shape == batches[0].shape for batch in batches):
        batches = [torch.cat(batches)]
    total = 0
    for batch in batches:
        loss, tokens = task.loss(model, batch)
        (loss / len(batches)).backward()
        total += int(tokens)
    return total


def main() -> None:
    """`python -m lab.data_parallel RUN.toml --sites N --tokens T`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()

    def report(done: int) -> None:
        print(done, file=sys.stderr, flush=True)

    base = arguments.run.resolve().parent
    result = train(load_run(arguments.run), base, arguments.sites, arguments.tokens, report)
    print(json.dumps(result.__dict__))


if __name__ == "__main__":
    main()
