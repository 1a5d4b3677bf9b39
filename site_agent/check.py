"""`isthmus site check`: what would happen if this site joined now, measured, without taking part.

It asks the coordinators for the run without joining it, so that a check never disturbs a run or an agent of the
same name that is training. All processes of the site take part: what it prints of groups and memory is what a run
would have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from shared.config import RunConfig, SiteConfig, received_run
from shared.fragments import Layout
from shared.task import shortened
from shared.wire import container_bound
from site_agent.asking import Asked, ask_all, whole_layout
from site_agent.crew import Crew, enlist, follow, free
from site_agent.survey import Survey, preview_stream, recruit, survey
from site_agent.training.makes import environment, find_devices

Say = Callable[[str, str], None]


def check(config: SiteConfig) -> None:
    """Prints one line for each finding. Raises ConfigError, RefusedError, FaultError at the first thing amiss."""
    crew = enlist(config)
    if not crew.team.head:
        follow(crew, config)
        return
    console = Console(highlight=False)

    def say(what: str, text: str) -> None:
        console.print(f"[bold]{what:<11}[/] {escape(text)}", soft_wrap=True)

    _devices(say, crew)
    asked = asyncio.run(ask_all(config))
    _coordinators(say, config, asked)
    preview, layout = asked[0].preview, whole_layout(asked)
    run = received_run(preview.config)
    ensemble = recruit(crew, config, preview.config, layout, preview.fingerprint)
    for name, value in sorted(preview.fingerprint.items()):
        say(name, f"the run's ({shortened(value)})")
    say("layout", f"fits: {layout.parameters:,} parameters in {len(layout.fragments)} fragments")
    found = survey(crew, ensemble, preview_stream(preview, run, ensemble.trainer.task), run)
    _memory(say, crew, found)
    _speeds(say, crew, run, found, ensemble.micro_batch)
    _upload(say, run, layout, found.step_seconds)
    crew.team.tell({"do": "end"})


def _devices(say: Say, crew: Crew) -> None:
    say("devices", crew.describe())
    used = {rank.device for rank in crew.ranks}
    for other in find_devices():
        if other.name not in used and other.device.type != "cpu":
            say("", f"not used: {other.device} ({other.name})")
    for name, value in environment(crew.found.make).items():
        say("", f"{name}={value}")


def _coordinators(say: Say, config: SiteConfig, asked: list[Asked]) -> None:
    for each in asked:
        trip, rate = f"round trip {each.trip * 1e3:.1f} ms", f"download {each.rate / 1e6:.1f} MB/s"
        say("coordinator", f"{each.url}, {trip}, {rate}")
        say("token", f"good for site {config.site.name} in run {each.preview.run}")


def _memory(say: Say, crew: Crew, found: Survey) -> None:
    have = free(crew)
    had = f"; {have / 1e9:.1f} GB were free" if have is not None else ""
    peak = f"; a step held {found.peak / 1e9:.1f} GB at most" if found.peak is not None else ""
    say("memory", f"{found.needed.sentence()}{had}{peak}")


def _speeds(say: Say, crew: Crew, run: RunConfig, found: Survey, micro_batch: int) -> None:
    passes = f", passes of at most {micro_batch}" if micro_batch else ""
    say("speed", f"{found.step_seconds:.4f} s an inner step of {run.inner.batch_size} sequences{passes}")
    if found.verdict is None:
        return
    for group, speed in zip(crew.groups, found.speeds, strict=True):
        say("", f"{group.name}: {speed:.3g} sequences/s")
    say("exchange", f"{found.exchange_seconds:.4f} s a step to sum the groups' gradients")
    best, verdict = found.verdict.mode, found.verdict
    way = "averaged gradients (one learner)" if best == "average" else "a learner for each group"
    say(
        "groups",
        f"{way} serves better: {verdict.together:.3g} sequences/s averaged, {verdict.apart:.3g} apart; {verdict.why}",
    )


def _upload(say: Say, run: RunConfig, layout: Layout, step_seconds: float) -> None:
    up = sum(container_bound(fragment, run.wire.upload_codec) for fragment in layout.fragments)
    cycle = run.inner.steps * step_seconds
    say("upload", f"at most {up / 1e6:.2f} MB each {run.inner.steps} steps ({cycle:.1f} s at full pace)")
