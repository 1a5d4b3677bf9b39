"""Sites whose counts or speeds are absurd: bounded, counted, named in the log, and of no effect on the others."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import msgpack
import pytest

from shared.protocol import pack


async def metric(fleet: Any, name: str) -> dict[str, float]:
    """The samples of a counter, by their label text."""
    lines = (await fleet.get("/metrics")).body.decode().splitlines()
    found = [line.removeprefix(name).rsplit(" ", 1) for line in lines if line.startswith(name + "{")]
    return {labels: float(value) for labels, value in found}


async def test_an_absurd_token_count_neither_ends_the_run_nor_outweighs_the_others(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    *honest, liar = await fleet.trains("a", "b", "c", "liar")
    for site in honest:
        await site.contribute(0, 0, value=1.0)
    with caplog.at_level(logging.WARNING):
        await liar.contribute(0, 0, value=-1.0, tokens=10**15)
    await liar.published(0, 1)
    (round_,) = (await fleet.get("/v1/status")).json["rounds"]
    tokens = {c["site"]: c["tokens"] for c in round_["contributions"]}
    assert tokens == {"a": 10, "b": 10, "c": 10, "liar": 8 * 10}
    assert max(c["weight"] for c in round_["contributions"]) <= 8 / 11
    assert not fleet.coordinator.core.finished
    assert await metric(fleet, "isthmus_claims_bounded_total") == {'{site="liar",what="tokens"}': 1.0}
    assert "site liar claims 1000000000000000 tokens" in caplog.text


async def test_an_absurd_speed_does_not_change_the_pace_of_the_others(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await serve(run={"min_sites": 3}, inner={"steps": 128})
    a, b, liar = await fleet.trains("a", "b", "liar")
    for site, seconds in ((a, 1.0), (b, 0.5)):
        await site.beat("training", step_seconds=seconds)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await liar.beat("training", step_seconds=1e-12)
    assert (await a.beat("training", step_seconds=1.0)).pace == 64.0
    assert (await b.beat("training", step_seconds=0.5)).pace == 128.0, "as if the liar were not there"
    assert await metric(fleet, "isthmus_claims_bounded_total") == {'{site="liar",what="speed"}': 1.0}
    assert caplog.text.count("site liar reports 1e-12 s") == 1, "named once, not with each heartbeat"


async def test_a_site_that_reports_and_sends_nothing_is_shown_counted_and_named_once(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await serve(run={"min_sites": 2}, rounds={"quorum": 1})
    _, silent = await fleet.trains("eu", "us")
    await silent.beat("training", step_seconds=0.1)
    fleet.coordinator.clock = lambda: time.monotonic() + 20.0
    await silent.beat("training", step_seconds=0.1)
    fleet.coordinator.clock = lambda: time.monotonic() + 1000.0
    for site in ("eu", "us"):
        fleet.coordinator.core.members.renew(site, time.monotonic() + 999.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await silent.beat("training", step_seconds=0.1)
    shown = (await fleet.get("/v1/status")).json["sites"]
    assert {site["name"]: (site["state"], site["stalled"]) for site in shown} == {
        "eu": ("training", False),  # which has not told its speed: its course is not known
        "us": ("training", True),
    }
    assert "isthmus_stalled_sites 1.0\n" in (await fleet.get("/metrics")).body.decode()
    assert caplog.text.count("site us is alive and has sent nothing") == 1
    await silent.contribute(0, 0)
    shown = (await fleet.get("/v1/status")).json["sites"]
    assert not any(site["stalled"] for site in shown)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_seconds", math.nan),
        ("step_seconds", -1.0),
        ("step_seconds", math.inf),
        ("step_seconds", 1e18),
        ("sync_seconds", math.nan),
        ("overlap_seconds", -5.0),
        ("tokens", -1),
        ("tokens", 10**18),
        ("steps", 10**18),
        ("training_share", 2.0),
    ],
)
async def test_an_impossible_report_is_refused_counted_and_named(
    fleet: Any, field: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    site, other = await fleet.trains("eu", "us")
    before = fleet.coordinator.core.members.live["eu"].report
    body = msgpack.packb({**msgpack.unpackb(pack(site.beating("training"))), field: value})
    with caplog.at_level(logging.WARNING):
        answer = await site.ask("POST", "/v1/sites/eu/heartbeat", body)
    assert answer.is_problem(400, "bad-request")
    assert field in answer.json["detail"]
    assert fleet.coordinator.core.members.live["eu"].report == before
    assert await metric(fleet, "isthmus_refused_total") == {'{code="bad-request",site="eu"}': 1.0}
    assert "'eu'" in caplog.text
    await other.beat("training")
