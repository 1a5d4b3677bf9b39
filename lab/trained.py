"""A run in virtual time that trains for real: real steps, codecs, merges and alignments, in one process.

What takes time in the world (a device's step, a link's way) takes virtual time here, and everything else is
what production does: the cores decide, the trainer steps, contributions are encoded and decoded as containers,
the coordinator's outer step merges them and publishes quantised deltas. So a loss measured here is that of the
algorithm with its real numbers, on any set of speeds, in as much real time as the steps themselves take.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coordinator.core.rounds import Contribution
from coordinator.core.run import CloseRound, RunCore
from coordinator.initial import initial_weights
from coordinator.outer.merge import Weighted
from coordinator.outer.step import OuterState, outer_step
from coordinator.plans import plan_of, rule_of
from lab.virtual import VirtualRun, VirtualSite
from shared.compression import usual_level
from shared.config import RunConfig
from shared.task import Shard, build_model, load_task
from shared.wire import open_container
from site_agent.contribution import Address, Anchor, Parcel, pack
from site_agent.core.alignment import How
from site_agent.core.site import Settings, Snapshot
from site_agent.training.ensemble import Ensemble
from site_agent.training.schedules import lr_factor
from site_agent.training.trainer import Trainer, evaluate, load_flat

RUN = "virtual"


@dataclass(frozen=True)
class Point:
    """The held-out loss in nats of the published weights, at this virtual time and at this many merged tokens."""

    seconds: float
    tokens: int
    loss: float


@dataclass
class _Body:
    """A site's tensors; see `site_agent.agent`."""

    trainer: Ensemble
    stream: Any
    anchors: list[Anchor] = field(default_factory=list)
    arrivals: dict[int, Anchor] = field(default_factory=dict)


class TrainedRun(VirtualRun):
    """`config` as a run.toml; the sites share the machine. `curve` holds about `evaluations` points and the end."""

    def __init__(self, config: RunConfig, base: Path, sites: Sequence[VirtualSite], evaluations: int = 20) -> None:
        initial = initial_weights(config, base)
        plan = plan_of(config, config.rounds.fragments, initial.sequence_tokens)
        super().__init__(RunCore(plan), list(sites), Settings.of(config))
        self.config = config
        self.curve: list[Point] = []
        self.bytes_up = self.bytes_down = 0
        self.cosines: list[float] = []
        self._task = load_task(config.task.use, config.task.options(), base)
        self._layout, self._embeddings = initial.layout, initial.embeddings
        self._states = [OuterState.initial(f, initial.weights(f)) for f in self._layout.fragments]
        self._published_now = [_anchor(state) for state in self._states]
        self._eval_model = build_model(self._task, config.run.seed)
        self._executor = ThreadPoolExecutor(1)
        self._delta_bytes: list[list[int]] = [[] for _ in self._states]
        self._stored: dict[str, tuple[bytes, float]] = {}
        self._every = max(1, config.run.tokens // max(1, evaluations))
        self._bodies = {site.name: self._body(index, len(sites)) for index, site in enumerate(sites)}
        self._measure()

    def _body(self, index: int, count: int) -> _Body:
        seed = self.config.run.seed
        trainer = Trainer(self._task, build_model(self._task, seed), self._layout, self.config, torch.device("cpu"))
        return _Body(
            Ensemble(trainer), self._task.train_batches(Shard(index, count, seed), self.config.inner.batch_size)
        )

    def digests(self) -> list[tuple[int, str]]:
        """(version, digest) of each fragment's published weights."""
        return [(state.version, state.digest) for state in self._states]

    @property
    def loss(self) -> float:
        """The last held-out loss."""
        return self.curve[-1].loss

    def run(self, limit: float = float("inf")) -> None:
        super().run(limit)
        self._measure()
        self._executor.shutdown()

    # -- a site's tensors

    def begin(self, site: VirtualSite) -> None:
        body = self._bodies[site.name]
        body.anchors = list(self._published_now)
        for p, anchor in enumerate(body.anchors):
            body.trainer.begin(p, anchor.flat)

    def step(self, site: VirtualSite) -> int:
        body, inner, run = self._bodies[site.name], self.config.inner, self.config.run
        factor = lr_factor(inner.schedule, site.running.furthest, run.tokens, inner.warmup_tokens)
        _, tokens, _ = body.trainer.step(body.stream, inner.lr * factor)
        return tokens

    def take(self, site: VirtualSite, action: Snapshot) -> Any:
        body, p = self._bodies[site.name], action.fragment
        body.trainer.snapshot(p)
        parcel = Parcel(p, body.anchors[p], body.trainer.encode(p, body.anchors[p].flat), action.tokens, action.steps)
        packed = pack(parcel, Address(RUN, self._layout.fragments[p]), self.config.wire, site.name)
        self.bytes_up += len(packed)
        return packed

    def feed_back(self, site: VirtualSite, fragment: int, sent: Any) -> None:
        self._bodies[site.name].trainer.settle(fragment, delivered=True)

    def arrive(self, site: VirtualSite, fragment: int, version: int) -> None:
        body, p = self._bodies[site.name], fragment
        deltas = sum(self._delta_bytes[p][body.anchors[p].version : version])
        # (Further behind it would take a snapshot, which is fp32; a site that is in time never is.)
        self.bytes_down += min(deltas, 4 * self._layout.fragments[p].size)
        body.arrivals[p] = self._published_now[p]

    def take_up(self, site: VirtualSite, fragment: int, how: How) -> None:
        body, p = self._bodies[site.name], fragment
        anchor = body.arrivals.pop(p)
        body.trainer.take_up(p, how, body.anchors[p].flat, anchor.flat)
        body.anchors[p] = anchor

    # -- the coordinator's tensors

    def store(self, contribution: Contribution, sent: Any) -> None:
        encoded: bytes = sent
        with open_container(encoded, self._layout.fragments[contribution.fragment]) as container:
            self._stored[contribution.id] = (encoded, container.screen() ** 0.5)

    def merge(self, close: CloseRound) -> None:
        p = close.fragment
        merged = []
        for contribution, weight in zip(close.contributions, close.weights, strict=True):
            encoded, norm = self._stored.pop(contribution.id)
            merged.append(Weighted(open_container(encoded, self._layout.fragments[p]), weight, norm))
        tokens = sum(contribution.tokens for contribution in close.contributions)
        rule = rule_of(self.config, close, usual_level(self.config.wire.zstd_level))
        stepped = outer_step(self._states[p], merged, rule, RUN, tokens, self._executor, self._embeddings)
        self._published_now[p] = _anchor(self._states[p])
        self._delta_bytes[p].append(stepped.delta_size)
        if stepped.cosine is not None:
            self.cosines.append(stepped.cosine)

    def _published(self, close: CloseRound) -> None:
        super()._published(close)
        if self.core.tokens >= self.curve[-1].tokens + self._every:
            self._measure()

    def _measure(self) -> None:
        load_flat(self._eval_model, self._layout, [anchor.flat for anchor in self._published_now])
        batches = self._task.eval_batches(self.config.inner.batch_size)
        loss = None if batches is None else evaluate(self._task, self._eval_model, batches, torch.device("cpu"))
        self.curve.append(Point(self.now, self.core.tokens, float("nan") if loss is None else loss))


def _anchor(state: OuterState) -> Anchor:
    """The published weights as they are now, for any number of sites."""
    return Anchor(state.version, state.digest, state.tokens, state.published.copy())
