"""A site of several ranks on the CPU, and what it comes to, for tests of what is distributed within a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config import InnerTable, OuterTable, RoundsTable, RunConfig, RunTable, TaskTable, WireTable
from shared.fragments import CHUNK_ELEMENTS, F32, Layout, TensorSpec, build_layout
from shared.task import build_model
from site_agent.core.mixture import Group
from site_agent.tasks.byte_lm import ByteLM
from site_agent.training.ensemble import Ensemble, serve
from site_agent.training.forms import Computing, Parallel, gathered
from site_agent.training.seats import take_seat
from site_agent.training.team import ALONE, Team
from site_agent.training.trainer import Trainer

CONTEXT, BATCH, VOCABULARY, WIDTH = 6, 8, 11, 8
TABLE = CHUNK_ELEMENTS + 5000
"""A tensor of two chunks, which may be two ranks'."""


LM = {"context": 16, "width": 32, "layers": 2, "heads": 2}
"""Options of the built-in task, as small as will do."""


def run_of(use: str = "tiny.py:Tiny", **tables: Any) -> RunConfig:
    inner = {"lr": 1e-2, "batch_size": BATCH, **tables.get("inner", {})}
    return RunConfig(
        run=RunTable(name="r", tokens=10**6),
        task=TaskTable(use=use),
        inner=InnerTable(**inner),
        outer=OuterTable(optimizer="sgd"),
        rounds=RoundsTable(**{"fragments": 2, **tables.get("rounds", {})}),
        wire=WireTable(**tables.get("wire", {})),
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Layers, an embedding, a head, and a vector of two chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.table = nn.Parameter(0.1 * torch.randn(TABLE))
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        last = VOCABULARY - 1
        x = self.embedding(tokens) + self.table[tokens * (TABLE - 1) // last, None]  # (B, T, C)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class Tiny:
    """Next-token prediction where `mask` is set, so that sequences count different numbers of tokens; `factor` is what
    a sequence's loss is multiplied by. The mean over no token is not a number, as cross entropy's is."""

    def build_model(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        logits = model(batch["tokens"][:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2).float(), batch["tokens"][:, 1:], reduction="none")  # (B, T)
        kept = (losses * batch["factor"][:, None])[batch["mask"]]
        return kept.mean(), int(batch["mask"].sum())


def batches(count: int, sequences: int = BATCH, seed: int = 0) -> list[Any]:
    """Batches of which no sequence counts as many tokens as another, and one none."""
    random, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (sequences, CONTEXT + 1), generator=random)
        shares = torch.linspace(0.0, 1.2, sequences)[torch.randperm(sequences, generator=random)]
        mask = torch.rand(sequences, CONTEXT, generator=random) < shares[:, None]
        mask[0, 0] |= not mask.any()
        made.append({"tokens": tokens, "mask": mask, "factor": torch.ones(sequences)})
    return made


class Stream:
    """These batches, as a stream whose state nobody asks for."""

    def __init__(self, given: Sequence[Any]) -> None:
        self._given = iter(given)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._given)

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Site:
    """A site's run, its groups of ranks (none: it is alone), how all of them or each hold the model, how they compute,
    the most sequences of a pass, and the groups' speeds."""

    run: RunConfig = field(default_factory=run_of)
    groups: tuple[tuple[int, ...], ...] = ()
    parallel: Parallel | tuple[Parallel, ...] = "ddp"
    how: Computing = Computing()  # noqa: RUF009 (it is frozen)
    micro_batch: int = 0
    speeds: tuple[float, ...] = ()
    task: Any = field(default_factory=Tiny)


def lm_site(**more: Any) -> Site:
    """A site that trains the built-in task."""
    return Site(run=run_of("byte-lm"), task=ByteLM(LM), **more)


def layout_of(site: Site) -> Layout:
    model = build_model(site.task, site.run.run.seed)
    specs = [TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return build_layout(specs, site.run.rounds.fragments, "balanced")


def anchors_of(site: Site) -> list[F32]:
    """The initial weights, a flat vector of each fragment."""
    model = build_model(site.task, site.run.run.seed)
    arrays = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    return [fragment.flatten(arrays) for fragment in layout_of(site).fragments]


def trainer_of(site: Site) -> Trainer:
    """This rank's trainer."""
    team = Team(dist.group.WORLD) if site.groups else ALONE
    seat = take_seat(team, [Group(f"g{n}", tuple(ranks)) for n, ranks in enumerate(site.groups)], "gloo")
    parallel = site.parallel if isinstance(site.parallel, str) else site.parallel[seat.mine]
    model, layout = build_model(site.task, site.run.run.seed), layout_of(site)
    return Trainer(site.task, model, layout, site.run, torch.device("cpu"), how=site.how, parallel=parallel, seat=seat)


def head_or_serve(trainer: Trainer, site: Site) -> Ensemble | None:
    """The ensemble, at the head; the others serve until the head ends it, and get None."""
    if trainer.team.head:
        return Ensemble(trainer, site.micro_batch, site.speeds)
    serve(trainer)
    return None


def begun(trainer: Trainer, site: Site) -> Ensemble | None:
    """The same with all fragments begun from the initial weights."""
    ensemble = head_or_serve(trainer, site)
    if ensemble is not None:
        for p, anchor in enumerate(anchors_of(site)):
            ensemble.begin(p, anchor)
    return ensemble


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Whole, at every rank; all of its group ask for them."""
    return {name: gathered(p.detach()).clone() for name, p in trainer.parameters.items()}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether the bits of all are."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
