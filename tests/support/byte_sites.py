"""A site of several ranks on the CPU that trains the built-in task, for tests of what is around its trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shared.config import InnerTable, RoundsTable, RunConfig, RunTable, TaskTable, WireTable
from shared.fragments import Layout, TensorSpec, build_layout
from shared.task import build_model
from site_agent.core.mixture import Group
from site_agent.tasks.byte_lm import ByteLM
from site_agent.training.ensemble import Ensemble, serve
from site_agent.training.forms import Computing
from site_agent.training.seats import take_seat
from site_agent.training.team import ALONE, Team
from site_agent.training.trainer import Trainer

CONTEXT, BATCH = 16, 8
TASK = {"context": CONTEXT, "width": 32, "layers": 2, "heads": 2}


def run_of(**tables: Any) -> RunConfig:
    inner = {"lr": 1e-2, "batch_size": BATCH, **tables.get("inner", {})}
    return RunConfig(
        run=RunTable(name="r", tokens=10**6),
        task=TaskTable(use="byte-lm"),
        inner=InnerTable(**inner),
        rounds=RoundsTable(**{"fragments": 2, **tables.get("rounds", {})}),
        wire=WireTable(**tables.get("wire", {})),
    )


def layout_of(run: RunConfig) -> Layout:
    model = ByteLM(TASK).build_model()
    specs = [TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return build_layout(specs, run.rounds.fragments, "balanced")


class Batches:
    """Batches of random bytes, always the same."""

    def __init__(self, sequences: int = BATCH) -> None:
        self._random, self._sequences = torch.Generator().manual_seed(0), sequences

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        return torch.randint(256, (self._sequences, CONTEXT + 1), generator=self._random)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """(Nobody asks for it.)"""


def trainer_of(
    run: RunConfig,
    groups: Sequence[Sequence[int]] = (),
    parallel: Any = "ddp",
    how: Computing | None = None,
) -> Trainer:
    """This rank's trainer, on the CPU, of a site with these groups of ranks; without any it is alone."""
    team = Team(dist.group.WORLD) if groups else ALONE
    seat = take_seat(team, [Group(f"g{n}", tuple(ranks)) for n, ranks in enumerate(groups)], "gloo")
    task, cpu = ByteLM(TASK), torch.device("cpu")
    model = build_model(task, run.run.seed)
    return Trainer(task, model, layout_of(run), run, cpu, how=how or Computing(), parallel=parallel, seat=seat)


def head_or_serve(trainer: Trainer, micro_batch: int = 0, speeds: Sequence[float] = ()) -> Ensemble | None:
    """The ensemble, at the head; the others serve until the head ends it, and get None."""
    if trainer.team.head:
        return Ensemble(trainer, micro_batch, speeds)
    serve(trainer)
    return None
