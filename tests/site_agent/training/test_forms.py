"""How a group holds its model, and how a pass is computed: none of it is to change what is learned."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from shared.task import build_model
from site_agent.training.forms import Computing, Form, Replicated, assign, blocks_of, gathered
from tests.support.ranks import run_ranks
from tests.support.sites import (
    Block,
    Net,
    Site,
    Stream,
    Tiny,
    batches,
    begun,
    run_of,
    trainer_of,
    weights_of,
)

CPU = torch.device("cpu")
Named = dict[str, Tensor]
LR = 0.1
PLAIN = run_of(inner={"optimizer": "sgd", "clip_norm": 0.0, "weight_decay": 0.0})
RECOMPUTE = Computing(recompute=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def form(how: Computing = Computing()) -> Form:  # noqa: B008 (it is frozen)
    return Form(Tiny(), build_model(Tiny(), 0), CPU, how)


def trained(sites: Sequence[Site]) -> list[tuple[list[float], Named]]:
    """Of each site its losses in three steps and its weights after them."""
    found = []
    for site in sites:
        trainer, losses = trainer_of(site), []
        if (ensemble := begun(trainer, site)) is not None:
            stream = Stream(batches(3))
            losses = [ensemble.step(stream, LR)[0] for _ in range(3)]
            ensemble.end()
        found.append((losses, weights_of(trainer)))
    return found


def moved(weights: Named) -> Named:
    start = dict(build_model(Tiny(), 0).named_parameters())
    return {name: each - start[name].detach() for name, each in weights.items()}


def apart(ours: Named, theirs: Named) -> float:
    """The largest distance between what two trainings did to a tensor, as a share of it."""
    ours, theirs = moved(ours), moved(theirs)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


# ---- layers


def test_layers_are_what_is_in_the_outermost_lists() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    model = nn.ModuleDict({"inner": nn.Sequential(nn.ModuleList([Expert(), Expert()])), "head": nn.Linear(2, 2)})
    assert [type(block) for block in blocks_of(model)] == [Expert, Expert]
    assert [type(block) for block in blocks_of(Net())] == [Block, Block]
    assert blocks_of(nn.Linear(2, 2)) == []
    # What cannot be called cannot be sharded, compiled or computed again.
    nested = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Tanh()])}), nn.Identity()])
    assert [type(block) for block in blocks_of(nn.Sequential(nested))] == [nn.Linear, nn.Tanh, nn.Identity]


# ---- activations that are computed again


def test_recomputed_activations_change_no_bit_and_are_not_kept() -> None:
    kept, again = form(), form(RECOMPUTE)
    runs: list[int] = []
    for each in (kept, again):
        each.model.layers[0].up.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr, index]
        each.backward(batches(1)[0], weighs=True, last=True)
        runs.append(0)
    assert runs == [1, 0, 1, 1, 0]
    ours, theirs = again.model.named_parameters(), dict(kept.model.named_parameters())
    assert all(torch.equal(p.grad, theirs[name].grad) for name, p in ours)  # type: ignore[arg-type]
    runs.clear()
    again.forward(batches(1)[0])
    assert runs == [1]


def test_a_copy_of_a_model_that_recomputes_has_its_own_weights() -> None:
    model = form(RECOMPUTE).model
    tokens = batches(1)[0]["tokens"]
    before = model(tokens)
    evaluated = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(evaluated(tokens), before)
    assert not model(tokens).any()
    evaluated(tokens).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in evaluated.parameters())


# ---- shards, replicas and precision


def sharded() -> Any:
    """What this rank has of a parameter before and after it was set, and all of it."""
    trainer = trainer_of(Site(groups=((0, 1, 2),), parallel="fsdp"))
    found = []
    for name in ("layers.0.up.weight", "head.weight", "head.bias"):
        parameter = trainer.parameters[name]
        assert isinstance(parameter, DTensor)
        full = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
        assign(parameter, full)
        found.append((torch.equal(gathered(parameter.detach()), full), parameter.to_local().shape[0]))
    return found


def test_a_shard_is_set_from_the_whole_and_the_whole_had_from_shards() -> None:
    ranks = run_ranks(3, sharded)
    assert all(right for rank in ranks for right, _ in rank)
    assert [[rows for _, rows in rank] for rank in ranks] == [[8, 4, 4], [8, 4, 4], [8, 3, 3]]


def tried_alone() -> list[Any]:
    """Rank 1 tries a pass of which rank 0 knows nothing; then both train."""
    site = Site(PLAIN, ((0, 1),))
    trainer = trainer_of(site)
    if trainer.team.rank == 1:
        assert trainer.fits(batches(1)[0])
    ensemble = begun(trainer, site)
    if ensemble is not None:
        ensemble.step(Stream(batches(1)), LR)
        ensemble.end()
    return [weights_of(trainer)]


PRECISIONS = [Site(PLAIN, how=Computing(precision)) for precision in ("bf16", "fp16")]


def test_groups_train_as_one_process_does_in_each_precision() -> None:
    alone = trained([Site(PLAIN), *PRECISIONS])
    sites = [replace(site, groups=((0, 1),), parallel=form) for site in PRECISIONS for form in ("ddp", "fsdp")]
    sites.append(Site(PLAIN, ((0, 1),), "fsdp", RECOMPUTE))
    head, other = run_ranks(2, trained, sites)
    exact, half = alone[0], (alone[1], alone[1], alone[2], alone[2])
    for ours, theirs, single in zip(head, other, half, strict=False):
        # In half precision, and yet where one process would get to, and all ranks in the same place.
        assert 1e-5 < apart(ours[1], exact[1]) < 0.05
        assert 1e-5 < apart(single[1], exact[1]) < 0.05
        assert ours[0] == pytest.approx(exact[0], rel=0.01)
        assert all(torch.equal(ours[1][name], theirs[1][name]) for name in exact[1])
    assert apart(head[-1][1], exact[1]) < 1e-5
    assert not other[0][0]


def sums() -> list[int]:
    """How often replicas sum gradients in a step of one pass, and of four."""
    counts = []
    for micro_batch in (0, 1):
        site = Site(PLAIN, ((0, 1),), micro_batch=micro_batch)
        trainer, calls = trainer_of(site), []
        assert isinstance(trainer.form, Replicated)

        # (A hook may have no annotations that are strings.)
        counted = lambda group, bucket, calls=calls: (calls.append(1), allreduce_hook(group, bucket))[1]  # noqa: E731
        trainer.form._wrapped.register_comm_hook(dist.group.WORLD, counted)
        if (ensemble := begun(trainer, site)) is not None:
            ensemble.step(Stream(batches(1)), LR)
            ensemble.end()
        counts.append(len(calls))
    return counts


def test_replicas_sum_their_gradients_once_a_step() -> None:
    once, four = run_ranks(2, sums)[0]
    assert once == four > 0


def test_a_pass_that_one_rank_tries_alone_is_its_own() -> None:
    ((ours,), (theirs,)) = run_ranks(2, tried_alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- compiled layers


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.matrix(x))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Cell(), nn.Sequential(nn.Linear(4, 4))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Small:
    """Two layers that are soon compiled, of which one is torch's own."""

    def build_model(self) -> nn.Module:
        return Cells()

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch).square().mean(), len(batch)


def small(compiles: bool, recompute: bool = False, groups: Any = (), parallel: Any = "ddp") -> Site:
    run = PLAIN.model_copy(update={"rounds": run_of(rounds={"fragments": 1}).rounds})
    return Site(run, groups, parallel, Computing(compile=compiles, recompute=recompute), task=Small())


def trained_small(site: Site) -> tuple[list[float], nn.Module]:
    trainer = trainer_of(site)
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    if (ensemble := begun(trainer, site)) is not None:
        losses = [ensemble.step(Stream([batch]), LR)[0] for _ in range(3)]
        ensemble.end()
    return losses, trainer.model


def compiled(sites: Sequence[Site]) -> list[tuple[list[float], int]]:
    """The losses of each site, and how many graphs were compiled: by a compiler that writes no code, for torch's takes
    half a minute to write the first."""
    compiles = nn.Module.compile
    graphs: list[Any] = []

    def noting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: compiles(self, backend=noting))
        found = []
        for site in sites:
            torch._dynamo.reset()
            graphs.clear()
            found.append((trained_small(site)[0], len(graphs)))
    return found


def test_every_layer_is_compiled_in_whatever_form_the_model_is() -> None:
    sites = [small(True, again, ((0, 1),), form) for form in ("ddp", "fsdp") for again in (False, True)]
    plain, *ours = run_ranks(2, compiled, [small(False), small(True), small(True, recompute=True), *sites])[0]
    assert plain[1] == 0
    assert plain[0][2] < plain[0][0]
    for losses, graphs in ours:
        assert losses == pytest.approx(plain[0], rel=1e-5)
        assert graphs >= 2


def copied() -> tuple[bool, bool, bool]:
    """Whether a copy of a compiled model gives what the model did, after whose weights have gone, and these theirs."""
    with pytest.MonkeyPatch.context() as patch:
        compiles = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self: compiles(self, backend="eager"))
        model = Form(Small(), build_model(Small(), 0), CPU, Computing(compile=True, recompute=True)).model
    batch = torch.ones(1, 4)
    before, _ = Small().loss(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return bool(Small().loss(other, batch)[0] == before), bool(before != 0), bool(Small().loss(model, batch)[0] == 0)


def test_a_copy_of_a_compiled_model_has_its_own_weights() -> None:
    # (Elsewhere than here, where warnings of torch's compiler would be errors.)
    assert run_ranks(1, copied) == [(True, True, True)]
