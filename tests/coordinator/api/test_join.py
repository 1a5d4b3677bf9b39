"""Who gets in, as whom, and what a request must look like."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import FormatError
from shared.protocol import (
    DIGEST_HEADER,
    MESSAGE_BYTES,
    PART_BYTES,
    PROTOCOL,
    SITE_HEADER,
    DataReport,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Manifest,
    OpenUpload,
    Upload,
    content_digest,
    pack,
    unpack,
)

GARBAGE = {
    "nothing": b"",
    "text": b"hello",
    "truncated map": b"\x85\xa3run",
    "nested lists": b"\x91" * 5000,
    "a number": b"\x07",
    "an empty map": b"\x80",
    "trailing bytes": b"\x80\x80",
    "a list for a key": b"\x81\x90\x01",
    "bad utf-8": b"\x81\xa1\xff\x01",
    "a huge claimed list": b"\xdd\xff\xff\xff\xff",
    "a huge claimed string": b"\xdb\xff\xff\xff\xff",
    "a timestamp of odd size": b"\xc7\x03\xff\x01\x02\x03",
}
POSTS = ["/v1/join", "/v1/sites/eu/heartbeat", "/v1/sites/eu/leave", "/v1/contributions"]
EVERYWHERE = [
    ("POST", "/v1/join"),
    ("GET", "/v1/join"),
    ("POST", "/v1/sites/eu/heartbeat"),
    ("POST", "/v1/sites/eu/leave"),
    ("POST", "/v1/contributions"),
    ("PUT", "/v1/contributions/" + "0" * 32 + "/parts/0"),
    ("POST", "/v1/contributions/" + "0" * 32 + "/commit"),
    ("GET", "/v1/fragments/0/versions/0/snapshot"),
    ("GET", "/v1/fragments/0/versions/1/delta"),
]


async def goes_on(site: Any) -> None:
    """The daemon still takes a good contribution."""
    assert not site.fleet.coordinator.failure.done()
    outcome = await site.contribute(0, 0)
    assert outcome.version == 1
    await site.published(0, 1)


# ---- bodies


@pytest.mark.parametrize("path", POSTS)
async def test_garbage_is_refused_and_the_daemon_goes_on(fleet: Any, path: str) -> None:
    (site,) = await fleet.trains("eu")
    for name, body in GARBAGE.items():
        answer = await site.ask("POST", path, body)
        assert answer.is_problem(400, "bad-request"), name
    await goes_on(site)


async def test_every_truncation_of_a_message_is_refused(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    body = msgpack.packb(site.beating().model_dump())
    for length in range(0, len(body), 7):
        assert (await site.ask("POST", "/v1/sites/eu/heartbeat", body[:length])).is_problem(400, "bad-request")
    await goes_on(site)


async def test_a_message_that_a_link_has_changed_is_not_believed(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    sent, arrived = pack(site.beating(steps=5)), pack(site.beating(steps=6))
    sealed = {DIGEST_HEADER: content_digest(sent)}
    assert (await site.ask("POST", "/v1/sites/eu/heartbeat", arrived, headers=sealed)).is_problem(408, "cut")
    answer = await site.ask("POST", "/v1/sites/eu/heartbeat", sent, headers=sealed)
    assert answer.headers[DIGEST_HEADER] == content_digest(answer.body)
    await goes_on(site)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_seconds", float("nan")),
        ("step_seconds", float("inf")),
        ("step_seconds", -1.0),
        ("step_seconds", "fast"),
        ("steps", -1),
        ("steps", 1.5),
        ("steps", 2**63),
        ("steps", None),
        ("state", "sleeping"),
        ("training_share", 1.1),
        ("loss", float("nan")),
        ("evaluation", {"tokens": 1, "loss": float("inf")}),
        ("session", "x" * 65),
        ("run", ""),
        ("repairs", True),
        ("surprise", 1),
    ],
)
async def test_a_field_of_the_wrong_kind_is_named(fleet: Any, field: str, value: object) -> None:
    (site,) = await fleet.trains("eu")
    body = msgpack.packb(site.beating().model_dump() | {field: value})
    answer = await site.ask("POST", "/v1/sites/eu/heartbeat", body)
    assert answer.is_problem(400, "bad-request")
    assert answer.json["detail"].startswith(field)


@settings(max_examples=150)
@given(st.binary(max_size=200), st.sampled_from([Join, Heartbeat, Leave, OpenUpload, Manifest]))
def test_no_bytes_make_unpack_raise_anything_but_a_format_error(data: bytes, kind: Any) -> None:
    with pytest.raises(FormatError):
        unpack(kind, data)


any_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = [Join, Heartbeat, OpenUpload, Manifest, DataReport]
fields = sorted({"layout", *(field for kind in MESSAGES for field in kind.model_fields)})


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(fields), any_value, max_size=6), st.sampled_from(MESSAGES))
def test_no_message_makes_unpack_raise_anything_but_a_format_error(message: dict[str, Any], kind: Any) -> None:
    with contextlib.suppress(FormatError):
        unpack(kind, msgpack.packb(message))


@pytest.mark.parametrize("path", [*POSTS[:3], "/v1/contributions/" + "0" * 32 + "/commit"])
async def test_a_body_beyond_its_bound_is_refused(fleet: Any, path: str) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.ask("POST", path, bytes(MESSAGE_BYTES + 1))).is_problem(413, "too-large")
    await goes_on(site)


async def test_a_part_beyond_its_bound_is_refused(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    upload = unpack(Upload, (await site.offer(site.body(), inline=False)).body)
    path = f"/v1/contributions/{upload.id}/parts/0"
    assert (await site.ask("PUT", path, bytes(PART_BYTES + 1))).is_problem(413, "too-large")
    await goes_on(site)


async def test_a_body_without_a_length_ends_at_the_bound_too(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")

    async def endless() -> Any:
        while True:
            yield bytes(1 << 16)

    headers = site.headers
    try:
        async with fleet.client.post("/v1/join", data=endless(), headers=headers) as answer:
            assert answer.status == 413
            assert (await answer.json(content_type=None))["code"] == "too-large"
    except OSError:
        pass  # the server may hang up on the rest before its answer is read
    await goes_on(site)


async def raw(fleet: Any, text: str) -> bytes:
    """The beginning of what the server says to bytes that no HTTP client would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.client.port)
    writer.write(text.replace("\n", "\r\n").encode())
    await writer.drain()
    answer = await reader.read(1 << 16)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_length_header_that_lies_high_is_refused_before_a_byte_is_read(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    text = (
        f"POST /v1/join HTTP/1.1\nHost: x\nConnection: close\n{SITE_HEADER}: eu\nAuthorization: Bearer {site.token}\n"
    )
    answer = await raw(fleet, text + "Content-Length: 99999999999999\n\n")
    assert answer.startswith(b"HTTP/1.1 413")
    await goes_on(site)


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: -5\n\n",
        "Content-Length: many\n\n",
        "Transfer-Encoding: chunked\n\nZZ\nhello\n",
        "X: " + "y" * 100_000 + "\n\n",
        "\x01: broken\n\n",
    ],
)
async def test_broken_http_is_refused_and_the_daemon_goes_on(fleet: Any, headers: str) -> None:
    (site,) = await fleet.trains("eu")
    text = f"POST /v1/join HTTP/1.1\nHost: x\n{SITE_HEADER}: eu\nAuthorization: Bearer {site.token}\n"
    answer = await raw(fleet, text + headers)
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    await goes_on(site)


async def test_a_client_that_hangs_up_in_the_middle_does_no_harm(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    text = f"POST /v1/join HTTP/1.1\r\nHost: x\r\n{SITE_HEADER}: eu\r\nAuthorization: Bearer {site.token}\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", fleet.client.port)
    writer.write(text.encode() + b"Content-Length: 100\r\n\r\n\x83")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await goes_on(site)


async def test_a_body_that_is_not_what_its_encoding_says_is_the_senders_fault(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    answer = await site.ask("POST", "/v1/join", b"not gzip at all", headers={"Content-Encoding": "gzip"})
    await goes_on(site)
    assert answer.is_problem(400, "bad-request")


async def test_a_compressed_bomb_ends_at_the_bound(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < MESSAGE_BYTES
    answer = await site.ask("POST", "/v1/join", bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status in (413, 500)
    await goes_on(site)


# ---- names and tokens


@pytest.mark.parametrize(("method", "path"), EVERYWHERE)
async def test_nothing_for_sites_is_had_without_the_sites_own_token(fleet: Any, method: str, path: str) -> None:
    eu, us = fleet.site("eu"), fleet.site("us")
    strangers = [
        {},
        {SITE_HEADER: "eu"},
        {SITE_HEADER: "eu", "Authorization": "Bearer "},
        {SITE_HEADER: "eu", "Authorization": "Bearer wrong"},
        {SITE_HEADER: "eu", "Authorization": f"Basic {eu.token}"},
        {SITE_HEADER: "eu", "Authorization": f"Bearer {us.token}"},
        {SITE_HEADER: "unknown", "Authorization": f"Bearer {eu.token}"},
        {SITE_HEADER: "../eu", "Authorization": f"Bearer {eu.token}"},
        {SITE_HEADER: "e" * 65, "Authorization": f"Bearer {eu.token}"},
        {"Authorization": f"Bearer {eu.token}"},
    ]
    for headers in strangers:
        site = fleet.site("nobody")
        site.headers = headers
        assert (await site.ask(method, path, b"" if method != "GET" else None)).is_problem(401, "unauthorized")
    assert fleet.coordinator.core.roster == set()


async def test_a_site_cannot_act_as_another(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    assert (await eu.ask("POST", "/v1/join", eu.joining(site="us"))).is_problem(403, "not-your-site")
    beat = us.beating()
    assert (await eu.ask("POST", "/v1/sites/us/heartbeat", beat)).is_problem(403, "not-your-site")
    leave = Leave(run=fleet.run, session=us.session)
    assert (await eu.ask("POST", "/v1/sites/us/leave", leave)).is_problem(403, "not-your-site")
    assert (await eu.offer(us.body(), session=us.session, site="us")).is_problem(403, "not-your-site")
    assert "us" in fleet.coordinator.core.members.live


async def test_a_revoked_token_works_no_longer_from_the_next_request_on(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = await fleet.trains("eu")
    fleet.coordinator.store.journal.revoke_token("eu")
    answer = await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating())
    assert answer.is_problem(401, "unauthorized")
    assert answer.json["detail"].endswith("isthmus coordinator token add eu --state DIR")
    config = fleet.coordinator.config
    several = config.run.model_copy(update={"coordinators": ["https://a.example", "https://b.example"]})
    monkeypatch.setattr(fleet.coordinator, "config", config.model_copy(update={"run": several}))
    answer = await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating())
    assert answer.json["detail"].endswith("--state DIR --token-file FILE"), "it has one token for all of them"


async def test_an_insecure_coordinator_takes_a_site_at_its_word_and_still_needs_a_name(serve: Any) -> None:
    fleet = await serve(insecure=True)
    (site,) = await fleet.trains("eu")
    assert site.token is None
    await goes_on(site)
    async with fleet.client.post("/v1/join", data=b"") as answer:
        assert answer.status == 401


# ---- runs, protocols, sessions


async def test_another_protocol_is_refused_by_name(fleet: Any) -> None:
    answer = await fleet.site("eu").ask("POST", "/v1/join", fleet.site("eu").joining(protocol=PROTOCOL + 1))
    assert answer.status in (400, 401)
    site = fleet.site("us")
    answer = await site.ask("POST", "/v1/join", site.joining(protocol=PROTOCOL + 1))
    assert answer.is_problem(400, "wrong-protocol")
    assert fleet.coordinator.core.roster == set()


async def test_another_run_is_refused_everywhere(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    other = "other.000000000000"
    answers = [
        await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating(run=other)),
        await site.ask("POST", "/v1/sites/eu/leave", Leave(run=other, session=site.session)),
        await site.offer(site.body(), run=other),
        await site.ask("GET", "/v1/fragments/0/versions/1/delta", params={"run": other}),
        await site.ask("GET", "/v1/fragments/0/versions/0/snapshot", params={"run": other}),
    ]
    assert all(answer.is_problem(409, "wrong-run") for answer in answers)
    await goes_on(site)


async def test_a_heartbeat_without_a_lease_asks_to_join_again(fleet: Any) -> None:
    site = fleet.site("eu")
    answer = await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating())
    assert answer.is_problem(409, "not-a-member")


async def test_the_older_of_two_agents_is_told_that_it_was_superseded(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    old = site.session
    await site.join()
    assert site.session != old
    body = site.body()
    await site.beat()
    for answer in (
        await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating(session=old)),
        await site.ask("POST", "/v1/sites/eu/leave", Leave(run=fleet.run, session=old)),
        await site.offer(body, session=old),
    ):
        assert answer.is_problem(409, "superseded")
    await site.beat()
    await goes_on(site)


async def test_a_join_that_was_held_up_or_repeated_ends_no_session(fleet: Any) -> None:
    """A session begins with its first heartbeat, and the agent behind a stray join sends none."""
    (site,) = await fleet.trains("eu")
    session = site.session
    stray = await site.join()
    assert stray.session != session
    site.session = session
    await site.beat()
    await goes_on(site)


async def test_a_session_that_was_given_out_before_the_newest_never_begins(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    first, second = (await site.join()).session, (await site.join()).session
    site.session = second
    await site.beat()
    assert (await site.ask("POST", "/v1/sites/eu/heartbeat", site.beating(session=first))).is_problem(
        409, "not-a-member"
    )
    await site.beat()


async def test_a_join_gets_all_that_a_site_needs(fleet: Any) -> None:
    site = fleet.site("eu")
    joined = await site.join()
    assert joined.run == fleet.run
    assert joined.config["run"]["name"] == "tiny"
    assert joined.layout == [[("big", [20, 15])], [("small", [12])]]
    assert [(f.version, f.contributed) for f in joined.fragments] == [(0, -1), (0, -1)]
    assert joined.lease_seconds == 30.0
    assert (joined.orders.started, joined.orders.shard.index, joined.orders.shard.count) == (False, 0, 1)
    orders = await site.beat()
    assert orders.started
    await site.contribute(0, 0)
    await site.published(0, 1)
    again = await site.join()
    assert [(f.version, f.contributed) for f in again.fragments] == [(1, 0), (0, -1)]


async def test_sites_with_different_torch_versions_train_in_one_run(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What must agree is the layout and the fingerprint; software is for the operator's eyes."""
    caplog.set_level(logging.INFO)
    eu, us = fleet.site("eu"), fleet.site("us")
    for site, torch in ((eu, "2.13.0+cu130"), (us, "2.7.1.post2+cpu")):
        answer = await site.ask("POST", "/v1/join", site.joining(software={"torch": torch}))
        site.session = unpack(Joined, answer.body).session
        assert f"site {site.name} joins (torch {torch})" in caplog.messages
    for state in ("ready", "training"):
        for site in (eu, us):
            await site.beat(state)
    assert (await eu.contribute(0, 0)).version == (await us.contribute(0, 0)).version == 1
    await us.published(0, 1)


async def test_a_site_that_only_looks_does_not_join(fleet: Any) -> None:
    site = fleet.site("eu")
    assert (await site.ask("GET", "/v1/join")).status == 200
    assert fleet.coordinator.core.roster == set()


async def test_a_site_that_left_is_out(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.ask("POST", "/v1/sites/eu/leave", Leave(run=fleet.run, session=site.session))).status == 204
    assert (await site.offer(site.body())).is_problem(409, "not-a-member")


async def test_bytes_that_arrive_renew_the_lease(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    member = fleet.coordinator.core.members.live["eu"]
    upload = unpack(Upload, (await site.offer(site.body(), inline=False)).body)
    member.lease_until = before = fleet.coordinator.clock() + 1.0
    await site.ask("PUT", f"/v1/contributions/{upload.id}/parts/0", b"bytes")
    assert member.lease_until > before


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/v1/contributions/xyz", 404, "not-found"),
        ("GET", "/v1/fragments/x/versions/1/delta", 404, "not-found"),
        ("GET", "/v1/fragments/-1/versions/1/delta", 404, "not-found"),
        ("GET", "/v1/fragments/0/versions/99999999999999999999/delta", 404, "not-found"),
        ("DELETE", "/v1/join", 400, "bad-request"),
        ("PUT", "/metrics", 400, "bad-request"),
    ],
)
async def test_a_path_that_is_not_there_is_a_problem_document_too(
    fleet: Any, method: str, path: str, status: int, code: str
) -> None:
    assert (await fleet.site("eu").ask(method, path)).is_problem(status, code)
