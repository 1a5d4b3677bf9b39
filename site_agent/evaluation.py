"""Evaluation of the published weights on the held-out set, beside the training, when the coordinator asks for it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future

from torch import nn

from shared.task import Batch
from site_agent.contribution import Anchor
from site_agent.courier import Courier
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import load_flat

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates on `executor`, one set of weights at a time, and reports through the courier."""

    def __init__(self, ensemble: Ensemble, courier: Courier, executor: Executor) -> None:
        self._ensemble, self._trainer = ensemble, ensemble.trainer
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
        trainer = self._trainer
        batches = trainer.task.eval_batches(trainer.inner.batch_size)
        if batches is None:
            self._courier.evaluates = False
            return
        load_flat(model, trainer.layout, (anchor.flat for anchor in anchors))
        _report(self._courier, anchors, self._ensemble.evaluate_beside(model, batches))


class TogetherEvaluator:
    """The same with all ranks of a site, between two steps: another model would have no room on devices that share
    one, and the rank that had it would hold up the others. The weights in training wait on the host."""

    def __init__(self, ensemble: Ensemble, courier: Courier) -> None:
        self._ensemble, self._courier = ensemble, courier

    def begin(self, anchors: Sequence[Anchor]) -> None:
        """Evaluates the weights `anchors`. Training goes on without it where the held-out set cannot be had: all ranks
        are between two passes then. What fails within a pass leaves them apart, and is raised."""
        trainer = self._ensemble.trainer
        try:
            with trainer.team.waiting():
                batches = trainer.task.eval_batches(trainer.inner.batch_size)
        except Exception:
            log.exception("evaluation failed")
            return
        if batches is None:
            self._courier.evaluates = False
            return
        try:
            loss = self._ensemble.evaluate([anchor.flat for anchor in anchors], _drawn(batches))
        except _NotDrawnError:
            log.exception("evaluation failed")
        else:
            _report(self._courier, anchors, loss)

    def finish(self) -> None:
        """Nothing is ever under way."""


class _NotDrawnError(Exception):
    """The held-out set has failed; its cause says how."""


def _drawn(batches: Iterable[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except Exception as error:
        raise _NotDrawnError from error


def _report(courier: Courier, anchors: Sequence[Anchor], loss: float | None) -> None:
    if loss is not None and abs(loss) <= 1e6:
        courier.evaluated(anchors, loss)
