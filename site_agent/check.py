"""`isthmus site check`: what would happen if this site joined now, measured, without taking part.

It asks the coordinator for the run without joining it, so that a check never disturbs a run or an agent of the
same name that is training.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from rich.console import Console

from shared.config import SiteConfig, received_run
from shared.fragments import Layout
from shared.protocol import Preview
from shared.task import Shard, build_model
from shared.wire import container_bound
from site_agent.agent import CALIBRATION_SECONDS, CALIBRATION_STEPS, credentials_of, task_of
from site_agent.link import Link
from site_agent.training.devices import choose_device, describe, set_threads
from site_agent.training.trainer import Trainer
from site_agent.transport import Http

PINGS = 5


def check(config: SiteConfig) -> None:
    """Prints one line for each finding. Raises ConfigError, RefusedError, FaultError at the first thing amiss."""
    console = Console(highlight=False)

    def say(what: str, text: str) -> None:
        console.print(f"[bold]{what:<12}[/]{text}")

    set_threads(config.devices.threads)
    device = choose_device(config.devices.device)
    say("device", f"{device} ({describe(device)})")
    preview, trip, rate = asyncio.run(_ask(config))
    say("coordinator", f"{config.site.coordinator}, round trip {trip * 1e3:.1f} ms, download {rate / 1e6:.1f} MB/s")
    say("token", f"good for site {config.site.name} in run {preview.run}")
    run, layout = received_run(preview.config), Layout.from_wire(preview.layout)
    task = task_of(config, run)
    trainer = Trainer(task, build_model(task, run.run.seed), layout, run.inner, device, config.devices.throttle)
    say("layout", f"fits: {layout.parameters:,} parameters in {len(layout.fragments)} fragments")
    stream = task.train_batches(Shard(0, max(1, preview.sites), run.run.seed), run.inner.batch_size)
    seconds = trainer.calibrate(stream, CALIBRATION_STEPS, CALIBRATION_SECONDS)
    say("speed", f"{seconds:.4f} s an inner step of {run.inner.batch_size} sequences")
    up = sum(container_bound(fragment, run.wire.upload_codec) for fragment in layout.fragments)
    cycle = run.inner.steps * seconds
    say("upload", f"at most {up / 1e6:.2f} MB each {run.inner.steps} steps ({cycle:.1f} s at full pace)")


async def _ask(config: SiteConfig) -> tuple[Preview, float, float]:
    """The run as the coordinator would give it to this site, the median round trip in seconds, and bytes/s down."""
    async with Link(Http(config.site.coordinator, credentials_of(config)), config.site.name, patience=0.0) as link:
        preview = await link.preview()
        trips = []
        for _ in range(PINGS):
            began = time.perf_counter()
            await link.ping()
            trips.append(time.perf_counter() - began)
        began = time.perf_counter()
        data = await link.snapshot(0, preview.versions[0])
        return preview, statistics.median(trips), len(data) / (time.perf_counter() - began)
