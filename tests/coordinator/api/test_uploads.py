"""A contribution from its announcement to its acknowledgement: whatever comes, in whatever order."""

from __future__ import annotations

import asyncio
import errno
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from coordinator import uploads
from coordinator.api.errors import STATUS
from coordinator.intake import LARGEST_NORM, Intake
from coordinator.refused import Refused
from coordinator.store.journal import Journal
from shared.codecs import CODECS
from shared.protocol import Code, Outcome, Upload, unpack
from shared.wire import Buffer, blob_digest, container_bound

PART = 64
UNKNOWN = "0" * 32


@pytest.fixture
def small_parts(fleet: Any) -> int:
    """Parts of 64 bytes, so that a tiny contribution has several."""
    fleet.coordinator.intake.uploads.part_bytes = PART
    return PART


def parts_of(body: bytes) -> list[bytes]:
    return [body[at : at + PART] for at in range(0, len(body), PART)]


async def opened(site: Any, body: bytes, **more: Any) -> Upload:
    answer = await site.offer(body, inline=False, **more)
    assert answer.status == 200, answer.body
    return unpack(Upload, answer.body)


async def put(site: Any, id_: str, part: int, data: bytes) -> Any:
    return await site.ask("PUT", f"/v1/contributions/{id_}/parts/{part}", data)


async def commit(site: Any, id_: str) -> Any:
    return await site.ask("POST", f"/v1/contributions/{id_}/commit", b"")


def outcome(answer: Any) -> Outcome:
    assert answer.status == 200, answer.body
    return unpack(Outcome, answer.body)


async def goes_on(site: Any, fragment: int = 1) -> None:
    """The daemon takes a good contribution and publishes it."""
    assert not site.fleet.coordinator.failure.done()
    assert (await site.contribute(fragment, 0)).version == 1
    await site.published(fragment, 1)


# ---- what should work


async def test_a_small_contribution_is_one_request(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.contribute(0, 0)).version == 1
    await site.published(0, 1)
    stored = fleet.coordinator.reader.contributions(newest_of_each=True)
    assert [(s.contribution.site, s.contribution.tokens, s.contribution.steps, s.merged) for s in stored] == [
        ("eu", 10, 5, True)
    ]


async def test_parts_may_come_in_any_order_and_twice(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)
    assert (upload.part_size, upload.parts, upload.outcome) == (PART, [], None)
    parts = list(enumerate(parts_of(body)))
    assert len(parts) > 3
    shuffled = [*parts, parts[0]]
    random.Random(0).shuffle(shuffled)
    for part, data in shuffled:
        assert (await put(site, upload.id, part, data)).status == 204
    assert outcome(await commit(site, upload.id)) == Outcome(accepted=True, version=1)
    await site.published(0, 1)


async def test_parts_may_come_at_once(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)
    await asyncio.gather(*(put(site, upload.id, part, data) for part, data in enumerate(parts_of(body))))
    assert outcome(await commit(site, upload.id)).accepted


async def test_an_upload_that_is_opened_again_says_which_parts_are_here(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)
    await put(site, upload.id, 2, parts_of(body)[2])
    again = await opened(site, body)
    assert (again.id, again.parts) == (upload.id, [2])


async def test_a_commit_may_be_asked_again_at_any_time(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    body = eu.body()
    upload = unpack(Upload, (await eu.offer(body)).body)
    for _ in range(2):
        assert outcome(await commit(eu, upload.id)).accepted
    await us.contribute(0, 0)
    await eu.published(0, 1)
    assert outcome(await commit(eu, upload.id)).accepted, "and after the round has been merged"
    assert len(fleet.coordinator.reader.round(0, 1).members) == 2


async def test_an_open_may_be_asked_again_at_any_time(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    body = eu.body()
    for _ in range(3):
        assert unpack(Upload, (await eu.offer(body)).body).outcome == Outcome(accepted=True, version=1)
    await us.contribute(0, 0)
    await eu.published(0, 1)
    assert unpack(Upload, (await eu.offer(body)).body).outcome == Outcome(accepted=True, version=1)
    assert len(fleet.coordinator.reader.round(0, 1).members) == 2


async def test_many_commits_at_once_are_one_contribution(fleet: Any, small_parts: int) -> None:
    eu, _ = await fleet.trains("eu", "us")
    body = eu.body()
    upload = await opened(eu, body)
    for part, data in enumerate(parts_of(body)):
        await put(eu, upload.id, part, data)
    answers = await asyncio.gather(*(commit(eu, upload.id) for _ in range(5)))
    assert all(outcome(answer) == Outcome(accepted=True, version=1) for answer in answers)
    assert len(fleet.coordinator.reader.contributions()) == 1


async def test_an_acknowledged_contribution_is_on_disk_and_in_the_journal(fleet: Any) -> None:
    eu, _ = await fleet.trains("eu", "us")
    body = eu.body()
    await eu.offer(body)
    journal = Journal(fleet.state / "journal.sqlite", read_only=True)
    (stored,) = journal.contributions()
    journal.close()
    digest = blob_digest(body)
    assert (stored.blob, stored.size) == (digest, len(body))
    assert (fleet.state / "blobs" / digest[:2] / digest).read_bytes() == body
    assert stored.norm == pytest.approx(0.5 * np.sqrt(300), rel=0.01)
    assert list((fleet.state / "uploads").iterdir()) == []


# ---- parts and commits that cannot be


async def test_an_upload_that_nobody_opened_is_unknown(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    assert (await put(site, UNKNOWN, 0, b"x")).is_problem(404, "unknown-upload")
    assert (await commit(site, UNKNOWN)).is_problem(404, "unknown-upload")


async def test_the_upload_of_another_site_is_unknown(fleet: Any, small_parts: int) -> None:
    eu, us = await fleet.trains("eu", "us")
    body = eu.body()
    upload = await opened(eu, body)
    assert (await put(us, upload.id, 0, parts_of(body)[0])).is_problem(404, "unknown-upload")
    assert (await commit(us, upload.id)).is_problem(404, "unknown-upload")
    assert (await opened(eu, body)).parts == []


async def test_the_accepted_contribution_of_another_site_cannot_be_committed(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    upload = unpack(Upload, (await eu.offer(eu.body())).body)
    assert (await commit(us, upload.id)).is_problem(404, "unknown-upload")


async def test_parts_of_the_wrong_size_or_number_are_refused(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload, parts = await opened(site, body), parts_of(body)
    for part, data in (
        (0, parts[0][:-1]),
        (0, parts[0] + b"x"),
        (0, b""),
        (len(parts) - 1, parts[0]),
        (len(parts), b"x"),
        (999999999, b"x"),
    ):
        assert (await put(site, upload.id, part, data)).is_problem(400, "bad-request")
    assert (await opened(site, body)).parts == []
    for part, data in enumerate(parts):
        await put(site, upload.id, part, data)
    assert outcome(await commit(site, upload.id)).accepted


async def test_a_commit_before_all_parts_are_here_is_told_and_may_go_on(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload, parts = await opened(site, body), parts_of(body)
    for part, data in enumerate(parts[:-1]):
        await put(site, upload.id, part, data)
    assert (await commit(site, upload.id)).is_problem(409, "incomplete")
    await put(site, upload.id, len(parts) - 1, parts[-1])
    assert outcome(await commit(site, upload.id)).accepted


async def test_bytes_that_are_not_the_announced_ones_are_refused_and_can_be_sent_anew(
    fleet: Any, small_parts: int
) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload, parts = await opened(site, body), parts_of(body)
    for part, data in enumerate(parts):
        await put(site, upload.id, part, data if part != 1 else bytes(PART))
    assert (await commit(site, upload.id)).is_problem(400, "wrong-digest")
    assert (await commit(site, upload.id)).is_problem(404, "unknown-upload")
    assert (await opened(site, body)).parts == []
    for part, data in enumerate(parts):
        await put(site, upload.id, part, data)
    assert outcome(await commit(site, upload.id)).accepted


async def test_a_body_of_another_length_than_announced_is_refused(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    assert (await site.offer(body, size=len(body) - 1)).is_problem(400, "bad-request")
    await goes_on(site)


@pytest.mark.parametrize("size", [0, "one too many", 10**15])
async def test_a_size_that_no_contribution_can_have_is_refused(fleet: Any, size: int | str) -> None:
    (site,) = await fleet.trains("eu")
    bound = container_bound(fleet.coordinator.layout.fragments[0], "int8")
    wanted = bound + 1 if isinstance(size, str) else size
    assert (await site.offer(site.body(), size=wanted, inline=False)).is_problem(413, "too-large")
    assert list((fleet.state / "uploads").iterdir()) == []


async def test_uploads_that_never_commit_are_bounded(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    for n in range(20):
        body = site.body(value=n + 1.0)
        upload = await opened(site, body)
        await put(site, upload.id, 0, parts_of(body)[0])
    assert len(list((fleet.state / "uploads").iterdir())) == 6, "2 · fragments + 2"
    assert (await opened(site, body)).parts == [0], "the newest is among them"


# ---- contributions that the core refuses


async def test_bases_that_cannot_be_are_refused_with_the_newest_version(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    answer = await site.offer(site.body(), base=1)
    assert answer.is_problem(409, "unknown-base")
    assert answer.json["version"] == 0
    assert (await site.offer(site.body(), fragment=2)).is_problem(409, "wrong-layout")
    assert (await site.offer(site.body(), fragment=10**15)).is_problem(409, "wrong-layout")
    await site.contribute(0, 0)
    await site.published(0, 1)
    answer = await site.offer(site.body(value=2.0))
    assert answer.is_problem(409, "already-contributed")
    assert answer.json["version"] == 1


async def test_nothing_is_taken_before_the_start(serve: Any) -> None:
    fleet = await serve(run={"min_sites": 2})
    site = fleet.site("eu")
    await site.join()
    await site.beat()
    assert (await site.offer(site.body())).is_problem(400, "bad-request")


async def test_a_finished_run_takes_no_more(serve: Any) -> None:
    fleet = await serve(run={"tokens": 10})
    (site,) = await fleet.trains("eu")
    for fragment in (0, 1):
        await site.contribute(fragment, 0)
        await site.published(fragment, 1)
    assert (await site.offer(site.body(base=1), base=1)).is_problem(409, "run-finished")
    assert (await site.beat("training")).finished


async def test_a_contribution_in_a_codec_of_another_config_is_refused_before_its_bytes_travel(fleet: Any) -> None:
    """With the newest version, and as what it is, though it may also be larger than any in the run's codec."""
    (site,) = await fleet.trains("eu")
    await site.contribute(0, 0)
    await site.published(0, 1)
    bound = container_bound(fleet.coordinator.layout.fragments[0], "int8")
    for codec in ("fp32", "int4", "topk2-17"):
        body = site.body(base=1, codec=codec)
        for more in ({}, {"inline": False}, {"inline": False, "size": bound + 1}):
            answer = await site.offer(body, base=1, codec=codec, **more)
            assert answer.is_problem(409, "wrong-codec")
            assert answer.json["version"] == 1
            assert "takes int8" in answer.json["detail"]
    assert list((fleet.state / "uploads").iterdir()) == []
    assert (await site.contribute(0, 1)).version == 2


async def test_a_codec_that_nobody_knows_is_malformed(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    for codec in ("int3", "topk2-5000", ""):
        answer = await site.offer(site.body(), codec=codec)
        assert answer.is_problem(400, "malformed")
        assert f"codec {codec!r} is not known" in answer.json["detail"]
    await goes_on(site)


# ---- containers that are not what they should be


def broken(site: Any, case: str) -> tuple[bytes, str]:
    """A malformed contribution, and what its refusal says."""
    sound = site.body()
    match case:
        case "garbage":
            return b"garbage " * 10, "magic is missing"
        case "empty magic":
            return b"ISTHMUS\x02" + sound[8:], "container format 2"
        case "endless header":
            return sound[:8] + b"\xff\xff\xff\xff" + sound[12:], "header claims"
        case "no header":
            return sound[:40], "header is cut short"
        case "cut short":
            return sound[:-1], "sections end at"
        case "too long":
            return sound + b"x", "sections end at"
        case "flipped bit":
            return sound[:-1] + bytes([sound[-1] ^ 1]), "sound zstd frame"
        case "another codec":
            return site.body(codec="fp32"), "not allowed here; int8"
        case "another fragment":
            return site.body(fragment=1), "fragment 1, not 0"
        case "another tensor table":
            return site.body(tensors=[("big", [15, 20])]), "tensor table"
        case "another site":
            return site.body(site="us"), "names"
        case "another run":
            return site.body(run="other"), "names"
        case "another base":
            return site.body(base_version=7), "names"
        case "a delta":
            return site.body(kind="delta"), "names"
        case "other chunks":
            return site.body(chunk=64), "chunks of 64"
        case _:
            raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "garbage",
        "empty magic",
        "endless header",
        "no header",
        "cut short",
        "too long",
        "flipped bit",
        "another codec",
        "another fragment",
        "another tensor table",
        "another site",
        "another run",
        "another base",
        "a delta",
        "other chunks",
    ],
)
async def test_a_malformed_container_is_refused_and_touches_nothing(fleet: Any, case: str) -> None:
    (site,) = await fleet.trains("eu")
    body, says = broken(site, case)
    answer = await site.offer(body)
    assert answer.is_problem(400, "malformed"), answer.body
    assert says in answer.json["detail"]
    assert fleet.coordinator.reader.contributions(newest_of_each=True) == []
    assert list((fleet.state / "uploads").iterdir()) == []
    await site.contribute(0, 0)
    await goes_on(site)


SCALES = {"NaN": (0x7FC0, "NaN or infinite"), "infinite": (0x7F80, "NaN or infinite"), "negative": (0xBF80, "negative")}


@pytest.mark.parametrize("kind", ["NaN", "infinite", "negative", "absurd"])
async def test_a_scale_that_is_no_scale_is_refused(fleet: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (site,) = await fleet.trains("eu")
    bits, says = SCALES.get(kind, (0x7F7F, "absurd"))
    int8 = CODECS["int8"]
    real = int8.encode

    def encode(x: Any, *left: Any) -> Any:
        raw = real(x, *left)
        raw[:2] = np.array([bits], "<u2").view(np.uint8)
        return raw

    with monkeypatch.context() as patch:
        patch.setattr(int8, "encode", encode)
        body = site.body()
    answer = await site.offer(body)
    assert answer.is_problem(400, "malformed")
    assert says in answer.json["detail"]
    await goes_on(site)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
async def test_a_value_that_is_no_number_is_refused(serve: Any, codec: str) -> None:
    fleet = await serve(wire={"upload": codec, "zstd_level": 0})
    (site,) = await fleet.trains("eu")
    body = bytearray(site.body(codec=codec, zstd=False))
    body[-2:] = b"\xff\x7f"  # a NaN in each of the three
    answer = await site.offer(bytes(body))
    assert answer.is_problem(400, "malformed")
    assert "NaN" in answer.json["detail"]
    assert (await site.contribute(1, 0, codec=codec)).version == 1


async def test_a_base_that_is_not_what_was_published_is_refused(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    answer = await site.offer(site.body(digest="f" * 32))
    assert answer.is_problem(409, "wrong-base")
    assert "take a snapshot" in answer.json["detail"]
    await goes_on(site)


async def test_a_refused_container_does_not_bar_a_good_one_from_the_same_base(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.offer(site.body(digest="f" * 32))).is_problem(409, "wrong-base")
    assert (await site.contribute(0, 0)).version == 1


# ---- a disk that refuses


async def test_what_the_journal_did_not_take_is_not_acknowledged_and_can_come_again(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = await fleet.trains("eu")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.coordinator.store.journal, "accept", full)
        answer = await site.offer(site.body())
    assert answer.is_problem(507, "storage")
    assert "No space left" in answer.json["detail"]
    assert fleet.coordinator.reader.contributions(newest_of_each=True) == []
    assert fleet.coordinator.core.contributed("eu", 0) == -1
    assert (await fleet.get("/readyz")).status == 503
    assert b"isthmus_storage_faults_total 1.0" in (await fleet.get("/metrics")).body
    assert (await site.contribute(0, 0)).version == 1
    await site.published(0, 1)
    await goes_on(site)
    assert (await fleet.get("/readyz")).status == 200, "it writes again"


@pytest.mark.parametrize("where", ["coordinator.uploads.SpooledUpload.write", "coordinator.store.files.Blobs.adopt"])
async def test_a_spool_or_blob_that_the_disk_refuses_is_a_507_and_can_come_again(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (site,) = await fleet.trains("eu")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert (await site.offer(site.body())).is_problem(507, "storage")
    await site.contribute(0, 0)
    await goes_on(site)


async def test_a_version_waits_for_a_full_disk_and_is_published_once_there_is_room(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = await fleet.trains("eu")
    blobs, real, tries = fleet.coordinator.store.blobs, fleet.coordinator.store.blobs.put, []

    def full_at_first(*pieces: Buffer, **_: Any) -> str:
        tries.append(len(pieces))
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return str(real(*pieces))

    monkeypatch.setattr(blobs, "put", full_at_first)
    await site.contribute(0, 0)
    await site.published(0, 1)
    assert len(tries) == 2


async def test_memory_holds_one_delta_however_many_rounds_close(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk takes no delta, the next fragment is not stepped: its delta would wait in memory as well."""
    (site,) = await fleet.trains("eu")
    coordinator, real, tries = fleet.coordinator, fleet.coordinator.store.blobs.put, []
    stepped, refused_again, room = [], asyncio.Event(), asyncio.Event()
    execute, loop = coordinator._execute, asyncio.get_running_loop()

    def watched(fragment: int, version: int, link: float | None) -> Any:
        stepped.append(fragment)
        return execute(fragment, version, link)

    def full(*pieces: Buffer, **_: Any) -> str:
        tries.append(len(pieces))
        if room.is_set():
            return str(real(*pieces))
        if len(coordinator._merges) == 2:  # both rounds have closed, and this is tried again
            loop.call_soon_threadsafe(refused_again.set)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coordinator, "_execute", watched)
    monkeypatch.setattr(coordinator.store.blobs, "put", full)
    await site.contribute(0, 0)
    await site.contribute(1, 0)
    await refused_again.wait()
    assert stepped == [0]
    room.set()
    for fragment in (0, 1):
        await site.published(fragment, 1)
    assert stepped == [0, 1]


# ---- what a restart, a second agent or a hostile site may do


async def test_an_upload_goes_on_under_a_new_session(fleet: Any, small_parts: int) -> None:
    """A site that lost its lease in the middle of a long upload joins again and sends the rest."""
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload, parts = await opened(site, body), parts_of(body)
    await put(site, upload.id, 0, parts[0])
    await site.join()
    await site.beat("training")
    assert (await opened(site, body)).parts == [0]
    for part, data in enumerate(parts):
        await put(site, upload.id, part, data)
    assert outcome(await commit(site, upload.id)).accepted


async def test_two_contributions_from_one_base_at_once_are_one(fleet: Any) -> None:
    """As two agents of one name might send them, or one that was restarted while its first was screened."""
    eu, _ = await fleet.trains("eu", "us")
    answers = await asyncio.gather(*(eu.offer(eu.body(value=float(n))) for n in range(1, 5)))
    assert sorted(answer.status for answer in answers) == [200, 409, 409, 409]
    assert len(fleet.coordinator.reader.contributions()) == 1


async def test_what_was_screened_is_what_is_merged(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come for an upload after its screening must not get into the blob."""
    eu, _ = await fleet.trains("eu", "us")
    body = eu.body()
    real, loop, second = Intake._screen, asyncio.get_running_loop(), []

    def screen_then_overwrite(self: Intake, upload: Any, base_digest: str | None) -> Any:
        found = real(self, upload, base_digest)
        message = eu.opening(bytes(len(body)), digest=blob_digest(body))

        async def open_again() -> None:
            second.append(asyncio.ensure_future(self.open("eu", message)))
            for _ in range(1000):
                if second[0].done() or upload.path.read_bytes() != body:
                    return
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(open_again(), loop).result()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Intake, "_screen", screen_then_overwrite)
        await eu.offer(body)
        await asyncio.gather(*second, return_exceptions=True)
    (stored,) = fleet.coordinator.reader.contributions()
    assert fleet.coordinator.store.blobs.verify(stored.blob).read_bytes() == body


async def test_values_so_large_that_the_step_overflows_do_not_end_the_run(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    answer = await site.offer(site.body(value=3e38))
    assert answer.is_problem(400, "malformed")
    assert "section 0: a scale of 2.36768737e+36 is absurd" in answer.json["detail"]
    while merges := list(fleet.coordinator._merges):
        await asyncio.wait(merges)
    assert not fleet.coordinator.failure.done() or fleet.coordinator.failure.exception() is None
    await goes_on(site)


@pytest.mark.parametrize("squares", [1.01 * LARGEST_NORM**2, math.inf, math.nan])
async def test_the_norm_is_bounded_whatever_the_screening_of_sections_lets_through(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, squares: float
) -> None:
    """The second line: no section that is screened as it should be leads here."""
    (site,) = await fleet.trains("eu")
    with monkeypatch.context() as patch:
        patch.setattr(CODECS["int8"], "screen", lambda raw, elements: squares)
        answer = await site.offer(site.body())
    assert answer.is_problem(400, "malformed")
    assert "its norm is " in answer.json["detail"]
    assert "beyond 1e+18" in answer.json["detail"]
    assert fleet.coordinator.reader.contributions(newest_of_each=True) == []
    assert list((fleet.state / "uploads").iterdir()) == []
    await site.contribute(0, 0)
    await goes_on(site)


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code)
    assert all(400 <= status < 600 for status in STATUS.values())


async def test_a_part_is_written_while_it_comes_in(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many slow links hold in memory at once is a little of each part, not all of it."""
    monkeypatch.setattr("coordinator.intake.SPOOL_BYTES", 16)
    monkeypatch.setattr("coordinator.intake.LEAST_ROOM", 1)
    (site,) = await fleet.trains("eu")
    body, on_disk = site.body(), []
    upload = await opened(site, body)
    spool = fleet.coordinator.store.uploads / upload.id

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 10):
            on_disk.append(spool.stat().st_size if spool.exists() else 0)
            yield body[at : at + 10]

    await fleet.coordinator.intake.put_part("eu", upload.id, 0, pieces())
    assert on_disk[:6] == [0, 0, 20, 20, 40, 40]
    assert outcome(await commit(site, upload.id)).accepted


async def test_the_more_parts_come_in_the_less_each_may_hold(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    upload = await opened(site, site.body())
    intake, all_here, end, rooms = fleet.coordinator.intake, asyncio.Event(), asyncio.Event(), []

    async def waits() -> AsyncIterator[bytes]:
        rooms.append(intake.room)
        if len(rooms) == 600:
            all_here.set()
        await end.wait()
        yield b"more than the part has" * 4096

    parts = [asyncio.create_task(intake.put_part("eu", upload.id, 0, waits())) for _ in range(600)]
    await all_here.wait()
    assert rooms[0] == 1 << 20
    assert rooms[63] == 256 << 10
    assert rooms[599] == 64 << 10
    end.set()
    refusals = await asyncio.gather(*parts, return_exceptions=True)
    assert all(isinstance(refusal, Refused) for refusal in refusals)
    assert intake.room == 1 << 20


async def test_a_part_that_breaks_off_is_not_there_and_comes_again(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * (len(body) - 1)

    with pytest.raises(Refused) as refused:
        await fleet.coordinator.intake.put_part("eu", upload.id, 0, pieces())
    assert refused.value.code is Code.BAD_REQUEST
    assert (await commit(site, upload.id)).is_problem(409, "incomplete")
    assert (await put(site, upload.id, 0, body)).status == 204
    assert outcome(await commit(site, upload.id)).accepted


# ---- slow and half-open connections


async def stalls(first: bytes) -> AsyncIterator[bytes]:
    """A body that begins and never ends."""
    yield first
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", ["/v1/join", "/v1/contributions", "/v1/sites/eu/heartbeat"])
async def test_a_body_that_never_ends_is_let_go(fleet: Any, path: str) -> None:
    (site,) = await fleet.trains("eu")
    fleet.api.quiet_seconds = 0.05
    assert (await site.ask("POST", path, stalls(b"x"))).is_problem(408, "cut")
    fleet.api.quiet_seconds = 60.0
    await goes_on(site)


async def test_a_part_that_never_ends_is_let_go_and_the_upload_goes_on(fleet: Any, small_parts: int) -> None:
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)
    parts = parts_of(body)
    for n, data in enumerate(parts[:-1]):
        assert (await put(site, upload.id, n, data)).status == 204
    fleet.api.quiet_seconds = 0.05
    assert (await put(site, upload.id, len(parts) - 1, stalls(parts[-1][:3]))).is_problem(408, "cut")
    fleet.api.quiet_seconds = 60.0
    assert (await put(site, upload.id, len(parts) - 1, parts[-1])).status == 204
    assert outcome(await commit(site, upload.id)).accepted


# ---- how an upload is cut


async def test_a_site_may_ask_for_smaller_parts(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SMALLEST_PART_BYTES", 16)
    fleet.coordinator.intake.uploads.part_bytes = PART
    (site,) = await fleet.trains("eu")
    body = site.body()
    assert (await opened(site, body, part_size=40)).part_size == 32
    assert (await opened(site, body, part_size=1)).part_size == 16
    assert (await opened(site, body, part_size=1 << 40)).part_size == 16, "never coarser again"


async def test_what_is_here_stays_here_when_an_upload_is_cut_finer(
    fleet: Any, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SMALLEST_PART_BYTES", 16)
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload, parts = await opened(site, body), parts_of(body)
    last = len(parts) - 1
    await put(site, upload.id, 1, parts[1])
    await put(site, upload.id, last, parts[last])
    finer = await opened(site, body, part_size=PART // 2)
    assert (finer.id, finer.part_size) == (upload.id, PART // 2)
    count = -(-len(body) // (PART // 2))
    assert set(finer.parts) == {2, 3, *range(2 * last, count)}
    for n in set(range(count)) - set(finer.parts):
        await put(site, upload.id, n, body[n * PART // 2 : (n + 1) * PART // 2])
    assert outcome(await commit(site, upload.id)).accepted


async def test_a_part_of_the_old_cut_is_not_taken_for_one_of_the_new(
    fleet: Any, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SMALLEST_PART_BYTES", 16)
    (site,) = await fleet.trains("eu")
    body = site.body()
    upload = await opened(site, body)
    await opened(site, body, part_size=PART // 2)
    path = f"/v1/contributions/{upload.id}/parts/0"
    late = await site.ask("PUT", path, body[: PART // 2], params={"part_size": str(PART)})
    assert late.is_problem(404, "unknown-upload")
    assert (await opened(site, body)).parts == []
