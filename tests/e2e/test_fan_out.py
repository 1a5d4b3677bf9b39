"""A caching proxy between one coordinator and ten sites: nginx as deploy/nginx/isthmus-cache.conf has it, for real."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

import lab.link as emulator
from coordinator.core.run import RunCore
from coordinator.tokens import add_token
from lab.shaping import LinkSettings
from shared.config import RunConfig
from shared.fragments import CHUNK_ELEMENTS
from shared.protocol import PART_BYTES, SITE_HEADER, Code, Heartbeat, OpenUpload, Outcome, Upload, pack, unpack
from shared.wire import Header, blob_digest, encode_flat, tensor_table
from site_agent.agent import Agent
from site_agent.link import Link
from site_agent.transport import Credentials, Http, Reply, Request
from tests.e2e.test_federation import TEXT, small_run
from tests.support.live import Live, live, run_config, site_config, train
from tests.support.nginx import MISSING, cache, find_nginx

NGINX = find_nginx()
pytestmark = pytest.mark.skipif(NGINX is None, reason=MISSING)

SITES = [f"site-{n}" for n in range(10)]
PATIENCE_SECONDS = 120.0
THIN = LinkSettings(rate=4e6, rtt=0.01)
TASK = """
import torch
from torch import nn


class Wide:
    def __init__(self, options):
        pass

    def build_model(self):
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(512, 1024))
        return model

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError
"""


class Ledger:
    """Every question for a delta or a snapshot that reaches the coordinator, and what it sent in answer."""

    def __init__(self) -> None:
        self.denied = 0
        """So many questions from now on are answered 404, whatever is there."""
        self._answers: list[tuple[web.Request, web.StreamResponse]] = []
        self._askers: dict[str, set[str]] = {}
        self._news = threading.Condition()

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if re.search("/(delta|snapshot)$", request.path) is None:
            return await handler(request)
        if self.denied:
            self.denied -= 1
            return web.Response(status=404)
        with self._news:
            self._askers.setdefault(request.path, set()).add(request.headers.get(SITE_HEADER, ""))
            self._news.notify_all()
        answer = await handler(request)
        self._answers.append((request, answer))
        return answer

    async def asked(self, path: str, sites: int) -> None:
        """Until that many sites have asked for it."""

        def wait() -> bool:
            with self._news:
                return self._news.wait_for(lambda: len(self._askers.get(path, ())) >= sites, PATIENCE_SECONDS)

        assert await asyncio.to_thread(wait), f"{len(self._askers.get(path, ()))} of {sites} have asked for {path}"

    def sent(self) -> dict[str, list[int]]:
        """The length of each answer that had an object in it, or a part of one. To be read when the coordinator has
        stopped: an answer knows its length only when it has gone out."""
        sent: dict[str, list[int]] = {}
        for request, answer in self._answers:
            if request.method == "GET" and answer.status in (200, 206):
                sent.setdefault(request.path, []).append(answer.content_length or 0)
        return sent


@dataclass
class Fleet:
    """A coordinator that asks for tokens, nginx before it, and what the coordinator has sent."""

    served: Live
    url: str
    ledger: Ledger

    def transport(self, site: str, token: str | None = None) -> Http:
        """The connections of a site, with a new token of its own or with the one given."""
        return Http(self.url, Credentials(site, token or self.served.call(self._token(site)), None))

    async def _token(self, site: str) -> str:
        return add_token(self.served.coordinator.store.journal, site)

    def contribution(self, site: str, session: str) -> tuple[OpenUpload, bytes]:
        """What `site` would have trained on version 0 of fragment 0."""
        coordinator = self.served.coordinator
        part = coordinator.layout.fragments[0]
        header = Header(
            kind="contribution",
            run=coordinator.run_id,
            site=site,
            fragment=0,
            base_version=0,
            version=0,
            digest=str(coordinator.publication.digest(0, 0)),
            codec="fp32",
            zstd=False,
            chunk=CHUNK_ELEMENTS,
            tensors=tensor_table(part),
            tokens=10,
            steps=1,
            sizes=[],
        )
        values = np.random.default_rng(SITES.index(site)).standard_normal(part.size, np.float32)
        body = encode_flat(header, part, values, 0)
        opening = OpenUpload(
            run=coordinator.run_id,
            site=site,
            session=session,
            fragment=0,
            base_version=0,
            codec="fp32",
            size=len(body),
            digest=blob_digest(body),
            part_size=PART_BYTES,
            body=None,
        )
        return opening, body


def wide_run(directory: Path, sites: int) -> RunConfig:
    (directory / "task.py").write_text(TASK, encoding="utf-8")
    return run_config(
        {
            "run": {"name": "wide", "tokens": 10**9, "min_sites": sites},
            "task": {"use": "task.py:Wide"},
            "rounds": {"fragments": 1, "quorum": "all", "deadline_seconds": 10**6},
            "wire": {"upload": "fp32", "publish": "fp32"},
        }
    )


@contextmanager
def fleet_at(directory: Path, sites: int) -> Iterator[Fleet]:
    """A fleet that starts with that many sites."""
    assert NGINX is not None
    ledger = Ledger()
    with ExitStack() as stack:
        config = wide_run(directory, sites)
        served = stack.enter_context(live(config, directory / "state", ledger.middleware, insecure=False))
        served.coordinator.core.members.lease_seconds = 10.0**6  # leases are another test's business
        yield Fleet(served, stack.enter_context(cache(NGINX, served.url, directory / "nginx")), ledger)


@dataclass
class Site:
    """A site that is as far as its network goes."""

    name: str
    linked: Link
    session: str = ""

    async def join(self) -> None:
        self.session = (await self.linked.join({})).session

    async def beat(self, state: str) -> None:
        nothing = {"steps": 0, "tokens": 0, "repairs": 0, "loss": None, "evaluation": None, "data": None}
        speeds = {"step_seconds": 0.0, "overlap_seconds": 0.0, "sync_seconds": 0.0, "training_share": 0.0}
        who = {"run": self.linked.run, "session": self.session, "state": state, "evaluates": False}
        rate = {"download_rate": self.linked.download_rate}
        await self.linked.heartbeat(Heartbeat.model_validate(who | nothing | speeds | rate))

    async def contribute(self, fleet: Fleet) -> None:
        outcome = await self.linked.contribute(*fleet.contribution(self.name, self.session))
        assert (outcome.accepted, outcome.version) == (True, 1)


async def training(fleet: Fleet, stack: AsyncExitStack, names: list[str]) -> list[Site]:
    """Sites of the run, which has started."""
    sites = [
        Site(name, await stack.enter_async_context(Link(fleet.transport(name), name, PATIENCE_SECONDS)))
        for name in names
    ]
    for site in sites:
        await site.join()
    for state in ("ready", "training"):
        for site in sites:
            await site.beat(state)
    return sites


def where(kind: str, version: int = 1) -> str:
    return f"/v1/fragments/0/versions/{version}/{kind}"


async def test_ten_sites_and_a_late_one_cost_the_coordinator_one_delta_and_one_snapshot(tmp_path: Path) -> None:
    with fleet_at(tmp_path, len(SITES)) as fleet:
        coordinator = fleet.served.coordinator
        async with AsyncExitStack() as stack:
            sites = await training(fleet, stack, SITES)
            async with asyncio.TaskGroup() as polls:
                waiting = [polls.create_task(site.linked.delta(0, 1)) for site in sites]
                await fleet.ledger.asked(where("delta"), len(sites))
                # While all ten are in their long polls the rest passes: heartbeats, and uploads in parts.
                for site in sites:
                    await site.beat("training")
                    await site.contribute(fleet)
            deltas = [task.result() for task in waiting]
            snapshots = await asyncio.gather(*(site.linked.snapshot(0, 1) for site in sites))

            late = await stack.enter_async_context(Link(fleet.transport("late"), "late", PATIENCE_SECONDS))
            late.run = coordinator.run_id
            deltas.append(await late.delta(0, 1))
            snapshots.append(await late.snapshot(0, 1))

        (delta,), (snapshot,) = set(deltas), set(snapshots)
        round_ = coordinator.reader.round(0, 1)
        assert round_ is not None
        assert blob_digest(delta) == round_.delta
        assert list(coordinator.store.snapshots.glob(f"*-{blob_digest(snapshot)}.isthmus"))
    assert fleet.ledger.sent() == {where("delta"): [len(delta)], where("snapshot"): [len(snapshot)]}


async def test_what_is_in_the_cache_goes_on_from_any_byte_and_to_nobody_else(tmp_path: Path) -> None:
    with fleet_at(tmp_path, 1) as fleet:
        run = {"run": fleet.served.coordinator.run_id}
        async with AsyncExitStack() as stack:
            (site,) = await training(fleet, stack, SITES[:1])
            await site.contribute(fleet)
            delta = await site.linked.delta(0, 1)
            tag = f'"{blob_digest(delta)}"'

            ours = fleet.transport("eu")
            stranger = fleet.transport("us", token="of-nobody")
            await stack.enter_async_context(opened(ours))
            await stack.enter_async_context(opened(stranger))
            half = {"Range": f"bytes={len(delta) // 2}-", "If-Range": tag}
            rest = await ours.send(Request("GET", where("delta"), run, headers=half))
            assert (rest.status, rest.body) == (206, delta[len(delta) // 2 :])
            assert rest.headers["etag"] == tag
            same = await ours.send(Request("GET", where("delta"), run, headers={"If-None-Match": tag}))
            assert (same.status, same.body) == (304, b"")

            refused = await stranger.send(Request("GET", where("delta"), run))
            assert told(refused) == (401, Code.UNAUTHORIZED)
            other = await ours.send(Request("GET", where("delta"), {"run": "another"}))
            assert told(other) == (409, Code.WRONG_RUN)
    assert fleet.ledger.sent() == {where("delta"): [len(delta)]}


async def test_the_coordinator_hears_of_the_links_behind_the_cache(tmp_path: Path) -> None:
    """What it sends itself goes to the cache, which is near; here it does not even send anything."""
    with fleet_at(tmp_path, 1) as fleet:
        async with AsyncExitStack() as stack:
            (near,) = await training(fleet, stack, SITES[:1])
            await near.contribute(fleet)
            await near.linked.delta(0, 1)
            thin = emulator.Link(("127.0.0.1", 0), ("127.0.0.1", int(fleet.url.rpartition(":")[2])), THIN)
            url = f"http://127.0.0.1:{await thin.start()}"
            stack.push_async_callback(thin.stop)
            (far,) = await training(replace(fleet, url=url), stack, SITES[1:2])
            await far.linked.delta(0, 1)
            for site in (near, far):
                await site.beat("training")
            rates = [site.linked.download_rate or math.inf for site in (near, far)]
            assert fleet.served.coordinator.core.members.slowest_download() == min(rates)
            assert rates[1] < 5 * THIN.rate, "of loopback it would be a hundred times as much"
    assert len(fleet.ledger.sent()[where("delta")]) == 1


async def test_every_site_has_its_own_long_poll_and_no_refusal_is_kept(tmp_path: Path) -> None:
    """A poll that ends without a version keeps nobody waiting and is nobody else's answer."""
    with fleet_at(tmp_path, 1) as fleet:
        run = fleet.served.coordinator.run_id
        async with AsyncExitStack() as stack:
            (site,) = await training(fleet, stack, SITES[:1])
            readers = [fleet.transport(name) for name in SITES[1:]]
            for reader in readers:
                await stack.enter_async_context(opened(reader))

            async def all_ask(wait: str) -> list[Reply]:
                ask = Request("GET", where("delta"), {"wait": wait, "run": run})
                return await asyncio.gather(*(reader.send(ask) for reader in readers))

            long = asyncio.create_task(site.linked.delta(0, 1))
            await fleet.ledger.asked(where("delta"), 1)
            for wait in ("0", "0.01"):
                assert {told(reply) for reply in await all_ask(wait)} == {(404, Code.NOT_PUBLISHED)}
            assert not long.done()
            await site.contribute(fleet)
            delta = await long
            assert {(reply.status, reply.body) for reply in await all_ask("0")} == {(200, delta)}
        # Nor is it an error in nginx's log.
        assert "auth request" not in (tmp_path / "nginx" / "error.log").read_text(encoding="utf-8")
    assert fleet.ledger.sent() == {where("delta"): [len(delta)]}


async def test_a_version_that_comes_while_a_site_is_refused_goes_through_the_cache_too(tmp_path: Path) -> None:
    with fleet_at(tmp_path, 1) as fleet:
        async with AsyncExitStack() as stack:
            (site,) = await training(fleet, stack, SITES[:1])
            await site.contribute(fleet)
            published = fleet.served.coordinator.publication.delta(0, 1, PATIENCE_SECONDS)
            await asyncio.to_thread(fleet.served.call, published)
            fleet.ledger.denied = 1
            delta = await site.linked.delta(0, 1)
            assert fleet.ledger.denied == 0
            assert await site.linked.delta(0, 1) == delta
    assert fleet.ledger.sent() == {where("delta"): [len(delta)]}


async def test_an_upload_reaches_the_coordinator_as_it_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a proxy holds back renews no lease."""
    with fleet_at(tmp_path, 1) as fleet:
        core, arrived = fleet.served.coordinator.core, threading.Event()
        async with AsyncExitStack() as stack:
            (site,) = await training(fleet, stack, SITES[:1])
            opening, body = fleet.contribution(site.name, site.session)
            transport = site.linked._transport
            assert isinstance(transport, Http)
            begun = await transport.send(Request("POST", "/v1/contributions", body=pack(opening)))
            path = f"/v1/contributions/{unpack(Upload, begun.body).id}"

            def bytes_arrived(*args: Any, **named: Any) -> None:
                RunCore.bytes_arrived(core, *args, **named)
                arrived.set()

            async def halves() -> AsyncIterator[bytes]:
                yield body[: len(body) // 2]
                assert await asyncio.to_thread(arrived.wait, PATIENCE_SECONDS)
                yield body[len(body) // 2 :]

            monkeypatch.setattr(core, "bytes_arrived", bytes_arrived)
            async with transport._data.put(f"{fleet.url}{path}/parts/0", data=halves()) as put:
                assert put.status == 204
            committed = await transport.send(Request("POST", f"{path}/commit", body=b""))
            assert unpack(Outcome, committed.body) == Outcome(accepted=True, version=1)


def test_a_run_through_the_cache_ends_in_the_same_bits_and_sends_each_delta_once(tmp_path: Path) -> None:
    assert NGINX is not None
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    config, names = run_config(small_run(text, run={"min_sites": 3, "tokens": 6_000})), ["a", "b", "c"]
    with live(config, tmp_path / "direct-state") as direct:
        train(*(Agent(site_config(name, direct.url, tmp_path / "direct")) for name in names))
        expected = direct.digests()
    ledger = Ledger()
    with live(config, tmp_path / "state", ledger.middleware) as served, cache(NGINX, served.url, tmp_path / "n") as url:
        train(*(Agent(site_config(name, url, tmp_path / "cached")) for name in names))
        assert served.digests() == expected
    versions = {
        f"/v1/fragments/{p}/versions/{v}/delta" for p, (last, _) in enumerate(expected) for v in range(1, last + 1)
    }
    sent = ledger.sent()
    assert {path for path in sent if path.endswith("/delta")} == versions
    assert all(len(times) == 1 for times in sent.values())


@asynccontextmanager
async def opened(transport: Http) -> AsyncIterator[Http]:
    await transport.open()
    try:
        yield transport
    finally:
        await transport.close()


def told(reply: Reply) -> tuple[int, str]:
    """An answer's status, and the code of its problem document."""
    return reply.status, json.loads(reply.body)["code"]
