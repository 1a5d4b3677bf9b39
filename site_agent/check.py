"""`isthmus site check`: what would happen if this site joined now, measured, without taking part.

It asks the coordinators for the run without joining it, so that a check never disturbs a run or an agent of the
same name that is training.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from shared.config import SiteConfig, received_run
from shared.errors import RefusedError
from shared.fragments import Layout
from shared.protocol import Preview
from shared.sharding import interleave
from shared.task import Shard, build_model, check_fingerprint, fingerprint_of, shortened
from shared.wire import container_bound
from site_agent.agent import CALIBRATION_SECONDS, CALIBRATION_STEPS, credentials_of, task_of
from site_agent.branch import check_agreement, check_place
from site_agent.link import Link
from site_agent.training.devices import choose_device, describe, set_threads
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import Trainer
from site_agent.transport import Http

PINGS = 5


def check(config: SiteConfig) -> None:
    """Prints one line for each finding. Raises ConfigError, RefusedError, FaultError at the first thing amiss."""
    console = Console(highlight=False)

    def say(what: str, text: str) -> None:
        console.print(f"[bold]{what:<11}[/] {text}")

    set_threads(config.devices.threads)
    device = choose_device(config.devices.device)
    say("device", f"{device} ({describe(device)})")
    asked = asyncio.run(_ask_all(config))
    for each in asked:
        trip, rate = f"round trip {each.trip * 1e3:.1f} ms", f"download {each.rate / 1e6:.1f} MB/s"
        say("coordinator", f"{each.url}, {trip}, {rate}")
        say("token", f"good for site {config.site.name} in run {each.preview.run}")
    preview = asked[0].preview
    run, layout = received_run(preview.config), Layout.from_wire(interleave([each.preview.layout for each in asked]))
    task = task_of(config, run)
    check_fingerprint(fingerprint_of(task), preview.fingerprint)
    for name, value in sorted(preview.fingerprint.items()):
        say(escape(name), f"the run's ({escape(shortened(value))})")
    model = build_model(task, run.run.seed)
    trainer = Ensemble(Trainer(task, model, layout, run, device, config.devices.throttle))
    say("layout", f"fits: {layout.parameters:,} parameters in {len(layout.fragments)} fragments")
    stream = task.train_batches(Shard(0, max(1, preview.sites), run.run.seed), run.inner.batch_size)
    seconds = trainer.calibrate(stream, CALIBRATION_STEPS, CALIBRATION_SECONDS)
    say("speed", f"{seconds:.4f} s an inner step of {run.inner.batch_size} sequences")
    up = sum(container_bound(fragment, run.wire.upload_codec) for fragment in layout.fragments)
    cycle = run.inner.steps * seconds
    say("upload", f"at most {up / 1e6:.2f} MB each {run.inner.steps} steps ({cycle:.1f} s at full pace)")


@dataclass(frozen=True)
class _Asked:
    """A coordinator, the run as it would give it to this site, the median round trip in seconds, and bytes/s down."""

    url: str
    preview: Preview
    trip: float
    rate: float


async def _ask_all(config: SiteConfig) -> list[_Asked]:
    """All coordinators of the run, the first one first."""
    asked = [await _ask(config, config.site.coordinator, 0)]
    for shard, url in enumerate(received_run(asked[0].preview.config).run.coordinators[1:], start=1):
        try:
            asked.append(await _ask(config, url, shard))
        except RefusedError as error:
            raise RefusedError(error.code, f"{url}: {error.detail}") from None
        check_agreement(url, asked[-1].preview, asked[0].preview)
    return asked


async def _ask(config: SiteConfig, url: str, shard: int) -> _Asked:
    async with Link(Http(url, credentials_of(config)), config.site.name, patience=0.0) as link:
        preview = await link.preview()
        check_place(url, preview.shard, shard)
        trips = []
        for _ in range(PINGS):
            began = time.perf_counter()
            await link.ping()
            trips.append(time.perf_counter() - began)
        began = time.perf_counter()
        data = await link.snapshot(0, preview.versions[0])
        return _Asked(url, preview, statistics.median(trips), len(data) / (time.perf_counter() - began))
