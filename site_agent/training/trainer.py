"""The trainer: one model on one device, its inner optimizer and its data, and the fragments as flat vectors.

Weights leave and enter the model as flat fp32 vectors on its device: pseudo-gradients are made and encoded there, and
weights aligned. Only anchors, which must be the same bits everywhere, live on the CPU, where their arithmetic is
done. The inner optimizer's state stays through every alignment (DiLoCo, arXiv 2311.08105).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import InnerTable
from shared.fragments import F32, Layout, TensorSpec
from shared.task import BatchStream
from site_agent.training.optimizer_state import pack_optimizer, restore_optimizer
from site_agent.training.optimizers import build_optimizer


class Trainer:
    """A model in training. `layout` must hold exactly the model's parameters (checked). Raises ConfigError."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        layout: Layout,
        inner: InnerTable,
        device: torch.device,
        throttle: float = 1.0,
    ) -> None:
        layout.check_model(TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters())
        self.task, self.layout, self.inner, self.device = task, layout, inner, device
        self.model = model.to(device)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(inner, self.model)
        self.skipped_steps = 0
        self._throttle = throttle
        self._compute: deque[float] = deque(maxlen=32)

    def step(self, stream: BatchStream, lr: float) -> tuple[float, int, float]:
        """One inner step at learning rate `lr`: (loss, tokens, seconds). A step whose gradient is not finite is
        skipped and counted: one bad batch must not poison weights that the whole run shares."""
        began = time.perf_counter()
        self.model.train()
        batch = _to_device(next(stream), self.device)
        self.optimizer.set_lr(lr)
        loss, tokens = self.task.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.inner.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in self.parameters.values() if p.requires_grad], limit)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            self.skipped_steps += 1
        value = float(loss.detach())
        self._slow_down(time.perf_counter() - began)
        return value, int(tokens), time.perf_counter() - began

    def _slow_down(self, seconds: float) -> None:
        """Sleeps until a step has taken 1/throttle of its usual compute time. The median makes the emulated device
        steady: a step that another process delayed is not made slower still."""
        self._compute.append(seconds)
        if self._throttle < 1.0:
            time.sleep(max(0.0, statistics.median(self._compute) / self._throttle - seconds))

    def seed(self, seed: int) -> None:
        """Sets the random state of every device, which dropout draws from."""
        torch.manual_seed(seed)

    def read(self, fragment: int) -> Tensor:
        """The fragment's weights now, as a new flat fp32 vector on the model's device."""
        parts = [self.parameters[t.name].detach().reshape(-1) for t in self.layout.fragments[fragment].tensors]
        return torch.cat([part.to(torch.float32) for part in parts])

    def write(self, fragment: int, flat: Tensor) -> None:
        """Sets the fragment's weights from a flat fp32 vector on any device."""
        described = self.layout.fragments[fragment]
        with torch.no_grad():
            for tensor in described.tensors:
                part = flat[slice(*described.offsets[tensor.name])]
                self.parameters[tensor.name].copy_(part.view(tensor.shape))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and inner optimizer as named tensors (copies), and what of them is not a tensor."""
        tensors, plain = pack_optimizer(self.optimizer)
        tensors |= {f"model.{name}": p.detach().cpu().clone() for name, p in self.parameters.items()}
        return tensors, plain

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """The inverse of `state`; the state of another optimizer than the run's now is left, with a warning."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        restore_optimizer(self.optimizer, tensors, plain)

    def reset(self) -> None:
        """A fresh optimizer, as if no step had been taken; weights are the caller's to write."""
        self.optimizer.reset()
        self.optimizer.zero_grad()
        self.skipped_steps = 0

    def calibrate(self, stream: BatchStream, steps: int, seconds: float) -> float:
        """Median seconds of an inner step, from at most `steps` real ones and about `seconds`, after one that warms
        up. The model's weights are moved by it; the caller writes them afterwards."""
        self.step(stream, self.inner.lr)
        self._compute.clear()
        times: list[float] = []
        while len(times) < steps and (not times or sum(times) < seconds):
            times.append(self.step(stream, self.inner.lr)[2])
        self.reset()
        return statistics.median(times)


def evaluate(task: Any, model: nn.Module, batches: Iterable[Any], device: torch.device) -> float | None:
    """Mean loss over `batches` in nats, weighted by tokens; None where there are none."""
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            loss, tokens = task.loss(model, _to_device(batch, device))
            total += float(loss) * int(tokens)
            count += int(tokens)
    model.train(was_training)
    return total / count if count else None


def load_flat(model: nn.Module, layout: Layout, flats: Iterable[F32]) -> None:
    """Sets all of a model's parameters from its fragments' flat vectors. Raises ConfigError where they differ."""
    parameters = dict(model.named_parameters())
    layout.check_model(TensorSpec(name, tuple(p.shape)) for name, p in parameters.items())
    with torch.no_grad():
        for fragment, flat in zip(layout.fragments, flats, strict=True):
            for name, array in fragment.unflatten(flat).items():
                parameters[name].copy_(torch.from_numpy(array))


def _to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch on the device; whatever else it holds is the task's own."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch
