"""A coordinator that cannot be reached for a while, at every point where a site speaks to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.typedefs import Middleware

from shared.protocol import SITE_HEADER
from site_agent import link
from site_agent.agent import Agent
from tests.e2e.test_federation import TEXT, small_run
from tests.support.live import live, run_config, site_config, train

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
