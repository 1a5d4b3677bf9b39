"""A coordinator that cannot be reached for a while, at every point where a site speaks to it."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Middleware

from coordinator.api.errors import problem
from coordinator.refused import Refused
from shared.errors import RefusedError
from shared.protocol import SITE_HEADER, Code
from site_agent import link
from site_agent.agent import Agent
from site_agent.branch import CONFIG_CHANGED
from tests.e2e.test_federation import TEXT, small_run
from tests.support.live import doors, live, run_config, site_config, train, url_of

TIMES = 3
"""So often each site's connection is cut at the point in question."""


def cutting(part: str, done: bool, cut: Counter[str]) -> Middleware:
    """Cuts the connection of the first requests to a path that has `part` in it: before anything was done for them, or
    after it was, so that the answer is lost."""

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        site = request.headers.get(SITE_HEADER, "")
        if re.search(part, request.path) is None or cut[site] >= TIMES:
            return await handler(request)
        cut[site] += 1
        if done:
            await handler(request)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("cut")

    return middleware


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    return course(directory, None)


def course(directory: Path, weather: Middleware | None) -> list[tuple[int, str]]:
    """The last versions of a full-quorum run of two sites."""
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with live(run_config(small_run(text, run={"tokens": 5_000})), directory / "state", weather) as served:
        train(*(Agent(site_config(name, served.url, directory)) for name in ("a", "b")))
        return served.digests()


@pytest.mark.parametrize("done", [False, True], ids=["unheard", "unanswered"])
@pytest.mark.parametrize(
    "part", ["/join$", "/heartbeat$", "/contributions$", "/parts/", "/commit$", "/delta$", "/leave$"]
)
def test_the_coordinator_is_down(
    tmp_path: Path, part: str, done: bool, undisturbed: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At join, at heartbeat, at each part of an upload, at publication: the run ends in the very same weights."""
    monkeypatch.setattr(link, "backoff", lambda attempt, chance: 0.0)
    if part in ("/parts/", "/commit$"):
        monkeypatch.setattr(link, "INLINE_BYTES", 0)
    cut: Counter[str] = Counter()
    assert course(tmp_path, cutting(part, done, cut)) == undisturbed
    assert cut == {"a": TIMES, "b": TIMES}


def full(reached: threading.Event) -> Middleware:
    """Takes no contribution."""

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path.endswith("/contributions"):
            await request.read()
            reached.set()
            return problem(Refused(Code.STORAGE, "the disk is full"))
        return await handler(request)

    return middleware


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"upload": "int4"}, {"upload": "int8"}),
        ({"upload": "fp32"}, {"upload": "int4"}),
        ({"upload": "topk2", "topk": 128}, {"upload": "topk2"}),
    ],
    ids=["finer", "smaller", "another k"],
)
def test_the_coordinator_comes_back_with_another_codec(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contribution that it could not take stays in the outbox, in the codec of before. The agent is told of the new
    config and ends; started again, it goes on from its checkpoint and finishes the run."""
    monkeypatch.setattr(link, "backoff", lambda attempt, chance: 0.01)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    reached, ended, agents = threading.Event(), list[str](), list[Agent]()

    def served(wire: dict[str, Any]) -> Any:
        return run_config(small_run(tmp_path / "text.txt", run={"tokens": 5_000, "min_sites": 1}, wire=wire))

    def site() -> None:
        for _ in range(2):
            agents.append(Agent(site_config("a", url_of(door), tmp_path)))
            try:
                agents[-1].run()
            except RefusedError as error:
                ended.append(error.code)

    with doors(1) as (door,):
        training = threading.Thread(target=site)
        with live(served(before), tmp_path / "state", full(reached), door=door):
            training.start()
            assert reached.wait(120)
        with live(served(after), tmp_path / "state", door=door) as back:
            training.join()
            assert ended == [CONFIG_CHANGED]
            assert back.coordinator.core.finished
    refused = agents[-1].metrics.registry.get_sample_value("isthmus_site_refused_total", {"code": "wrong-codec"})
    assert refused is not None
    assert refused >= 1
