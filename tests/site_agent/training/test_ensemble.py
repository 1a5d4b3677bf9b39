"""Several ranks that train one model are one trainer: what comes of it is what a single process would have done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import UploadCodec
from shared.task import build_model
from site_agent.core.alignment import How, Rule
from site_agent.training.forms import gathered
from site_agent.training.trainer import Trainer, evaluate, load_flat
from tests.support.ranks import run_ranks
from tests.support.sites import (
    Site,
    Stream,
    Tiny,
    anchors_of,
    batches,
    begun,
    layout_of,
    run_of,
    same,
    trainer_of,
    weights_of,
)

Named = dict[str, Tensor]
HOWS: tuple[How, ...] = get_args(How)
PAIR, TWO, TWO_AND_ONE, TWO_AND_TWO, FOUR = ((0, 1),), ((0,), (1,)), ((0, 1), (2,)), ((0, 1), (2, 3)), ((0, 1, 2, 3),)
LR = 1e-2
PLAIN = {"optimizer": "sgd", "clip_norm": 0.0, "weight_decay": 0.0}
"""Weights move by the gradient itself."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As at the ranks: how a sum is rounded depends on how it is cut among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def near(ours: Named, theirs: Named, within: float = 1e-6) -> bool:
    """To within fp32's rounding of sums, tensor by tensor."""
    apart = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(1e-30)) for name in theirs}
    return ours.keys() == theirs.keys() and max(apart.values()) <= within


# ---- rounds of a site, bit for bit


@dataclass
class Course:
    """What came of it: at the head, and the weights that each rank has in the end."""

    losses: list[float]
    sections: list[bytes]
    tensors: Named
    plain: dict[str, Any]
    evaluation: float | None
    weights: Named


def rounds(site: Site) -> Course:
    """Steps, contributions of both fragments, and a version taken up in every way there is."""
    trainer = trainer_of(site)
    course = Course([], [], {}, {}, None, {})
    if (ensemble := begun(trainer, site)) is not None:
        stream, anchors = Stream(batches(10)), anchors_of(site)
        for number, how in enumerate(HOWS):
            course.losses += [ensemble.step(stream, LR)[0] for _ in range(2)]
            for p, anchor in enumerate(anchors):
                ensemble.snapshot(p)
                sections = [section.tobytes() for section in ensemble.encode(p, anchor)]
                course.sections += sections
                if number == 2:
                    ensemble.leave(p, anchor, np.zeros_like(anchor))
                ensemble.settle(p, delivered=number != 1)
            course.losses.append(ensemble.step(stream, LR)[0])
            for p, anchor in enumerate(anchors):
                anchors[p] = (anchor * np.float32(1.01)).astype(np.float32)
                ensemble.take_up(p, how, anchor, anchors[p])
        others = [anchor * np.float32(0.9) for anchor in anchors]
        course.evaluation = ensemble.evaluate(others, batches(2, seed=9) + batches(1, sequences=1))
        course.losses.append(ensemble.step(stream, LR)[0])
        ensemble.snapshot(0)
        ensemble.snapshot(1)
        ensemble.forget(1)
        course.tensors, course.plain = ensemble.state()
        ensemble.end()
    course.weights = weights_of(trainer)
    return course


def all_rounds(sites: Sequence[Site]) -> list[Course]:
    return [rounds(site) for site in sites]


def test_two_ranks_contribute_the_bytes_of_one_process_however_they_share_its_work() -> None:
    alone = []
    for number, codec in enumerate(get_args(UploadCodec)):
        inner = {"optimizer": ("adamw", "muon")[number % 2], "clip_norm": 0.05, "weight_decay": 0.1}
        align = {"align": get_args(Rule)[number % 3], "overlap_steps": 2}
        alone.append(Site(run_of(inner=inner, wire={"upload": codec}, rounds=align), micro_batch=4))
    sites = [replace(site, groups=PAIR, parallel="fsdp") for site in alone]
    sites += [replace(site, groups=PAIR) for site in alone[:3]] + [replace(site, groups=TWO) for site in alone[:3]]
    head, other = run_ranks(2, all_rounds, sites)
    single = all_rounds(alone)
    # (Of two halves of a batch the gradients' sum is the same, whoever has them.)
    for site, ours, theirs in zip(sites, head, single + single[:3] * 2, strict=True):
        told = (
            f"{site.groups} {site.parallel} {site.run.inner.optimizer} {site.run.wire.upload} {site.run.rounds.align}"
        )
        assert len(set(theirs.losses)) == len(theirs.losses)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-6), told
        assert ours.sections == theirs.sections, told
        assert same(ours.tensors, theirs.tensors), told
        assert ours.plain == theirs.plain, told
        assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-6), told
        assert sorted(name for name in ours.tensors if "." in name and name.split(".")[1].isdigit()) == [
            "residual.0",
            "residual.1",
            "snapshot.0",
        ]
    assert all(same(ours.weights, theirs.weights) for ours, theirs in zip(head, other, strict=True))


# ---- gradients


def note_gradients(trainer: Trainer) -> list[Named]:
    """What the optimizer is given in each step, whole."""
    seen, step = [], trainer.optimizer.step

    def noted() -> None:
        seen.append({name: gathered(p.grad).clone() for name, p in trainer.parameters.items() if p.grad is not None})
        step()

    trainer.optimizer.step = noted  # type: ignore[method-assign]
    return seen


def given() -> list[Any]:
    """Batches as large as usual, and of fewer sequences than there are ranks and passes."""
    return batches(2) + batches(1, sequences=5, seed=1) + batches(1, sequences=1, seed=2) + batches(1, seed=3)


def gradients_of(sites: Sequence[Site]) -> list[tuple[list[Named], Named, list[tuple[float, int]]]]:
    """Of each site its gradients, its weights after these steps, and the losses and tokens that it told."""
    found = []
    for site in sites:
        trainer = trainer_of(site)
        gradients, told = note_gradients(trainer), []
        if (ensemble := begun(trainer, site)) is not None:
            stream = Stream(given())
            told = [ensemble.step(stream, LR)[:2] for _ in given()]
            ensemble.end()
        found.append((gradients, weights_of(trainer), told))
    return found


def on_paper() -> tuple[list[Named], Named, list[tuple[float, int]]]:
    """The same with the loss over the whole batch, and nothing of ours."""
    model, task = build_model(Tiny(), 0), Tiny()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    gradients, told = [], []
    for batch in given():
        optimizer.zero_grad()
        loss, tokens = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        told.append((float(loss.detach()), tokens))
    return gradients, {name: p.detach().clone() for name, p in model.named_parameters()}, told


THREE_RANKS = [
    Site(run_of(inner=PLAIN), TWO_AND_ONE, speeds=(1.0, 3.0)),
    Site(run_of(inner=PLAIN), TWO_AND_ONE, "fsdp", micro_batch=2, speeds=(3.0, 1.0)),
    Site(run_of(inner=PLAIN), ((0,), (1, 2)), micro_batch=1),
    Site(run_of(inner=PLAIN), ((0, 1, 2),), "fsdp", micro_batch=2),
]
FOUR_RANKS = [
    Site(run_of(inner=PLAIN), TWO_AND_TWO, "fsdp", speeds=(5.0, 3.0)),
    Site(run_of(inner=PLAIN), TWO_AND_TWO, ("ddp", "fsdp"), micro_batch=3, speeds=(1.0, 9.0)),
    Site(run_of(inner=PLAIN), TWO_AND_TWO, ("fsdp", "ddp"), micro_batch=1, speeds=(1.0, 30.0)),
    Site(run_of(inner=PLAIN), FOUR, micro_batch=2),
]


@pytest.mark.parametrize("sites", [THREE_RANKS, FOUR_RANKS], ids=["three", "four"])
def test_the_gradient_of_all_ranks_is_that_of_the_batch_by_tokens(sites: list[Site]) -> None:
    gradients, weights, told = on_paper()
    for rank in run_ranks(len(sites[0].groups[0]) + sum(map(len, sites[0].groups[1:])), gradients_of, sites):
        for site, (ours, after, said) in zip(sites, rank, strict=True):
            assert len(ours) == len(gradients)
            assert all(near(mine, theirs) for mine, theirs in zip(ours, gradients, strict=True)), site
            assert near(after, weights), site
            assert not said or np.allclose(said, told, rtol=1e-6), site
    # (At the head, which knows what it gave.)
    assert said == []


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_micro_batches_change_nothing_but_rounding(micro_batch: int) -> None:
    gradients, weights, told = on_paper()
    ((ours, after, said),) = gradients_of([Site(run_of(inner=PLAIN), micro_batch=micro_batch)])
    assert all(near(mine, theirs) for mine, theirs in zip(ours, gradients, strict=True))
    assert near(after, weights)
    assert np.allclose(said, told, rtol=1e-6)
    assert [tokens for _, tokens in said] == [tokens for _, tokens in told]


# ---- checkpoints on other ranks


def continued(cases: Sequence[tuple[Site, Named, dict[str, Any]]]) -> list[Any]:
    """Of each site its state as it was loaded, what it encodes, and its state after two more steps."""
    found: list[Any] = []
    for site, tensors, plain in cases:
        trainer = trainer_of(site)
        if (ensemble := begun(trainer, site)) is not None:
            ensemble.step(Stream(batches(1, seed=7)), LR)  # what it has is another's
            ensemble.snapshot(1)
            ensemble.load_state(tensors, plain)
            loaded = ensemble.state()
            sections = [section.tobytes() for section in ensemble.encode(0, anchors_of(site)[0])]
            stream = Stream(batches(2, seed=5))
            for _ in range(2):
                ensemble.step(stream, LR)
            found.append((loaded, sections, ensemble.state()))
            ensemble.end()
        if not trainer.team.alone:
            trainer.team.tell_all({})  # (The head is not to be ahead of the others by a site.)
    return found


def test_a_checkpoint_is_continued_on_any_ranks_from_its_very_bits() -> None:
    run, muon = (run_of(inner={"optimizer": name, "clip_norm": 0.5}) for name in ("adamw", "muon"))
    before = {name: rounds(Site(each, micro_batch=4)) for name, each in (("adamw", run), ("muon", muon))}

    def case(site: Site) -> Any:
        course = before[site.run.inner.optimizer]
        return site, course.tensors, course.plain

    sites = [
        Site(run, FOUR, "fsdp"),
        Site(run, TWO_AND_TWO, ("fsdp", "ddp")),
        Site(muon, TWO_AND_TWO, ("ddp", "fsdp"), micro_batch=1),
    ]
    changed = Site(muon, TWO_AND_TWO, ("fsdp", "ddp"))
    weights = before["adamw"].tensors, before["adamw"].plain
    *ranks, anew = run_ranks(4, continued, [*map(case, sites), (changed, *weights)])[0]
    for site, (loaded, sections, after) in zip(sites, ranks, strict=True):
        _, tensors, plain = case(site)
        assert same(loaded[0], tensors), site
        assert loaded[1] == plain, site
        # … as on one, to which it can go back.
        alone, again = continued([case(Site(site.run, micro_batch=2)), (Site(site.run), *after)])
        assert sections == alone[1], site
        assert near(after[0], alone[2][0], 1e-4), site
        assert same(again[0][0], after[0]), site
        assert again[0][1] == after[1], site
    # Where the optimizer is another it begins anew, at all ranks alike.
    (loaded, plain), _, after = anew
    assert same(loaded, {name: each for name, each in weights[0].items() if not name.startswith("optimizer.")})
    assert set(plain["rules"].values()) == {"Muon", "AdamW"}
    assert any(name.startswith("optimizer.") for name in after[0])


def test_a_model_in_half_precision_is_shared_too() -> None:
    (alone,) = all_rounds([Site(run_of(), task=Halved(), micro_batch=4)])
    head, _ = run_ranks(2, all_rounds, [Site(run_of(), TWO, task=Halved()), Site(run_of(), PAIR, task=Halved())])
    for ours in head:
        assert {str(tensor.dtype) for name, tensor in ours.tensors.items() if name.startswith("model.")} == {
            "torch.bfloat16"
        }
        assert ours.tensors.keys() == alone.tensors.keys()
        assert ours.losses == pytest.approx(alone.losses, rel=0.02)


class Halved(Tiny):
    def build_model(self) -> nn.Module:
        return super().build_model().to(torch.bfloat16)


# ---- evaluation in place


def evaluated(site: Site) -> Any:
    trainer = trainer_of(site)
    if (ensemble := begun(trainer, site)) is None:
        return weights_of(trainer)
    ensemble.step(Stream(batches(1)), LR)
    before, _ = ensemble.state()
    published = [anchor * np.float32(0.9) for anchor in anchors_of(site)]
    loss = ensemble.evaluate(published, held_out())
    nothing = ensemble.evaluate(published, [])
    with pytest.raises(OSError, match="gone"):
        ensemble.evaluate(published, broken())
    after, _ = ensemble.state()
    training = trainer.model.training
    ensemble.end()
    weights_of(trainer)
    return loss, nothing, same(before, after), training


def held_out() -> list[Any]:
    return batches(2, seed=3) + batches(1, sequences=3, seed=4)


def broken() -> Iterator[Any]:
    yield from held_out()
    raise OSError("the file is gone")


@pytest.mark.parametrize(("groups", "parallel"), [(TWO_AND_ONE, "ddp"), (((0, 1, 2),), "fsdp")])
def test_evaluation_in_place_is_a_single_process_s_and_leaves_every_bit(groups: Any, parallel: Any) -> None:
    site = Site(run_of(), groups, parallel, micro_batch=2)
    loss, nothing, untouched, training = run_ranks(3, evaluated, site)[0]
    model = build_model(Tiny(), 1)
    load_flat(model, layout_of(site), (anchor * np.float32(0.9) for anchor in anchors_of(site)))
    assert loss == pytest.approx(evaluate(Tiny(), model, held_out(), torch.device("cpu")), rel=1e-6)
    assert nothing is None
    assert untouched
    assert training
