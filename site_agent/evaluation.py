"""Evaluation of the published weights on the held-out set, beside the training, when the coordinator asks for it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

from torch import nn

from shared.fragments import Layout
from site_agent.contribution import Anchor
from site_agent.courier import Courier
from site_agent.training.trainer import Trainer, evaluate, load_flat

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates on `executor`, one set of weights at a time, and reports through the courier."""

    def __init__(
        self, task: Any, trainer: Trainer, layout: Layout, batch_size: int, courier: Courier, executor: Executor
    ) -> None:
        self._task, self._trainer, self._layout, self._batch_size = task, trainer, layout, batch_size
        self._courier, self._executor = courier, executor
        self._under_way: Future[None] | None = None

    def begin(self, anchors: Sequence[Anchor]) -> None:
        """Begins to evaluate the weights `anchors`, unless others are being evaluated."""
        if self._under_way is not None and not self._under_way.done():
            return
        try:
            # Copied here, between steps, so that its buffers are of one moment.
            model = copy.deepcopy(self._trainer.model)
            self._under_way = self._executor.submit(self._work, model, list(anchors))
        except Exception:
            log.exception("evaluation failed")

    def finish(self) -> None:
        """Waits for what is being evaluated."""
        if self._under_way is not None:
            self._under_way.result()

    def _work(self, model: nn.Module, anchors: list[Anchor]) -> None:
        """Training goes on without it where it fails."""
        try:
            self._evaluate(model, anchors)
        except Exception:
            log.exception("evaluation failed")

    def _evaluate(self, model: nn.Module, anchors: list[Anchor]) -> None:
        """The held-out loss of the published weights, which are written into `model`."""
        batches = self._task.eval_batches(self._batch_size)
        if batches is None:
            self._courier.evaluates = False
            return
        load_flat(model, self._layout, (anchor.flat for anchor in anchors))
        loss = evaluate(self._task, model, batches, self._trainer.device)
        if loss is not None and abs(loss) <= 1e6:
            self._courier.evaluated(anchors, loss)
