"""What the coordinators of a run say to a site that only asks: it does not join, and disturbs no agent of its name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import SiteConfig, received_run
from shared.errors import RefusedError
from shared.fragments import Layout
from shared.protocol import Preview
from shared.sharding import interleave
from site_agent.branch import check_agreement, check_place
from site_agent.link import Link
from site_agent.transport import Credentials, Http, credentials

PINGS = 5


def credentials_of(config: SiteConfig) -> Credentials:
    """The site's credentials, from the files that its config names. Raises ConfigError."""
    site = config.site

    def path(name: str) -> Path | None:
        return config.path(name) if name else None

    return credentials(site.name, path(site.token_file), path(site.ca), path(site.client_cert), path(site.client_key))


@dataclass(frozen=True)
class Asked:
    """A coordinator, the run as it would give it to this site, the median round trip in seconds, and bytes/s down."""

    url: str
    preview: Preview
    trip: float
    rate: float


async def ask_all(config: SiteConfig) -> list[Asked]:
    """All coordinators of the run, the first one first."""
    asked = [await _ask(config, config.site.coordinator, 0)]
    for shard, url in enumerate(received_run(asked[0].preview.config).run.coordinators[1:], start=1):
        try:
            asked.append(await _ask(config, url, shard))
        except RefusedError as error:
            raise RefusedError(error.code, f"{url}: {error.detail}") from None
        check_agreement(url, asked[-1].preview, asked[0].preview)
    return asked


async def _ask(config: SiteConfig, url: str, shard: int) -> Asked:
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
        return Asked(url, preview, statistics.median(trips), len(data) / (time.perf_counter() - began))


def whole_layout(asked: Sequence[Asked]) -> Layout:
    """That of the whole run, of which each coordinator has told its own fragments."""
    return Layout.from_wire(interleave([each.preview.layout for each in asked]))
