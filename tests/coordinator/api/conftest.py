"""A real coordinator on a temporary state directory, served in this process, and sites that talk to it."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from coordinator.api.app import Api
from coordinator.service import Coordinator
from coordinator.tokens import add_token
from shared.config import RunConfig, parse
from shared.fragments import CHUNK_ELEMENTS
from shared.protocol import (
    PART_BYTES,
    PROTOCOL,
    SITE_HEADER,
    Heartbeat,
    Join,
    Joined,
    Message,
    OpenUpload,
    Orders,
    Outcome,
    Upload,
    pack,
    unpack,
)
from shared.wire import Header, blob_digest, encode_flat, tensor_table

TASK = """
import torch
from torch import nn


class Tiny:
    def __init__(self, options):
        pass

    def build_model(self):
        model = nn.Module()
        model.big = nn.Parameter(torch.randn(20, 15))
        model.small = nn.Parameter(torch.randn(12))
        return model

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError
"""


@dataclass
class Answer:
    """An answer that has been read."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def is_problem(self, status: int, code: str) -> bool:
        """Whether this is the problem document (RFC 9457) of `code`, and nothing of a cache's business."""
        if self.headers["Content-Type"] != "application/problem+json; charset=utf-8":
            return False
        document = self.json
        assert document["detail"]
        assert "Traceback" not in document["detail"]
        assert "\n" not in document["detail"]
        assert self.headers["Cache-Control"] == "no-store"
        assert document["status"] == self.status
        return bool(self.status == status and document["code"] == code)


@dataclass
class Site:
    """A site as the API sees it."""

    fleet: Fleet
    name: str
    token: str | None
    session: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers = {SITE_HEADER: self.name}
        if self.token is not None:
            self.headers["Authorization"] = f"Bearer {self.token}"

    async def ask(
        self, method: str, path: str, body: Message | bytes | AsyncIterator[bytes] | None = None, **more: Any
    ) -> Answer:
        packed = pack(body) if isinstance(body, Message) else body
        data = io.BytesIO(packed) if isinstance(packed, bytes) else packed
        headers = self.headers | more.pop("headers", {})
        answer: ClientResponse
        async with self.fleet.client.request(method, path, data=data, headers=headers, **more) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def join(self) -> Joined:
        joined = unpack(Joined, (await self.ask("POST", "/v1/join", self.joining())).body)
        self.session = joined.session
        return joined

    def joining(self, **changed: Any) -> Join:
        return Join.model_construct(**{"protocol": PROTOCOL, "site": self.name, "software": {}} | changed)

    def beating(self, state: str = "ready", **changed: Any) -> Heartbeat:
        values: dict[str, Any] = {
            "run": self.fleet.run,
            "session": self.session,
            "state": state,
            "steps": 0,
            "tokens": 0,
            "step_seconds": 0.0,
            "overlap_seconds": 0.0,
            "sync_seconds": 0.0,
            "training_share": 0.0,
            "download_rate": None,
            "loss": None,
            "evaluation": None,
            "repairs": 0,
            "evaluates": True,
            "data": None,
        }
        return Heartbeat.model_construct(**values | changed)

    async def beat(self, state: str = "ready", **changed: Any) -> Orders:
        answer = await self.ask("POST", f"/v1/sites/{self.name}/heartbeat", self.beating(state, **changed))
        assert answer.status == 200, answer.body
        return unpack(Orders, answer.body)

    def body(self, fragment: int = 0, base: int = 0, value: float = 0.5, codec: str = "int8", **changed: Any) -> bytes:
        """A contribution of `value` everywhere, with header fields `changed`."""
        part = self.fleet.coordinator.layout.fragments[fragment]
        header = self.header(fragment, base, codec, **changed)
        return encode_flat(header, part, np.full(part.size, value, np.float32), 1 if header.zstd else 0)

    def header(self, fragment: int = 0, base: int = 0, codec: str = "int8", **changed: Any) -> Header:
        """That of a contribution, with the fields `changed`."""
        part = self.fleet.coordinator.layout.fragments[fragment]
        digest = self.fleet.coordinator.publication.digest(fragment, base) or "0" * 32
        fields: dict[str, Any] = {
            "kind": "contribution",
            "run": self.fleet.run,
            "site": self.name,
            "fragment": fragment,
            "base_version": base,
            "version": base,
            "digest": digest,
            "codec": codec,
            "zstd": True,
            "chunk": CHUNK_ELEMENTS,
            "tensors": tensor_table(part),
            "tokens": 10,
            "steps": 5,
            "sizes": [],
        }
        return Header.model_validate(fields | changed)

    def opening(self, body: bytes, fragment: int = 0, base: int = 0, *, inline: bool = True, **more: Any) -> OpenUpload:
        fields: dict[str, Any] = {
            "run": self.fleet.run,
            "site": self.name,
            "session": self.session,
            "fragment": fragment,
            "base_version": base,
            "codec": self.fleet.coordinator.config.wire.upload_codec,
            "size": len(body),
            "digest": blob_digest(body),
            "part_size": PART_BYTES,
            "body": body if inline else None,
        }
        return OpenUpload.model_construct(**fields | more)

    async def offer(self, body: bytes, fragment: int = 0, base: int = 0, **more: Any) -> Answer:
        return await self.ask("POST", "/v1/contributions", self.opening(body, fragment, base, **more))

    async def contribute(self, fragment: int = 0, base: int = 0, value: float = 0.5, **more: Any) -> Outcome:
        """A good contribution: it must be accepted."""
        answer = await self.offer(self.body(fragment, base, value, **more), fragment, base)
        assert answer.status == 200, answer.body
        outcome = unpack(Upload, answer.body).outcome
        assert outcome is not None
        assert outcome.accepted
        return outcome

    async def published(self, fragment: int, version: int) -> Answer:
        """The delta to `version`, once it is there."""
        answer = await self.ask("GET", f"/v1/fragments/{fragment}/versions/{version}/delta", params={"wait": "60"})
        assert answer.status == 200, answer.body
        return answer


@dataclass
class Fleet:
    """A coordinator behind HTTP, and the sites that it knows."""

    coordinator: Coordinator
    client: Any
    state: Path
    insecure: bool
    api: Api

    @property
    def run(self) -> str:
        return self.coordinator.run_id

    def site(self, name: str) -> Site:
        token = None if self.insecure else add_token(self.coordinator.store.journal, name)
        return Site(self, name, token)

    async def trains(self, *names: str) -> list[Site]:
        """Sites that have joined and been started."""
        sites = [self.site(name) for name in names]
        for site in sites:
            await site.join()
        for state in ("ready", "training"):
            for site in sites:
                await site.beat(state)
        assert self.coordinator.core.started
        return sites

    async def get(self, path: str, **more: Any) -> Answer:
        async with self.client.get(path, **more) as answer:
            return Answer(answer.status, answer.headers, await answer.read())


Serve = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Serves a coordinator; tables given override the config."""
    (tmp_path / "task.py").write_text(TASK)
    open_: list[Fleet] = []

    async def start(*, insecure: bool = False, **tables: dict[str, Any]) -> Fleet:
        values: dict[str, Any] = {
            "run": {"name": "tiny", "tokens": 10**9, "min_sites": 1},
            "task": {"use": "task.py:Tiny"},
            "rounds": {"fragments": 2, "quorum": "all"},
            "wire": {"upload": "int8", "publish": "int8"},
        }
        for table, keys in tables.items():
            values.setdefault(table, {}).update(keys)
        coordinator = await Coordinator.open(parse(RunConfig, values, "run.toml"), tmp_path / "state", tmp_path)
        api = Api(coordinator, insecure=insecure)
        client = TestClient(TestServer(api.app()))
        await client.start_server()
        await coordinator.start()
        fleet = Fleet(coordinator, client, tmp_path / "state", insecure, api)
        open_.append(fleet)
        return fleet

    yield start
    for fleet in open_:
        fleet.api.close()
        fleet.coordinator.publication.close()
        await fleet.client.close()
        await fleet.coordinator.stop()


@pytest.fixture
async def fleet(serve: Serve) -> Fleet:
    """A coordinator with tokens, whose run starts with the first site."""
    return await serve()
