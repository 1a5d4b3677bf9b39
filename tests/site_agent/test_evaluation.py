"""Evaluation of published weights, beside the training of one process or between the steps of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from site_agent.contribution import Anchor
from site_agent.evaluation import Evaluator, TogetherEvaluator
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import Trainer, evaluate, load_flat
from tests.support.ranks import run_ranks
from tests.support.sites import BATCH, LM, Stream, head_or_serve, lm_site, trainer_of

LR = 1e-2


class Reports:
    """A courier that keeps what is reported."""

    def __init__(self) -> None:
        self.evaluates = True
        self.losses: list[float] = []

    def evaluated(self, anchors: list[Anchor], loss: float) -> None:
        assert [anchor.version for anchor in anchors] == [3, 3]
        self.losses.append(loss)


def published(trainer: Trainer) -> list[Anchor]:
    """Weights that are not the trainer's."""
    random = np.random.default_rng(0)
    sizes = [fragment.size for fragment in trainer.layout.fragments]
    return [Anchor(3, "", 0, random.normal(0, 0.1, size).astype(np.float32)) for size in sizes]


def held_out(sequences: int = 5) -> list[torch.Tensor]:
    """(No rank's share of the last one is like another's.)"""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(256, (count, LM["context"] + 1), generator=random) for count in (8, sequences)]


def data() -> Stream:
    """A batch of random bytes, always the same."""
    return Stream([torch.randint(256, (BATCH, LM["context"] + 1), generator=torch.Generator().manual_seed(0))])


def failing(batches: Iterable[Any]) -> Iterator[Any]:
    yield from batches
    raise OSError("the held-out set is gone")


KINDS = ("good", "none", "empty", "cannot be had", "fails midway", "absurd")


def holds_out(trainer: Trainer, kind: str) -> None:
    """Gives the trainer's task a held-out set of this kind."""

    def eval_batches(batch_size: int) -> Any:
        if kind == "cannot be had":
            raise OSError("the held-out set is not there")
        return {"none": None, "empty": [], "fails midway": failing(held_out())}.get(kind, held_out())

    trainer.task.eval_batches = eval_batches
    if kind == "absurd":
        inner = trainer.task.loss
        trainer.task.loss = lambda model, batch: (inner(model, batch)[0] * float("nan"), 1)


def weights(trainer: Trainer) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in trainer.parameters.values()]


def expected() -> float:
    """The loss of the published weights, by themselves."""
    trainer = trainer_of(lm_site())
    load_flat(trainer.model, trainer.layout, [anchor.flat for anchor in published(trainer)])
    loss = evaluate(trainer.task, trainer.model, held_out(), trainer.device)
    assert loss is not None
    return loss


# -- one process


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def evaluated(kind: str, executor: Any) -> tuple[Reports, Trainer]:
    trainer, courier = trainer_of(lm_site()), Reports()
    holds_out(trainer, kind)
    evaluator = Evaluator(Ensemble(trainer), courier, executor)  # type: ignore[arg-type]
    evaluator.begin(published(trainer))
    evaluator.finish()
    return courier, trainer


def test_published_weights_are_evaluated_and_those_in_training_stay(executor: ThreadPoolExecutor) -> None:
    courier, trainer = evaluated("good", executor)
    assert courier.losses == [expected()]
    assert weights(trainer) == weights(trainer_of(lm_site()))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_cannot_be_evaluated_is_not_reported(executor: ThreadPoolExecutor, kind: str) -> None:
    courier, _ = evaluated(kind, executor)
    assert courier.losses == []
    assert courier.evaluates == (kind != "none"), "a site without a held-out set is not asked again"


def test_one_evaluation_is_under_way_at_a_time() -> None:
    begun: list[Future[None]] = []

    def submit(*_: Any) -> Future[None]:
        begun.append(Future())
        return begun[-1]

    trainer = trainer_of(lm_site())
    evaluator = Evaluator(Ensemble(trainer), Reports(), SimpleNamespace(submit=submit))  # type: ignore[arg-type]
    evaluator.begin(published(trainer))
    evaluator.begin(published(trainer))
    assert len(begun) == 1
    begun[0].set_result(None)
    evaluator.begin(published(trainer))
    assert len(begun) == 2


# -- several


def evaluates_together(kind: str, groups: tuple[tuple[int, ...], ...], parallel: str) -> Any:
    """What is reported, whether the site's weights are as they were, and a step after it; at the head."""
    site = lm_site(groups=groups, parallel=parallel, speeds=(1.0, 2.0) if len(groups) > 1 else ())
    trainer = trainer_of(site)
    if kind == "absurd":
        holds_out(trainer, kind)
    ensemble = head_or_serve(trainer, site)
    if ensemble is None:
        return None
    holds_out(trainer, kind)
    courier, stream = Reports(), data()
    before = ensemble.state()[0]
    evaluator = TogetherEvaluator(ensemble, courier)  # type: ignore[arg-type]
    evaluator.begin(published(trainer))
    evaluator.finish()
    after = ensemble.state()[0]
    same = all(torch.equal(before[name], after[name]) for name in before)
    loss = ensemble.step(stream, LR)[0]
    ensemble.end()
    return courier.losses, courier.evaluates, same, loss


@pytest.mark.parametrize(("groups", "parallel"), [(((0, 1),), "ddp"), (((0, 1),), "fsdp"), (((0,), (1,)), "ddp")])
def test_all_ranks_evaluate_published_weights_and_go_on_where_they_were(
    groups: tuple[tuple[int, ...], ...], parallel: str
) -> None:
    losses, evaluates, same, stepped = run_ranks(2, evaluates_together, "good", groups, parallel)[0]
    assert losses == [pytest.approx(expected(), rel=1e-5)]
    assert evaluates
    assert same
    assert stepped == pytest.approx(first_step(), rel=1e-5)


def first_step() -> float:
    site = lm_site()
    ensemble = head_or_serve(trainer_of(site), site)
    assert ensemble is not None
    return ensemble.step(data(), LR)[0]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_cannot_be_evaluated_together_is_not_reported_and_training_goes_on(kind: str) -> None:
    losses, evaluates, same, _ = run_ranks(2, evaluates_together, kind, ((0, 1),), "ddp")[0]
    assert losses == []
    assert evaluates == (kind != "none")
    assert same
