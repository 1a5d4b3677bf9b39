"""Two processes that share a model, as fully_shard cuts it, against one that has it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW

from shared.config import InnerTable
from site_agent.training.gradients import clip
from site_agent.training.muon import Muon
from site_agent.training.optimizer_state import pack_optimizer, unpack_optimizer
from site_agent.training.optimizers import InnerOptimizer, build_optimizer, fastest, hidden_matrices, kernel
from tests.support.ranks import run_ranks

Weights = dict[str, Tensor]
STEPS = 6


class Net(nn.Module):
    """Matrices tall, wide, square, of rows that two ranks cannot share evenly, and of fewer rows than ranks; and one of
    each kind of parameter that is not for Muon."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 7)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 7)) for _ in range(2)
        )
        self.square = nn.Linear(7, 7)
        self.row = nn.Linear(7, 1)
        self.head = nn.Linear(7, 19, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (B, 7)
        for layer in self.layers:
            x = x + layer(x)
        x = self.square(x) * self.row(x)
        logits: Tensor = self.head(x)
        return logits


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def sharded(partly: bool = False) -> nn.Module:
    """The same net, cut among all ranks; or only its layers."""
    model = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return model if partly else fully_shard(model, mesh=mesh)


def give_gradients(model: nn.Module, seed: int) -> None:
    """The same whatever the model's cut."""
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        whole = torch.randn(tuple(p.shape), generator=random) * 10.0 ** (seed % 5 - 3)
        p.grad = like(whole, p)


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> Weights:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def train(model: nn.Module, name: str, steps: Sequence[int] = range(STEPS)) -> tuple[InnerOptimizer, list[float]]:
    optimizer = build_optimizer(InnerTable(optimizer=name, lr=1e-2), model)  # type: ignore[arg-type]
    return optimizer, step(model, optimizer, steps)


def step(model: nn.Module, optimizer: InnerOptimizer, steps: Sequence[int]) -> list[float]:
    """Norms of the gradients."""
    norms = []
    cut = any(isinstance(p, DTensor) for p in model.parameters())
    for seed in steps:
        give_gradients(model, seed)
        norms.append(clip(model.parameters(), 1.0, 0.5, dist.group.WORLD if cut else None)[0])
        optimizer.step()
    return norms


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what the ranks do


def trained_sharded(name: str, partly: bool) -> tuple[Weights, list[float]]:
    model = sharded(partly)
    _, norms = train(model, name)
    return whole_weights(model), norms


def gathered(name: str) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """A sharded optimizer's state as the first rank is given it, and what it is made of."""
    model = sharded()
    optimizer, _ = train(model, name, range(3))
    kinds = {type(v).__name__ for torch_s in optimizer.optimizers for s in torch_s.state.values() for v in s.values()}
    tensors, plain = pack_optimizer(optimizer, wanted=dist.get_rank() == 0)
    return tensors, plain, sorted(kinds)


def resumed(name: str, weights: Weights, tensors: dict[str, Tensor], plain: dict[str, Any]) -> tuple[Weights, int, int]:
    """Weights after the last steps, from a checkpoint of the whole; the state's bytes here, and of the whole."""
    model = sharded()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            p.copy_(like(weights[parameter_name], p))
    optimizer = build_optimizer(InnerTable(optimizer=name, lr=1e-2), model)  # type: ignore[arg-type]
    unpack_optimizer(optimizer, tensors, plain)
    kept = [v for torch_s in optimizer.optimizers for s in torch_s.state.values() for v in s.values()]
    local = [v.to_local() for v in kept if isinstance(v, DTensor)]
    step(model, optimizer, range(3, STEPS))
    return (
        whole_weights(model),
        sum(v.untyped_storage().nbytes() for v in local),
        sum(v.nbytes for v in tensors.values()),
    )


def trained_by_muon(placements: list[Any], shape: tuple[int, ...]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", shape)
    matrices = muon_matrices()
    ours = [nn.Parameter(distribute_tensor(m, mesh, placements, src_data_rank=None)) for m in matrices]
    muon = Muon(ours, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        for p, gradient in zip(ours, muon_gradients(seed), strict=True):
            p.grad = like(gradient, p)
        muon.step()
    return [p.full_tensor().detach() for p in ours]


def muon_matrices() -> list[Tensor]:
    return muon_gradients(99)


def muon_gradients(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=random) for s in [(5, 9), (9, 5), (1, 6), (6, 1), (4, 4), (3, 2), (16, 12)]]


def orthogonalised_here() -> int:
    """How many matrices this rank makes orthogonal in a step."""
    from site_agent.training import muon

    done = []
    orthogonal: Callable[[Tensor], Tensor] = muon.orthogonal
    muon.orthogonal = lambda matrix: done.append(1) or orthogonal(matrix)  # type: ignore[func-returns-value,assignment]
    train(sharded(), "muon", [0])
    return len(done)


def learned() -> tuple[float, float]:
    """The loss before and after a few steps of real training, with gradients by fully_shard."""
    model = sharded()
    optimizer = build_optimizer(InnerTable(optimizer="muon", lr=2e-2, weight_decay=0.0), model)
    tokens = torch.arange(19)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        clip(model.parameters(), 1.0, group=dist.group.WORLD)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def kernels() -> list[dict[str, bool]]:
    mesh = init_device_mesh("cpu", (2,))
    like_this = next(sharded().parameters())
    return [
        kernel(AdamW, [like_this]),
        fastest(AdamW, torch.device("cpu"), torch.float32, mesh),
        fastest(SGD, torch.device("cpu"), torch.float32, mesh),
    ]


def mixed_clip() -> tuple[float, bool, bool, str]:
    """Gradients cut and whole: the norm, whether they are clipped as those of one process, and what is said of a
    gradient that only the other rank knows not to be finite, and without a group."""
    model, reference = sharded(partly=True), net()
    give_gradients(model, 3)
    give_gradients(reference, 3)
    norm, _ = clip(model.parameters(), 0.5, group=dist.group.WORLD)
    assert norm == clip(reference.parameters(), 0.5)[0]
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    alike = all(torch.equal(like(b.grad, a), a.grad) for a, b in pairs if b.grad is not None and a.grad is not None)
    try:
        clip(model.parameters(), 0.5)
    except ValueError as error:
        said = str(error)
    if dist.get_rank() == 1:
        part = model.layers[0][0].weight.grad.to_local()  # type: ignore[index,union-attr]
        part[0, 0] = float("nan")
    return norm, alike, clip(model.parameters(), 0.5, group=dist.group.WORLD)[1], said


# ---- what must come out


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_two_processes_end_in_the_bits_of_one(name: str, partly: bool) -> None:
    alone = net()
    _, norms = train(alone, name)
    assert hidden_matrices(alone) >= {"square.weight"}
    for weights, their_norms in run_ranks(2, trained_sharded, name, partly):
        assert same(weights, whole_weights(alone))
        assert their_norms == norms


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_that_of_one_process_and_given_to_who_wants_it(name: str) -> None:
    alone = net()
    tensors, plain = pack_optimizer(train(alone, name, range(3))[0])
    (theirs, their_plain, kinds), (nothing, _, _) = run_ranks(2, gathered, name)
    assert nothing == {}
    assert their_plain == plain
    assert same(theirs, tensors)
    assert "DTensor" in kinds


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_processes_go_on_from_the_state_of_one_and_keep_their_parts(name: str) -> None:
    alone = net()
    optimizer, _ = train(alone, name, range(3))
    tensors, plain = pack_optimizer(optimizer)
    weights = whole_weights(alone)
    step(alone, optimizer, range(3, STEPS))
    for result, here, all_of_it in run_ranks(2, resumed, name, weights, tensors, plain):
        assert same(result, whole_weights(alone))
        assert here < 0.65 * all_of_it


@pytest.mark.parametrize(
    ("placements", "shape"),
    [([Shard(0)], (3,)), ([Replicate(), Shard(0)], (2, 2)), ([Shard(1)], (2,)), ([Replicate()], (2,))],
)
def test_muon_is_right_however_its_matrices_are_cut(placements: list[Any], shape: tuple[int, ...]) -> None:
    alone = [nn.Parameter(matrix) for matrix in muon_matrices()]
    reference = torch.optim.Muon(alone, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        for p, gradient in zip(alone, muon_gradients(seed), strict=True):
            p.grad = gradient
        reference.step()
    for result in run_ranks(int(torch.tensor(shape).prod()), trained_by_muon, placements, shape):
        assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))


def test_each_matrix_is_made_orthogonal_once() -> None:
    counts = run_ranks(2, orthogonalised_here)
    assert sum(counts) == len(hidden_matrices(net())) == 5
    assert max(counts) == 3


def test_a_sharded_model_learns_with_muon() -> None:
    for first, last in run_ranks(2, learned):
        assert last < 0.8 * first


def test_kernels_are_those_that_dtensors_have() -> None:
    for chosen in run_ranks(2, kernels):
        assert chosen == [{"fused": False, "foreach": True}, {"fused": True}, {"foreach": True}]


def test_gradients_cut_and_whole_are_clipped_as_in_one_process() -> None:
    first, second = run_ranks(2, mixed_clip)
    assert first == second
    assert first[1:3] == (True, False)
    assert "no group" in first[3]
