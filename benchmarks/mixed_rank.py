"""A process of `benchmarks.mixed`: one rank of a site, with the parts that `isthmus site run` has of it.

`python -m benchmarks.mixed_rank`, in a directory with a site.toml. The head reads orders, a JSON object a line, from
its standard input, and answers each with one; the other ranks do what the head says. They end with the input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from shared.config import RunConfig, SiteConfig, load_site, parse
from shared.fragments import F32, Layout, TensorSpec, build_layout
from shared.task import BatchStream, Shard, build_model, fingerprint_of
from site_agent.crew import Crew, disband, enlist, follow, task_of
from site_agent.survey import recruit, survey
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import Stepped


class Clock:
    """Seconds that are spent in what it watches, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Counts the seconds of `owner.method(...)` from now on."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - began

        setattr(owner, method, timed)


class Head:
    """The orders, by their names. `prepare` comes first."""

    def __init__(self, crew: Crew, config: SiteConfig) -> None:
        self.crew, self.config = crew, config
        self.run: RunConfig
        self.ensemble: Ensemble
        self.stream: BatchStream
        self.layout: Layout
        self.begun: list[F32] = []
        self.clock = Clock()
        self.groups = np.zeros(0)

    def prepare(self, run: dict[str, Any]) -> dict[str, Any]:
        """All ranks with the run's model as the run begins, and the data from its beginning."""
        self.run = parse(RunConfig, run, "the benchmark's run")
        task = task_of(self.config, self.run)
        model = build_model(task, self.run.run.seed)
        named = dict(model.named_parameters())
        specs = [TensorSpec(name, tuple(parameter.shape)) for name, parameter in named.items()]
        self.layout = build_layout(specs, self.run.rounds.fragments, self.run.rounds.layout)
        arrays = {name: parameter.detach().numpy() for name, parameter in named.items()}
        self.begun = [fragment.flatten(arrays) for fragment in self.layout.fragments]
        values = self.run.model_dump(mode="json", exclude={"store"})
        self.ensemble = recruit(self.crew, self.config, values, self.layout, fingerprint_of(task))
        self.stream = task.train_batches(Shard(0, 1, self.run.run.seed), self.run.inner.batch_size)
        self._watch()
        return {"params": sum(fragment.size for fragment in self.layout.fragments)}

    def _watch(self) -> None:
        trainer, self.clock, self.groups = self.ensemble.trainer, Clock(), np.zeros(len(self.crew.groups))
        self.clock.watch(trainer.team, "everyone", "waiting")
        self.clock.watch(trainer.optimizer, "step", "optimizer")
        if trainer.seat.exchange is not None:
            self.clock.watch(trainer.seat.exchange, "sum", "exchange")
        step = trainer.step

        def noted(*args: Any) -> Stepped:
            stepped = step(*args)
            self.groups += stepped.seconds
            return stepped

        setattr(trainer, "step", noted)  # noqa: B010 (as in Clock: one object's method, for a while)

    def survey(self) -> dict[str, Any]:
        """What a site finds before it trains: the speeds of the groups, the exchange, the verdict."""
        found = survey(self.crew, self.config, self.ensemble, self.stream, self.run)
        verdict = found.verdict
        return {
            "step_seconds": found.step_seconds,
            "exchange_seconds": found.exchange_seconds,
            "mode": verdict.mode if verdict else None,
            "efficiency": verdict.together / verdict.apart if verdict else None,
        }

    def steps(self, steps: int) -> dict[str, Any]:
        """So many steps, which settle what is to be settled."""
        for _ in range(steps):
            self.ensemble.step(self.stream, self.run.inner.lr)
        return {"shares": list(self.ensemble.balance.shares)}

    def train(self, seconds: float, steps: int) -> dict[str, Any]:
        """Whole steps until `seconds` are over, at least `steps`: tokens, seconds, and where a step's went."""
        self.clock.spent.clear()
        self.groups[:] = 0
        began, tokens, taken = time.perf_counter(), 0, 0
        while taken < steps or time.perf_counter() - began < seconds:
            tokens += self.ensemble.step(self.stream, self.run.inner.lr)[1]
            taken += 1
        took = time.perf_counter() - began
        return {
            "tokens": tokens,
            "seconds": took,
            "step_seconds": took / taken,
            "shares": list(self.ensemble.balance.shares),
            "group_seconds": (self.groups / taken).tolist(),
            **{name: self.clock.spent[name] / taken for name in ("waiting", "exchange", "optimizer")},
        }

    def gradients(self, batches: int, file: str, shares: list[int]) -> dict[str, Any]:
        """The gradients of so many batches at the run's first weights, written to `file` as BATCH.NAME. `shares` of the
        groups, where there are several."""
        if len(self.crew.groups) > 1:
            self.ensemble.balance.shares = shares
        found: dict[str, Tensor] = {}
        for number in range(batches):
            self.ensemble.step(self.stream, 0.0)
            for name, parameter in self.ensemble.trainer.parameters.items():
                assert parameter.grad is not None
                found[f"{number}.{name}"] = parameter.grad.clone()
        save_file(found, file)
        return {}

    def exact(self, batches: int, file: str) -> dict[str, Any]:
        """The same in fp64, in one pass and without clipping."""
        task = self.ensemble.trainer.task
        model = build_model(task, self.run.run.seed).double()
        found: dict[str, Tensor] = {}
        for number in range(batches):
            model.zero_grad()
            task.loss(model, next(self.stream))[0].backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                found[f"{number}.{name}"] = parameter.grad.clone()
        save_file(found, file)
        return {}

    def contributions(self, steps: int) -> dict[str, Any]:
        """Digests of all fragments' contributions, twice: the second ones have the error feedback of the first."""
        digests = []
        for _ in range(2):
            self.steps(steps)
            for fragment, anchor in enumerate(self.begun):
                self.ensemble.snapshot(fragment)
                sections = self.ensemble.encode(fragment, anchor)
                digests.append(blake2b(b"".join(section.tobytes() for section in sections)).hexdigest())
                self.ensemble.settle(fragment, delivered=True)
        return {"digests": digests}


def main() -> None:
    """Raises what goes wrong; the benchmark shows the end of it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    config = load_site(Path("site.toml"))
    crew = enlist(config)
    if not crew.team.head:
        follow(crew, config)
        return disband()
    head = Head(crew, config)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(head, order.pop("do"))(**order)), file=answers, flush=True)
    crew.team.tell({"do": "end"})
    return disband()


if __name__ == "__main__":
    main()
