"""The link: what is tried again, how a download that was cut goes on, when the coordinator is out of reach."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lab.simulator.loop import VirtualLoop
from shared.errors import FaultError
from shared.protocol import DIGEST_HEADER, Leave, OpenUpload, Outcome, Upload, content_digest, pack, unpack
from shared.wire import blob_digest
from site_agent import link
from site_agent.core.upload_pace import FIRST_BYTES
from site_agent.link import FAILURES, MEASURED_BYTES, Link, Refusal
from site_agent.transport import Reply, Request, TransientError, Transport

BODY = bytes(range(256)) * 40
TAG = f'"{blob_digest(BODY)}"'
WHOLE = {"etag": TAG, "content-length": str(len(BODY))}
Answer = Reply | TransientError


class Scripted(Transport):
    """Gives the answers of a script, the last one for ever, and keeps the requests."""

    url = "scripted://"

    def __init__(self, *script: Answer | Callable[[Request], Answer]) -> None:
        self.script, self.asked = list(script), list[Request]()

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, request: Request) -> Reply:
        self.asked.append(request)
        entry = self.script[0] if len(self.script) == 1 else self.script.pop(0)
        answer = entry(request) if callable(entry) else entry
        if isinstance(answer, TransientError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "backoff", lambda attempt, chance: 0.0)


def cut(at: int, *, begin: int = 0, tag: str = TAG) -> TransientError:
    """A download that stops at byte `at`, which began at `begin`."""
    headers = {"etag": tag, "content-length": str(len(BODY))}
    if begin:
        headers["content-range"] = f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}"
    return TransientError("cut", Reply(206 if begin else 200, headers, BODY[begin:at]))


def rest(request: Request) -> Reply:
    begin = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert request.headers["If-Range"] == TAG
    return Reply(206, {"etag": TAG, "content-range": f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}"}, BODY[begin:])


async def delta(*script: Answer | Callable[[Request], Answer]) -> tuple[bytes, Scripted]:
    transport = Scripted(*script)
    return await Link(transport, "eu", patience=60.0).delta(0, 1), transport


async def test_a_download_that_is_cut_goes_on_where_it_stopped() -> None:
    got, transport = await delta(cut(1000), cut(5000, begin=1000), rest)
    assert got == BODY
    assert [request.headers.get("Range") for request in transport.asked] == [None, "bytes=1000-", "bytes=5000-"]


async def test_a_download_that_only_ever_gets_on_outlasts_any_patience() -> None:
    transport = Scripted(cut(100), *(cut(at + 100, begin=at) for at in range(100, 1000, 100)), rest)
    assert await Link(transport, "eu", patience=0.0).delta(0, 1) == BODY


@pytest.mark.parametrize(
    "again",
    [
        Reply(200, WHOLE, BODY),  # a server without ranges, or an object that is another now
        Reply(206, {"etag": '"another"', "content-range": "bytes 1000-10239/10240"}, BODY[1000:]),
        Reply(206, {"etag": TAG, "content-range": "bytes 2000-10239/10240"}, BODY[2000:]),
        Reply(206, {"etag": TAG, "content-range": "bytes 1000-10239/10240"}, BODY[1000:-1]),
    ],
)
async def test_a_rest_that_does_not_fit_is_not_put_to_the_beginning(again: Reply) -> None:
    got, _ = await delta(cut(1000), again, Reply(200, WHOLE, BODY))
    assert got == BODY


async def test_an_object_that_was_damaged_on_its_way_is_fetched_again() -> None:
    damaged = bytearray(BODY)
    damaged[77] ^= 1
    got, transport = await delta(Reply(200, WHOLE, bytes(damaged)), Reply(200, WHOLE, BODY))
    assert got == BODY
    assert len(transport.asked) == 2


async def test_a_beginning_that_was_damaged_is_not_kept_for_ever() -> None:
    damaged = TransientError("cut", Reply(200, WHOLE, bytes(500)))
    got, _ = await delta(damaged, rest, Reply(200, WHOLE, BODY))
    assert got == BODY


@pytest.mark.parametrize("status", [204, 409])
async def test_an_answer_that_was_damaged_on_its_way_is_asked_for_again(status: int) -> None:
    said = b'{"code": "wrong-run", "detail": ""}'
    sealed = {DIGEST_HEADER.lower(): content_digest(said)}
    transport = Scripted(Reply(status, sealed, said.replace(b"run", b"gun")), Reply(204, {}, b""))
    linked = Link(transport, "eu", patience=60.0)
    linked.run = "r"
    await linked.leave("s", 60.0)
    assert len(transport.asked) == 2


async def test_a_message_goes_with_its_digest() -> None:
    transport = Scripted(Reply(204, {}, b""))
    linked = Link(transport, "eu", patience=60.0)
    linked.run = "r"
    await linked.leave("s", 60.0)
    (request,) = transport.asked
    assert request.body == pack(Leave(run="r", session="s"))
    assert request.headers[DIGEST_HEADER] == content_digest(request.body)


@pytest.mark.parametrize("headers", [{}, {"etag": 'W/"weak"', "content-length": "9"}, {"etag": TAG}])
async def test_what_has_no_exact_name_or_length_is_fetched_from_its_beginning(headers: dict[str, str]) -> None:
    _, transport = await delta(TransientError("cut", Reply(200, headers, BODY[:9])), Reply(200, WHOLE, BODY))
    assert "Range" not in transport.asked[1].headers


async def test_what_lasts_is_given_up_with_the_patience() -> None:
    with pytest.raises(FaultError, match="cannot be reached"):
        await Link(Scripted(TransientError("refused")), "eu", patience=0.0).delta(0, 1)


async def test_a_refusal_is_an_answer() -> None:
    problem = Reply(410, {}, b'{"code": "version-gone", "detail": "gone", "version": 7}')
    with pytest.raises(Refusal) as refused:
        await delta(problem)
    assert (refused.value.code, refused.value.version) == ("version-gone", 7)


async def test_the_coordinator_is_out_of_reach_after_a_few_failures_in_a_row_and_back_with_an_answer() -> None:
    heard: list[bool] = []
    refused = TransientError("refused")
    transport = Scripted(*[refused] * (FAILURES - 1), Reply(200, {}, b""), *[refused] * FAILURES, Reply(200, {}, b""))
    asking = Link(transport, "eu", patience=60.0)
    asking.run, asking.in_touch = "run", heard.append
    await asking.leave("session", 60.0)
    assert heard == [True]
    await asking.leave("session", 60.0)
    assert heard == [True, False, True]


MANY = bytes(range(256)) * 4096
MANY_TAG = f'"{blob_digest(MANY)}"'
MANY_WHOLE = {"etag": MANY_TAG, "content-length": str(len(MANY))}


def timed(body: bytes, seconds: float, **more: Any) -> Reply:
    return Reply(200, MANY_WHOLE, body, **{"carried": len(body), "seconds": seconds} | more)


async def measured(*script: Answer) -> float | None:
    linked = Link(Scripted(*script), "eu", patience=60.0)
    assert linked.download_rate is None
    assert await linked.delta(0, 1) in (MANY, MANY[:-1])
    return linked.download_rate


async def test_a_large_download_says_how_fast_the_link_is() -> None:
    assert len(MANY) == MEASURED_BYTES
    assert await measured(timed(MANY, 2.0)) == MEASURED_BYTES / 2
    assert await measured(timed(MANY, 2.0, carried=5 * len(MANY))) == 5 * MEASURED_BYTES / 2, "others came meanwhile"
    assert await measured(timed(MANY, 0.0)) == MEASURED_BYTES * 1e3, "out of a buffer"
    assert await measured(Reply(200, MANY_WHOLE, MANY)) is None, "nobody took the time"
    assert await measured(Reply(200, {}, MANY[:-1], len(MANY) - 1, 2.0)) is None, "too small to tell"


async def test_the_last_download_counts() -> None:
    transport = Scripted(timed(MANY, 2.0), timed(MANY, 4.0), Reply(200, {}, b"small", 5, 1.0))
    linked = Link(transport, "eu", patience=60.0)
    rates = []
    for version in (1, 2, 3):
        await linked.delta(0, version)
        rates.append(linked.download_rate)
    assert rates == [MEASURED_BYTES / 2, MEASURED_BYTES / 4, MEASURED_BYTES / 4]


async def test_a_download_that_was_cut_is_timed_by_what_it_was_on_its_way() -> None:
    """In pieces that each are too small to tell, and without the pauses between them."""
    begun, left = len(MANY) // 4, len(MANY) - len(MANY) // 4
    span = {"etag": MANY_TAG, "content-range": f"bytes {begun}-{len(MANY) - 1}/{len(MANY)}"}
    first = TransientError("cut", timed(MANY[:begun], 3.0))
    assert await measured(first, Reply(206, span, MANY[begun:], left, 5.0)) == MEASURED_BYTES / 8
    assert await measured(first, timed(MANY, 4.0)) == MEASURED_BYTES / 4, "begun anew"


class Narrow(Transport):
    """A coordinator behind a link of `rate` bytes a second, which all requests share, and a proxy that lets no request
    last a minute."""

    url = "narrow://"

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0
        self.held: dict[int, bytes] = {}
        self.part_size, self.carried = 4 << 20, 0

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, request: Request) -> Reply:
        loop = asyncio.get_running_loop()
        sent, body = 0, request.body or b""
        began = loop.time()
        while sent < len(body):  # by packets, in turn with all others
            self.free = max(self.free, loop.time()) + 1500 / self.rate
            await asyncio.sleep(self.free - loop.time())
            sent += 1500
            self.carried += 1500
            if loop.time() - began > 60.0:
                raise TransientError("504 the proxy has waited for a minute")
        if request.method == "PUT":
            assert request.query["part_size"] == str(self.part_size)
            self.held[int(request.path.rpartition("/")[2])] = body
            return Reply(204, {}, b"")
        if request.path.endswith("/commit"):
            return Reply(200, {}, pack(Outcome(accepted=True, version=1)))
        opening = unpack(OpenUpload, body)
        assert opening.body is None
        if opening.part_size < self.part_size:
            pieces = self.part_size // opening.part_size
            self.held = {
                pieces * n + k: whole[k * opening.part_size : (k + 1) * opening.part_size]
                for n, whole in self.held.items()
                for k in range(pieces)
            }
            self.part_size = opening.part_size
        upload = Upload(id="f" * 32, part_size=self.part_size, parts=sorted(self.held), outcome=None)
        return Reply(200, {}, pack(upload))


@pytest.mark.parametrize("rate", [5e3, 1e5, 1.25e6])
def test_an_upload_gets_through_a_proxy_that_cuts_at_a_minute(rate: float) -> None:
    body = bytes(range(256)) * (8 << 12)
    opening = OpenUpload(
        run="r",
        site="eu",
        session="s",
        fragment=0,
        base_version=0,
        codec="int4",
        size=len(body),
        digest=blob_digest(body),
        part_size=0,
        body=None,
    )
    narrow = Narrow(rate)
    loop = VirtualLoop(lambda: 0.0)
    try:
        loop.run_until_complete(Link(narrow, "eu", patience=60.0).contribute(opening, body))
    finally:
        loop.close()
    assert b"".join(part for _, part in sorted(narrow.held.items())) == body
    assert narrow.carried < 1.2 * len(body) + 8 * FIRST_BYTES
