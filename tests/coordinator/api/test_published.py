"""Deltas and snapshots: waited for, immutable, and what any cache can serve on."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.api import downloads
from coordinator.publication import SNAPSHOTS_KEPT
from shared.fragments import digest_flat
from shared.protocol import Leave
from shared.wire import blob_digest, open_container
from tests.coordinator.api.conftest import TASK

IMMUTABLE = "public, max-age=31536000, immutable"


def path(fragment: int, version: int, kind: str) -> str:
    return f"/v1/fragments/{fragment}/versions/{version}/{kind}"


async def someone_waits(fleet: Any) -> None:
    """Until a request is in its long poll for fragment 0."""
    while not fleet.coordinator.publication._news[0]._waiters:  # noqa: ASYNC110 - nothing tells of a waiter
        await asyncio.sleep(0)


async def merged(fleet: Any, versions: int = 1) -> Any:
    """A site that has brought fragment 0 to that version."""
    (site,) = await fleet.trains("eu")
    for base in range(versions):
        await site.contribute(0, base)
        await site.published(0, base + 1)
    return site


async def test_a_waiting_site_gets_the_delta_as_soon_as_it_is_published(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    waiting = asyncio.create_task(site.published(0, 1))
    await someone_waits(fleet)
    await site.contribute(0, 0)
    answer = await waiting
    with open_container(answer.body, fleet.coordinator.layout.fragments[0]) as delta:
        assert (delta.header.kind, delta.header.version) == ("delta", 1)


async def test_a_file_goes_out_in_pieces_between_which_the_loop_is_free(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await merged(fleet)
    whole = (await site.published(0, 1)).body
    loop, pieces = asyncio.get_running_loop(), list[tuple[int, int]]()
    sendfile = loop.sendfile

    async def counted(transport: Any, file: Any, offset: int = 0, count: int | None = None, **more: Any) -> int:
        pieces.append((offset, count or 0))
        return await sendfile(transport, file, offset, count, **more)

    monkeypatch.setattr(downloads, "MOST_SENT", 64)
    monkeypatch.setattr(downloads, "LEAST_SENT", 64)
    monkeypatch.setattr(loop, "sendfile", counted)
    assert (await site.published(0, 1)).body == whole
    assert pieces == [(at, min(64, len(whole) - at)) for at in range(0, len(whole), 64)]


def test_the_more_downloads_the_less_each_sends_in_a_turn_of_the_loop() -> None:
    under_way, shares = downloads.Downloads(), []
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(under_way)
            shares.append(under_way.share)
    assert shares[:2] == [4 << 20] * 2
    assert shares[7] == 1 << 20
    assert shares[99] == 256 << 10
    assert under_way.share == 4 << 20


async def published_zstd(fleet: Any, version: int, *sites: Any) -> bool:
    """Whether the delta to `version`, which the sites' contributions make, is compressed."""
    for site in sites:
        await site.contribute(0, version - 1)
    fragment = fleet.coordinator.layout.fragments[0]
    with open_container((await sites[0].published(0, version)).body, fragment) as delta:
        return bool(delta.header.zstd)


async def test_deltas_and_snapshots_are_compressed_while_a_slow_site_trains_and_not_on_fast_links(
    serve: Any, tmp_path: Path
) -> None:
    """No processor compresses 1e15 bytes in a second, or one in a second only; each delta goes by what was known when
    the one before it was made."""
    (tmp_path / "flat.py").write_text(TASK.replace("torch.randn", "torch.zeros"))
    fleet = await serve(wire={"zstd_level": "auto"}, task={"use": "flat.py:Tiny"}, rounds={"fragments": 1})
    fragment = fleet.coordinator.layout.fragments[0]
    eu, us = await fleet.trains("eu", "us")

    async def snapshot_zstd(version: int) -> bool:
        with open_container((await eu.ask("GET", path(0, version, "snapshot"))).body, fragment) as snapshot:
            return bool(snapshot.header.zstd)

    assert await published_zstd(fleet, 1, eu, us), "nothing is known"
    for site in (eu, us):
        await site.beat("training", download_rate=1e15)
    await published_zstd(fleet, 2, eu, us)
    assert not await published_zstd(fleet, 3, eu, us)
    assert not await snapshot_zstd(3)
    await us.beat("training", download_rate=1.0)
    await published_zstd(fleet, 4, eu, us)
    assert await published_zstd(fleet, 5, eu, us)
    assert await snapshot_zstd(5)
    gone = Leave(run=fleet.run, session=us.session)
    assert (await us.ask("POST", "/v1/sites/us/leave", gone)).status == 204
    await published_zstd(fleet, 6, eu)
    assert not await published_zstd(fleet, 7, eu), "who has left has no say"
    assert not await snapshot_zstd(7)


async def test_a_version_that_is_not_there_yet_is_told_with_the_newest(fleet: Any) -> None:
    site = await merged(fleet)
    for wait in ("0", "0.01"):
        answer = await site.ask("GET", path(0, 2, "delta"), params={"wait": wait})
        assert answer.is_problem(404, "not-published")
        assert answer.json["version"] == 1
    answer = await site.ask("GET", path(0, 2, "snapshot"))
    assert answer.is_problem(404, "not-published")
    assert answer.json["version"] == 1


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", "1e999", ""])
async def test_a_wait_that_is_no_time_is_refused(fleet: Any, wait: str) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.ask("GET", path(0, 1, "delta"), params={"wait": wait})).is_problem(400, "bad-request")


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
async def test_a_fragment_that_the_run_does_not_have_is_not_found(fleet: Any, kind: str) -> None:
    (site,) = await fleet.trains("eu")
    for fragment in (2, 999999999):
        assert (await site.ask("GET", path(fragment, 0, kind))).is_problem(404, "not-found")


async def test_snapshot_and_deltas_lead_to_the_same_bits(fleet: Any) -> None:
    site = await merged(fleet, versions=2)
    fragment = fleet.coordinator.layout.fragments[0]
    anchor = fleet.coordinator.store.checkpoints(2).load(fleet.coordinator.store.checkpoints(2).entries(0)[0], fragment)
    flat: Any = anchor.published
    for version in (1, 2):
        with open_container((await site.published(0, version)).body, fragment) as delta:
            assert delta.header.base_version == version - 1
            delta.add_to(flat)
            assert digest_flat(flat, fragment.chunks()) == delta.header.digest
    answer = await site.ask("GET", path(0, 2, "snapshot"))
    with open_container(answer.body, fragment) as snapshot:
        assert (snapshot.header.kind, snapshot.header.version, snapshot.header.codec) == ("snapshot", 2, "fp32")
        assert snapshot.decode().tobytes() == np.asarray(flat).tobytes()
    document = (await fleet.get("/v1/versions")).json
    assert document["fragments"][0]["digest"] == digest_flat(flat, fragment.chunks())


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
async def test_what_is_immutable_says_so_and_can_be_revalidated_and_resumed(fleet: Any, kind: str) -> None:
    site = await merged(fleet)
    whole = await site.ask("GET", path(0, 1, kind))
    tag = whole.headers["ETag"]
    assert whole.status == 200
    assert whole.headers["Cache-Control"] == IMMUTABLE
    assert whole.headers["Content-Type"] == "application/octet-stream"
    assert (await site.ask("GET", path(0, 1, kind))).headers["ETag"] == tag

    same = await site.ask("GET", path(0, 1, kind), headers={"If-None-Match": tag})
    assert (same.status, same.body) == (304, b"")
    assert same.headers["Cache-Control"] == IMMUTABLE
    other = await site.ask("GET", path(0, 1, kind), headers={"If-None-Match": '"other"'})
    assert (other.status, other.body) == (200, whole.body)

    half = len(whole.body) // 2
    first = await site.ask("GET", path(0, 1, kind), headers={"Range": f"bytes=0-{half - 1}"})
    rest = await site.ask("GET", path(0, 1, kind), headers={"Range": f"bytes={half}-"})
    assert (first.status, rest.status) == (206, 206)
    assert first.headers["Content-Range"] == f"bytes 0-{half - 1}/{len(whole.body)}"
    assert first.body + rest.body == whole.body
    beyond = await site.ask("GET", path(0, 1, kind), headers={"Range": f"bytes={len(whole.body)}-"})
    assert beyond.status == 416


async def test_etags_are_the_digests_of_the_bytes(fleet: Any) -> None:
    """A tag that changed with a file's time would make every cache fetch again after a restart; and a site can tell
    whether what it got is whole."""
    site = await merged(fleet)
    delta = await site.ask("GET", path(0, 1, "delta"))
    assert delta.headers["ETag"] == f'"{blob_digest(delta.body)}"'
    snapshot = await site.ask("GET", path(0, 1, "snapshot"))
    assert snapshot.headers["ETag"] == f'"{blob_digest(snapshot.body)}"'


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
async def test_a_cache_can_ask_whether_a_site_may_have_an_object_without_its_bytes(fleet: Any, kind: str) -> None:
    """What deploy/nginx/isthmus-cache.conf relies on: the same refusals, the same tag, and no bytes counted as sent."""
    site = await merged(fleet)
    whole = await site.ask("GET", path(0, 1, kind))
    sent = fleet.coordinator.metrics.registry.get_sample_value("isthmus_bytes_out_total", {"site": site.name})
    asked = await site.ask("HEAD", path(0, 1, kind))
    assert (asked.status, asked.body, asked.headers["ETag"]) == (200, b"", whole.headers["ETag"])
    assert fleet.coordinator.metrics.registry.get_sample_value("isthmus_bytes_out_total", {"site": site.name}) == sent
    assert (await site.ask("HEAD", path(0, 2, kind))).status == 404
    assert (await site.ask("HEAD", path(0, 1, kind), params={"run": "another"})).status == 409
    assert (await site.ask("HEAD", path(0, 1, kind), headers={"Authorization": "Bearer wrong"})).status == 401

    unsent = await site.ask("GET", path(0, 1, kind), headers={"If-None-Match": "*"})
    assert (unsent.status, unsent.body) == (304, b"")


async def test_a_cache_waits_for_a_delta_without_its_bytes(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    waiting = asyncio.create_task(site.ask("HEAD", path(0, 1, "delta"), params={"wait": "60"}))
    await someone_waits(fleet)
    await site.contribute(0, 0)
    assert (await waiting).headers["ETag"] == (await site.published(0, 1)).headers["ETag"]


async def test_a_delta_can_be_revalidated_by_its_digest(fleet: Any) -> None:
    site = await merged(fleet)
    digest = blob_digest((await site.published(0, 1)).body)
    answer = await site.ask("GET", path(0, 1, "delta"), headers={"If-None-Match": f'"{digest}"'})
    assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", f'"{digest}"')


async def test_a_delta_that_is_no_longer_kept_sends_the_site_to_a_snapshot(serve: Any) -> None:
    fleet = await serve(store={"checkpoint_versions": 1, "keep_versions": 1, "keep_checkpoints": 1})
    site = await merged(fleet, versions=3)
    for fragment in range(2):
        async with fleet.coordinator._steady[fragment]:
            pass  # the checkpoint of the newest version, and what it prunes
    for version in (0, 1, 2):
        answer = await site.ask("GET", path(0, version, "delta"))
        assert answer.is_problem(410, "version-gone")
        assert "snapshot" in answer.json["detail"]
        assert answer.json["version"] == 3
    assert (await site.ask("GET", path(0, 3, "delta"))).status == 200
    assert (await site.ask("GET", path(0, 3, "snapshot"))).status == 200
    held = [each for each in (fleet.state / "blobs").rglob("*") if each.is_file()]
    assert len(held) == 1, "the newest delta; what was merged and checkpointed is gone"


async def test_an_old_snapshot_stays_for_a_while_and_is_then_gone(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    site = await merged(fleet, versions=1)
    caplog.set_level("WARNING")
    assert (await site.ask("GET", path(0, 0, "snapshot"))).is_problem(410, "version-gone"), "nobody asked in time"
    first = await site.ask("GET", path(0, 1, "snapshot"))
    for base in range(1, SNAPSHOTS_KEPT + 1):
        await site.contribute(0, base)
        await site.published(0, base + 1)
        await site.ask("GET", path(0, base + 1, "snapshot"))
        again = await site.ask("GET", path(0, 1, "snapshot"))
        if base < SNAPSHOTS_KEPT:
            assert again.body == first.body
        else:
            assert again.is_problem(410, "version-gone")
    assert len(list((fleet.state / "snapshots").iterdir())) == SNAPSHOTS_KEPT
    assert caplog.messages == [], "whoever joins a run that moves on is sent from one version to the next"


async def test_a_snapshot_that_the_disk_refuses_is_a_507_and_can_be_asked_again(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = await fleet.trains("eu")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shared.files.Disk.put_as", full)
        assert (await site.ask("GET", path(0, 0, "snapshot"))).is_problem(507, "storage")
    assert (await site.ask("GET", path(0, 0, "snapshot"))).status == 200


async def test_those_who_wait_are_sent_away_when_the_coordinator_stops(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    waiting = asyncio.create_task(site.ask("GET", path(0, 1, "delta"), params={"wait": "60"}))
    await someone_waits(fleet)
    fleet.coordinator.publication.close()
    assert (await waiting).is_problem(503, "stopping")


async def test_a_joiner_catches_up_with_a_run_that_moves_on_while_it_asks(fleet: Any) -> None:
    """Whatever version it asks for, the refusal names one whose snapshot is there to be had, however late it comes."""
    (site,) = await fleet.trains("eu")
    for base in range(3):
        await site.contribute(0, base)
        await site.published(0, base + 1)
    gone = await site.ask("GET", path(0, 1, "snapshot"))
    assert gone.is_problem(410, "version-gone")
    named = gone.json["version"]
    await site.contribute(0, 3)
    await site.published(0, 4)
    assert (await site.ask("GET", path(0, named, "snapshot"))).status == 200
