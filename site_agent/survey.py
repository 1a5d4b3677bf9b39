"""What a site's devices do with a run, found by doing it: real steps on its own data, before anything is trained."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from shared.config import RunConfig, SiteConfig, received_run
from shared.errors import ConfigError
from shared.fragments import Layout
from shared.protocol import Preview
from shared.task import BatchStream, Shard
from site_agent.asking import ask_all, whole_layout
from site_agent.core.mixture import Verdict, judge
from site_agent.core.shares import deal
from site_agent.core.shares import seconds as slowest
from site_agent.crew import Crew, holding, in_words, prepare
from site_agent.training import drivers
from site_agent.training.batches import Ahead
from site_agent.training.ensemble import Ensemble

CALIBRATION_STEPS, CALIBRATION_SECONDS = 8, 10.0


@dataclass(frozen=True)
class Survey:
    """Seconds of an inner step; what each group did in it, in sequences per second; seconds of their exchange of
    gradients, and what that says of averaging them (None: there is one group). `peak`: the most bytes that torch held
    on the head's device (None where it does not count)."""

    step_seconds: float
    speeds: tuple[float, ...]
    exchange_seconds: float
    verdict: Verdict | None
    peak: int | None


def recruit(
    crew: Crew, config: SiteConfig, values: Mapping[str, Any], layout: Layout, fingerprint: Mapping[str, str]
) -> Ensemble:
    """All ranks of the crew with the run's model, as one trainer; for the head. Raises ConfigError."""
    crew.team.tell(
        {
            "do": "prepare",
            "config": values,
            "layout": layout.to_wire(),
            "fingerprint": dict(fingerprint),
            "parallel": config.devices.parallel,
        }
    )
    trainer = prepare(crew, config, received_run(dict(values)), layout, fingerprint)
    return Ensemble(trainer, config.devices.micro_batch)


def stream_for(crew: Crew, stream: BatchStream) -> BatchStream:
    """A stream that draws ahead while an accelerator is at work. On the CPU it would take what the work needs."""
    return stream if crew.device.type == "cpu" else Ahead(stream)


def calibrate(crew: Crew, ensemble: Ensemble, stream: BatchStream) -> float:
    """Median seconds of an inner step, once passes have the size that devices have memory for."""
    stream = stream_for(crew, stream)
    ensemble.fit(next(stream))
    return ensemble.calibrate(stream, CALIBRATION_STEPS, CALIBRATION_SECONDS)


def survey(crew: Crew, config: SiteConfig, ensemble: Ensemble, stream: BatchStream, run: RunConfig) -> Survey:
    """Measures the crew at the run; for the head."""
    seconds = calibrate(crew, ensemble, stream)
    speeds, exchange = tuple(ensemble.balance.speeds), ensemble.exchange_seconds()
    batch = run.inner.batch_size
    rest = max(0.0, seconds - exchange - slowest(deal(batch, speeds), speeds))
    verdict = judge(batch, crew.groups, speeds, exchange, rest) if len(crew.groups) > 1 else None
    if verdict is not None and verdict.mode == "learners":
        verdict = _with_room(crew, config, run, ensemble.trainer.layout, verdict)
    return Survey(seconds, speeds, exchange, verdict, _peak(crew.device))


def _with_room(crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout, verdict: Verdict) -> Verdict:
    """The verdict for learners, unless one of them had too little memory: a learner of its own holds more."""
    for group in range(len(crew.groups)):
        try:
            holding(crew, config, run, layout, group, apart=True)
        except ConfigError as error:
            why = f"{verdict.why}; but as a learner of its own {crew.groups[group].name} has too little memory: {error}"
            return replace(verdict, mode="average", why=why)
    return verdict


def _peak(device: torch.device) -> int | None:
    count = getattr(drivers.module(device.type), "max_memory_allocated", None)
    return None if count is None else int(count(device))


def preview_stream(crew: Crew, preview: Preview, run: RunConfig, task: Any) -> BatchStream:
    """Data as this site would get it if it joined now."""
    with crew.team.waiting():  # they are opened, which may mean that they are tokenised
        stream: BatchStream = task.train_batches(Shard(0, max(1, preview.sites), run.run.seed), run.inner.batch_size)
    return stream


def decision(crew: Crew, config: SiteConfig) -> dict[str, Any]:
    """What to do with several groups, by what they are measured to do with the run; see `groups.settled`."""
    with crew.team.waiting():
        asked = asyncio.run(ask_all(config))
    preview, layout = asked[0].preview, whole_layout(asked)
    run = received_run(preview.config)
    ensemble = recruit(crew, config, preview.config, layout, preview.fingerprint)
    with in_words(crew.team):
        verdict = survey(crew, config, ensemble, preview_stream(crew, preview, run, ensemble.trainer.task), run).verdict
    assert verdict is not None
    return asdict(verdict)
