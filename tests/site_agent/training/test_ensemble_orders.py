"""What the head orders reaches every rank, and what goes wrong at one is known to all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.errors import ConfigError, FaultError
from site_agent.core.shares import Pass
from site_agent.training.batches import Ahead
from site_agent.training.forms import Computing
from site_agent.training.replica import DivergedError
from tests.support.ranks import run_ranks
from tests.support.sites import (
    Site,
    Stream,
    anchors_of,
    batches,
    begun,
    head_or_serve,
    run_of,
    same,
    trainer_of,
    weights_of,
)

PAIR, TWO, TWO_AND_ONE = ((0, 1),), ((0,), (1,)), ((0, 1), (2,))
LR = 1e-2


# ---- steps that come to nothing


def spoiled(kind: str) -> Any:
    """A batch whose last sequence, which is the last rank's, has a loss that is not finite; or without any token."""
    (batch,) = batches(1, seed=6)
    batch["mask"][-1] = True
    if kind == "empty":
        batch["mask"][:] = False
    else:
        batch["factor"][-1] = float(kind)
    return batch


def skipping(sites: Sequence[Site]) -> list[Any]:
    """Weights before and after two spoiled steps, and after one that is not; what was skipped and the scale."""
    found = []
    for site in sites:
        trainer = trainer_of(site)
        seen: list[Any] = []
        step = trainer.step
        trainer.step = lambda *args, seen=seen, step=step, trainer=trainer: (  # type: ignore[method-assign, misc]
            step(*args),
            seen.append((weights_of(trainer), trainer.skipped_steps, trainer.scale.value)),
        )[0]
        if (ensemble := begun(trainer, site)) is not None:
            for batch in [*batches(1), spoiled("nan"), spoiled("inf"), spoiled("empty"), *batches(1, seed=1)]:
                loss, tokens, _ = ensemble.step(Stream([batch]), LR)
            assert np.isfinite(loss)
            assert tokens > 0
            ensemble.end()
        found.append(seen)
    return found


def test_a_gradient_that_is_not_finite_at_one_rank_is_skipped_at_all() -> None:
    sites = [
        Site(groups=TWO_AND_ONE),
        Site(groups=TWO_AND_ONE, parallel="fsdp", micro_batch=1),
        Site(groups=((0, 1, 2),), parallel="fsdp"),
        Site(groups=((0, 1, 2),), how=Computing("fp16")),
        Site(groups=TWO_AND_ONE, parallel="fsdp", how=Computing("fp16")),
    ]
    ranks = run_ranks(3, skipping, sites)
    for number, site in enumerate(sites):
        first, nan, inf, empty, last = ranks[0][number]
        assert [each[1] for each in (first, nan, inf, empty, last)] == [0, 1, 2, 3, 3]
        assert all(same(each[0], first[0]) for each in (nan, inf, empty))
        assert not same(last[0], first[0])
        scales = [each[2] for each in (first, nan, inf, empty, last)]
        half = site.how.precision == "fp16"
        # Halved where it overflows; a step without tokens says nothing about it.
        assert scales == ([4096.0, 2048.0, 1024.0, 1024.0, 1024.0] if half else [1.0] * 5)
        for other in ranks[1:]:
            for ours, theirs in zip(ranks[0][number], other[number], strict=True):
                assert same(ours[0], theirs[0])
                assert ours[1:] == theirs[1:]


# ---- what goes wrong


def diverging(site: Site) -> Any:
    """What the head is told where the weights, or the memory, of one rank are at fault; and that all go on."""
    trainer = trainer_of(site)
    if trainer.team.rank == 1:
        encode = trainer.encode
        calls = itertools.count()

        def failing(*args: Any) -> Any:
            if next(calls) == 1:
                raise FaultError("no memory")
            return encode(*args)

        trainer.encode = failing  # type: ignore[method-assign]
    if (ensemble := begun(trainer, site)) is None:
        return None
    anchors = anchors_of(site)
    largest = max(range(2), key=lambda p: anchors[p].size)
    parts = [(part.start, part.stop) for part in trainer.seat.parts(trainer.layout.fragments[largest])]
    bad = anchors[largest].copy()
    bad[parts[1][0]] = float("nan")
    told = []
    for weights in (bad, anchors[largest], anchors[largest]):
        ensemble.begin(largest, weights)
        ensemble.snapshot(largest)
        try:
            told.append(len(ensemble.encode(largest, anchors[largest])))
        except FaultError as error:
            told.append((type(error), str(error)))
    ensemble.end()
    return told, parts


def test_a_rank_that_cannot_encode_is_told_at_the_head() -> None:
    ((first, second, third), parts), _ = run_ranks(2, diverging, Site(groups=PAIR, parallel="fsdp"))
    assert all(start < stop for start, stop in parts)  # of which the second begins within a tensor
    assert first[0] is DivergedError
    assert "have diverged" in first[1]
    assert second == (FaultError, "rank 1: no memory")
    assert third == 2


class Scalar:
    """A task whose batch is a number, and no tensor with sequences."""

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 3)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return sum((p.sum() for p in model.parameters()), torch.zeros(())) * batch, 1


def refused(site: Site) -> Any:
    ensemble = begun(trainer_of(site), site)
    if ensemble is None:
        return None
    told = []
    for batch in (torch.tensor(2.0), {"x": torch.zeros(8), "f": print}):
        with pytest.raises(ConfigError) as error:
            ensemble.step(Stream([batch]), LR)
        told.append(str(error.value))
    ensemble.end()
    return told


def test_a_task_whose_batches_cannot_be_cut_trains_alone_only() -> None:
    site = Site(run_of(rounds={"fragments": 1}), task=Scalar())
    alone = begun(trainer_of(site), site)
    assert alone is not None
    before = alone.trainer.read(0)
    assert alone.step(Stream([torch.tensor(2.0)]), LR)[1] == 1
    assert not torch.equal(alone.trainer.read(0), before)
    told, _ = run_ranks(2, refused, replace(site, groups=PAIR))
    assert all("a batch of this task cannot be cut among devices" in each for each in told)
    assert all("train on one device" in each for each in told)


# ---- orders


def ordered(site: Site) -> Any:
    """What becomes of a rank that is told to seed, to tick, to reset and to measure."""
    trainer = trainer_of(site)
    ensemble = begun(trainer, site)
    seconds = None
    if ensemble is not None:
        ensemble.step(Stream(batches(1)), LR)
        ensemble.seed(1000)
        ensemble.tick()
        ensemble.step(Stream([spoiled("nan")]), LR)
        ensemble.reset()
        seconds = ensemble.exchange_seconds()
        ensemble.end()
    fresh = not list(trainer.optimizer.state()) and all(p.grad is None for p in trainer.parameters.values())
    return torch.initial_seed(), (trainer.skipped_steps, trainer.scale.value, fresh), seconds


def test_orders_reach_every_rank() -> None:
    ranks = run_ranks(2, ordered, Site(groups=TWO, how=Computing("fp16")))
    assert [seed for seed, _, _ in ranks] == [1000, 1001]  # ranks do not drop out the same activations
    assert [state for _, state, _ in ranks] == [(0, 4096.0, True)] * 2
    assert ranks[0][2] > 0


def measured(site: Site) -> Any:
    """The shares after a calibration in which the second group took three times as long a sequence."""
    trainer = trainer_of(site)
    if trainer.team.head:
        step = trainer.step

        def taking(*args: Any) -> Any:
            stepped = step(*args)
            return replace(
                stepped, seconds=tuple(0.1 * s * w for s, w in zip(ensemble.balance.shares, (1, 3), strict=True))
            )

        trainer.step = taking  # type: ignore[method-assign]
    ensemble = begun(trainer, site)
    if ensemble is None:
        return None
    seconds = ensemble.calibrate(Stream(batches(16)), 3, 1e9)
    told = ensemble.balance.shares, ensemble.describe(), ensemble.plan(4), seconds
    ensemble.end()
    return told


def test_shares_are_those_of_measured_speeds() -> None:
    (shares, told, smaller, seconds), _ = run_ranks(2, measured, Site(groups=TWO))
    assert shares == [6, 2]
    assert smaller == [[Pass(0, 3)], [Pass(3, 4)]]  # a batch of another size is shared alike
    assert told == "g0 6 sequences at 10/s, g1 2 sequences at 3.33/s"
    assert seconds > 0


def fitted(site: Site, room: Sequence[int], batch: Any = None) -> Any:
    """The micro-batch that a site finds whose ranks have room for so many sequences."""
    trainer = trainer_of(site)
    trainer.device = torch.device("cuda")  # where passes are tried at all
    trainer.fits = lambda batch: len(batch["tokens"]) <= room[trainer.team.rank]  # type: ignore[method-assign]
    if (ensemble := head_or_serve(trainer, site)) is None:
        return None
    try:
        ensemble.fit(batches(1)[0] if batch is None else batch)
    except FaultError as error:
        return str(error)
    finally:
        ensemble.end()
    return ensemble.micro_batch


def all_fitted(cases: Sequence[tuple[Site, Sequence[int]]]) -> list[Any]:
    return [fitted(*case) for case in cases]


def test_a_pass_has_as_many_sequences_as_every_rank_has_room_for() -> None:
    site = Site(groups=TWO)
    cases = [(site, (8, 8)), (site, (8, 1)), (site, (3, 4)), (replace(site, micro_batch=5), (8, 0)), (site, (0, 8))]
    told, _ = run_ranks(2, all_fitted, cases)
    assert told[:4] == [0, 1, 2, 5], "0 where nobody lacks room: shares change"
    assert told[4].startswith("the devices have too little memory for a pass over one sequence: ")
    assert fitted(Site(), (5,)) == 4
    # What cannot be cut is trained as it is.
    assert fitted(Site(), (5,), torch.tensor(1.0)) == 0


def test_the_next_batch_is_drawn_while_a_device_is_at_work() -> None:
    site = Site()
    ensemble = begun(trainer_of(site), site)
    assert ensemble is not None
    drawn: list[str] = []
    ahead = Ahead(Noting(drawn))
    backward = ensemble.trainer.form.backward
    ensemble.trainer.form.backward = lambda *args, **more: (drawn.append("pass"), backward(*args, **more))[1]  # type: ignore[method-assign]
    ensemble.step(ahead, LR)
    ensemble.step(ahead, LR)
    assert drawn == ["draw", "pass", "draw", "pass", "draw"]


class Noting(Stream):
    def __init__(self, drawn: list[str]) -> None:
        super().__init__(batches(3))
        self._drawn = drawn

    def __next__(self) -> Any:
        self._drawn.append("draw")
        return super().__next__()

    def state_dict(self) -> dict[str, Any]:
        return {}
