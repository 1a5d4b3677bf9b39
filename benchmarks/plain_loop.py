"""The plain training loop that a site is compared with, as a process: forward, backward, clip, step, and nothing else.

It trains what a `run.toml` says (task, batch, inner optimizer) on one device, as anybody would write it: batches
copied from pinned memory, bf16 autocast where the device has it, the fastest AdamW that torch has for it, and the host
running ahead of the device, which it waits for about once a second only to note how far it is.

    python -m benchmarks.plain_loop RUN.toml --to FILE --until FILE [--device D] [--index I] [--count N] [--threads T]

Lines of JSON go to `--to`: what the device is, then `{"at", "tokens"}` after each window, in the end the last loss and
the most memory that was taken. It trains until the file `--until` is there.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from shared.config import InnerTable, load_run
from shared.task import Shard, build_model, load_task
from site_agent.training.batches import to_device
from site_agent.training.devices import choose_device, set_threads
from site_agent.training.drivers import module
from site_agent.training.makes import make_of
from site_agent.training.optimizers import BETAS, kernel

WARM_UP_STEPS, TIMED_STEPS = 10, 5
WINDOW_SECONDS = 1.0
Say = Callable[[dict[str, Any]], object]


def precision_of(device: torch.device) -> str:
    """What `[devices] precision = "auto"` means on it."""
    return "bf16" if device.type != "cpu" and make_of(device).bf16(device) else "fp32"


def train(
    task: Any,
    model: nn.Module,
    shard: Shard,
    inner: InnerTable,
    device: torch.device,
    say: Say,
    until: Callable[[], bool],
) -> None:
    """Trains until `until` says so, and says how far it is after each window."""
    model = model.to(device).train()
    parameters = list(model.parameters())
    decayed, others = ([p for p in parameters if (p.dim() >= 2) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": inner.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=inner.lr, betas=BETAS, **kernel(AdamW, parameters))
    stream = task.train_batches(shard, inner.batch_size)
    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    autocast: Callable[[], Any] = bf16 if precision_of(device) == "bf16" else nullcontext

    def steps(count: int) -> tuple[Tensor, int]:
        done = 0
        for _ in range(count):
            batch = to_device(next(stream), device)
            with autocast():
                loss, tokens = task.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, inner.clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += tokens
        synchronize(device)
        return loss.detach(), done

    first, _ = steps(1)
    steps(WARM_UP_STEPS)
    began = time.monotonic()
    steps(TIMED_STEPS)
    window = max(1, round(WINDOW_SECONDS * TIMED_STEPS / (time.monotonic() - began)))
    total, loss = 0, first
    say({"at": time.monotonic(), "tokens": total})
    while not until():
        loss, tokens = steps(window)
        total += tokens
        say({"at": time.monotonic(), "tokens": total})
    say({"first_loss": float(first), "loss": float(loss), "peak_bytes": peak_bytes(device)})


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that tensors of this process have taken on the device; on the CPU the most that the process has.
    None where the make does not say."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for where in (torch.accelerator, module(device.type)):
        try:
            return int(where.max_memory_allocated(device))
        except (AttributeError, NotImplementedError, RuntimeError):
            continue
    return None


def main() -> None:
    """`python -m benchmarks.plain_loop`, see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--until", type=Path, required=True)
    parser.add_argument("--device", default="")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    set_threads(options.threads)
    config, device = load_run(options.run), choose_device(options.device)
    task = load_task(config.task.use, config.task.options(), options.run.resolve().parent)
    model = build_model(task, config.run.seed)
    shard = Shard(options.index, options.count, config.run.seed)
    make = make_of(device)
    with options.to.open("w", encoding="utf-8") as file:

        def say(what: dict[str, Any]) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        say({"device": make.title(device), "precision": precision_of(device), "memory_bytes": make.memory(device)[1]})
        train(task, model, shard, config.inner, device, say, options.until.exists)


if __name__ == "__main__":
    main()
