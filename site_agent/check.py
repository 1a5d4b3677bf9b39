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
from site_agent.core.mixture import Mode
from site_agent.crew import Crew, enlist, follow, free, holding, in_words, needed
from site_agent.groups import stated
from site_agent.survey import Survey, preview_stream, recruit, survey
from site_agent.training.makes import devices_of, environment, make_of

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

    _devices(say, crew, config)
    with crew.team.waiting():
        asked = asyncio.run(ask_all(config))
    _coordinators(say, config, asked)
    preview, layout = asked[0].preview, whole_layout(asked)
    run = received_run(preview.config)
    ensemble = recruit(crew, config, preview.config, layout, preview.fingerprint)
    for name, value in sorted(preview.fingerprint.items()):
        say(name, f"the run's ({shortened(value)})")
    say("layout", f"fits: {layout.parameters:,} parameters in {len(layout.fragments)} fragments")
    with in_words(crew.team):
        found = survey(crew, config, ensemble, preview_stream(crew, preview, run, ensemble.trainer.task), run)
    mode: Mode = "average"
    if found.verdict is not None:
        mode, why = stated(crew, config) or (found.verdict.mode, "as measured here")
        _groups(say, crew, config, found, mode, why)
    _memory(say, crew, config, run, layout, apart=mode == "learners")
    if found.peak is not None:
        say("", f"measured: a step held {found.peak / 1e9:.1f} GB at most on {crew.called(0)}")
    _speed(say, crew, config, run, found, ensemble.micro_batch, mode)
    _upload(say, run, layout, found.step_seconds if mode == "average" else None)
    crew.team.tell({"do": "end"})


def _devices(say: Say, crew: Crew, config: SiteConfig) -> None:
    for line, described in enumerate(crew.described()):
        say("" if line else "devices", described)
    computing = [name for name in ("compile", "recompute") if getattr(config.devices, name)]
    if computing:
        say("", " and ".join(f"[devices] {name}" for name in computing))
    here = [name for name, rank in zip(crew.names, crew.ranks, strict=True) if rank.host == crew.ranks[0].host]
    why = "[devices] device does not name it" if config.devices.device else "no process was started for it"
    for device in devices_of(""):
        if str(device) not in here and device.type != "cpu":
            say("", f"not used: {device} ({make_of(device).title(device)}): {why}")
    for name, value in environment(crew.found.make).items():
        say("", f"{name}={value}")


def _coordinators(say: Say, config: SiteConfig, asked: list[Asked]) -> None:
    for each in asked:
        trip, rate = f"round trip {each.trip * 1e3:.1f} ms", f"download {each.rate / 1e6:.1f} MB/s"
        say("coordinator", f"{each.url}, {trip}, {rate}")
        which = "good" if config.site.token_file else "none is set, and none asked for,"
        say("token", f"{which} for site {config.site.name} in run {each.preview.run}")


def _groups(say: Say, crew: Crew, config: SiteConfig, found: Survey, mode: Mode, why: str) -> None:
    """What becomes of several groups, and both numbers."""
    verdict = found.verdict
    assert verdict is not None
    learners = ", ".join(f"{config.site.name}~{group.name}" for group in crew.groups)
    way = "one learner, gradients are averaged" if mode == "average" else f"a learner each: {learners}"
    say("groups", f"{way} ({why})")
    together = f"{verdict.together:.3g} sequences/s"
    say("", f"averaged {together}, apart {verdict.apart:.3g}: {verdict.why}")
    if verdict.mode != mode:
        say("", f'[devices] mixed = "{verdict.mode}" would serve better, by what was measured here')


def _memory(say: Say, crew: Crew, config: SiteConfig, run: RunConfig, layout: Layout, *, apart: bool) -> None:
    for index, group in enumerate(crew.groups):
        parallel = holding(crew, config, run, layout, index, apart=apart)
        members, have = len(group.ranks), free(crew, index)
        name = f"{group.name}: " if len(crew.groups) > 1 else ""
        way = {"ddp": "the whole model on each device (ddp), ", "fsdp": "the model in shards (fsdp), "}[parallel]
        had = f"; {have / 1e9:.1f} GB were free" if have is not None else ""
        sentence = needed(crew, run, layout, parallel, index, apart=apart).sentence()
        say("" if index else "memory", f"{name}{way if members > 1 else ''}{sentence}{had}")


def _speed(
    say: Say, crew: Crew, config: SiteConfig, run: RunConfig, found: Survey, micro_batch: int, mode: Mode
) -> None:
    batch = run.inner.batch_size
    set_ = "[devices] micro_batch" if config.devices.micro_batch else "what there is memory for"
    passes = f", passes of at most {micro_batch} on a device ({set_})" if micro_batch else ""
    if mode == "average":
        rate = batch / found.step_seconds
        say("speed", f"{found.step_seconds:.4f} s an inner step of {batch} sequences ({rate:.3g} sequences/s){passes}")
    if found.verdict is not None:
        for line, (group, speed) in enumerate(zip(crew.groups, found.speeds, strict=True)):
            step = f", {batch / speed:.4f} s an inner step of {batch}{passes}" if mode == "learners" else ""
            say("speed" if mode == "learners" and line == 0 else "", f"{group.name}: {speed:.3g} sequences/s{step}")
        say("exchange", f"{found.exchange_seconds:.4f} s a step to sum the groups' gradients")


def _upload(say: Say, run: RunConfig, layout: Layout, step_seconds: float | None) -> None:
    up = sum(container_bound(fragment, run.wire.upload_codec) for fragment in layout.fragments)
    cycle = f" ({run.inner.steps * step_seconds:.1f} s at full pace)" if step_seconds is not None else " and learner"
    say("upload", f"at most {up / 1e6:.2f} MB each {run.inner.steps} steps{cycle}")
