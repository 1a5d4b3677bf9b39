from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FormatError
from shared.protocol import (
    MESSAGE_BYTES,
    PART_BYTES,
    PROTOCOL,
    AwaitedRound,
    Code,
    DataOrders,
    DataReport,
    Evaluation,
    FragmentVersion,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Manifest,
    Message,
    OpenUpload,
    Orders,
    Outcome,
    Preview,
    ShardLease,
    ShardMessage,
    Upload,
    content_digest,
    is_damaged,
    pack,
    unpack,
)

SHARD = ShardMessage(index=1, count=4, seed=9)
AWAITED = AwaitedRound(fragment=0, version=7)
ORDERS = Orders(
    started=True,
    finished=False,
    peers=1.875,
    pace=3.75,
    shard=SHARD,
    tokens=10**15,
    evaluate=False,
    awaited=[AWAITED],
    closing=[AWAITED],
    data=None,
)
VERSION = FragmentVersion(version=5, digest="0" * 32, tokens=1000, contributed=-1)
EVALUATION = Evaluation(tokens=5, loss=1.25)
DATA = DataReport(want=200, least=16, left=40, newest=5, holding=[5], finished=[4, 2])
LEASED = DataOrders(next_number=9, leases=[ShardLease(number=4, epoch=0, shard=5, start=17)], withdrawn=[3])
MANIFEST = Manifest(run="r", digest="0" * 32, sizes=[5, 4])
HEARTBEAT = Heartbeat(
    run="r",
    session="s",
    state="training",
    steps=1,
    tokens=2,
    step_seconds=0.5,
    overlap_seconds=0.0,
    sync_seconds=1e9,
    training_share=1.0,
    download_rate=None,
    loss=None,
    evaluation=EVALUATION,
    repairs=0,
    evaluates=True,
    data=DATA,
)
OUTCOME = Outcome(accepted=True, version=4)
OPENING = OpenUpload(
    run="r",
    site="eu-west",
    session="s",
    fragment=0,
    base_version=3,
    codec="int4",
    size=3,
    digest="a" * 64,
    part_size=1 << 18,
    body=b"\x00\xff\x80",
)
UPLOAD = Upload(id="f" * 32, part_size=PART_BYTES, parts=[0, 2], outcome=None)
LAYOUT: list[list[tuple[str, list[int]]]] = [[("a", [2, 3]), ("b", [])], [("c", [5])]]
JOINED = Joined(
    run="r",
    lineage="q",
    session="s",
    config={"run": {"name": "x", "tokens": 5, "lr": 1e-3, "on": True}},
    layout=LAYOUT,
    fragments=[VERSION, VERSION],
    lease_seconds=30.0,
    orders=ORDERS,
    shard=1,
    fingerprint={"tokenizer": "91bc"},
)
MESSAGES: list[Message] = [
    SHARD,
    Join(protocol=PROTOCOL, site="eu-west", software={"torch": "2.6"}),
    VERSION,
    AWAITED,
    ORDERS,
    ORDERS.model_copy(update={"data": LEASED}),
    MANIFEST,
    DATA,
    LEASED,
    LEASED.leases[0],
    JOINED,
    Preview(run="r", config={}, layout=LAYOUT, versions=[1, 2], sites=0, shard=0, fingerprint={}),
    EVALUATION,
    HEARTBEAT,
    HEARTBEAT.model_copy(update={"loss": 2.5, "evaluation": None, "download_rate": 1.25e6}),
    Leave(run="r", session=""),
    OPENING,
    OPENING.model_copy(update={"site": "eu-west~910b"}),
    OPENING.model_copy(update={"body": None}),
    OUTCOME,
    UPLOAD,
    UPLOAD.model_copy(update={"outcome": OUTCOME}),
]


def unpack_changed(message: Message, **fields: object) -> Message:
    return unpack(type(message), msgpack.packb({**msgpack.unpackb(pack(message)), **fields}))


def test_a_body_that_is_not_what_its_digest_says_is_damaged() -> None:
    # RFC 9530, appendix B.1
    body = b'{"hello": "world"}\n'
    digest = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
    assert content_digest(body) == digest
    assert not is_damaged(body, digest)
    assert not is_damaged(body, f"unixsum=:bQ==:, {digest}")
    assert is_damaged(body[:-1], digest)
    assert not is_damaged(body, None)
    assert not is_damaged(body, "sha-512=:YQ==:"), "no other kind is looked at"


def test_the_list_above_holds_every_message() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__subclasses__())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert unpack(type(message), pack(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_an_unknown_field_is_refused_by_name(message: Message) -> None:
    with pytest.raises(FormatError, match=r"^surprise: Extra inputs are not permitted$"):
        unpack_changed(message, surprise=1)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_missing_field_is_refused_by_name(message: Message) -> None:
    for name, field in type(message).model_fields.items():
        fields = msgpack.unpackb(pack(message))
        del fields[name]
        if field.is_required():
            with pytest.raises(FormatError, match=rf"^{name}: Field required$"):
                unpack(type(message), msgpack.packb(fields))
        else:
            unpack(type(message), msgpack.packb(fields))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_field_of_another_kind_is_refused_by_name(message: Message) -> None:
    for name in type(message).model_fields:
        for wrong in ({"x": {}}, [[[]]], b"\xff", math.nan):
            if (name, wrong) == ("body", b"\xff") or (
                name in ("config", "software", "fingerprint") and isinstance(wrong, dict)
            ):
                continue
            with pytest.raises(FormatError, match=rf"^{name}[.:]"):
                unpack_changed(message, **{name: wrong})


@pytest.mark.parametrize(
    ("message", "fields", "where"),
    [
        (SHARD, {"index": -1}, "index"),
        (SHARD, {"count": 0}, "count"),
        (SHARD, {"count": 10**6 + 1}, "count"),
        (SHARD, {"seed": 10**15 + 1}, "seed"),
        (SHARD, {"seed": 1.0}, "seed"),
        (SHARD, {"seed": True}, "seed"),
        (SHARD, {"seed": "1"}, "seed"),
        (MESSAGES[1], {"site": "EU"}, "site"),
        (MESSAGES[1], {"site": ""}, "site"),
        (MESSAGES[1], {"site": "../etc"}, "site"),
        (MESSAGES[1], {"site": "a" * 65}, "site"),
        (MESSAGES[1], {"site": "eu-west\n"}, "site"),
        (MESSAGES[1], {"site": "eu-west~"}, "site"),
        (MESSAGES[1], {"site": "~910b"}, "site"),
        (MESSAGES[1], {"site": "eu-west~910b~a"}, "site"),
        (MESSAGES[1], {"site": "eu-west~910B"}, "site"),
        (MESSAGES[1], {"site": "eu-west~" + "a" * 33}, "site"),
        (MESSAGES[1], {"software": {"x" * 33: ""}}, r"software\.x{33}\.\[key\]"),
        (MESSAGES[1], {"software": {"x": "y" * 129}}, r"software\.x"),
        (MESSAGES[1], {"software": {str(i): "" for i in range(17)}}, "software"),
        (VERSION, {"digest": "0" * 31}, "digest"),
        (VERSION, {"digest": "A" * 32}, "digest"),
        (VERSION, {"digest": "0" * 32 + "\n"}, "digest"),
        (VERSION, {"contributed": -2}, "contributed"),
        (ORDERS, {"pace": 0.0}, "pace"),
        (ORDERS, {"pace": -1.0}, "pace"),
        (ORDERS, {"pace": math.nan}, "pace"),
        (ORDERS, {"pace": math.inf}, "pace"),
        (ORDERS, {"pace": 1e8}, "pace"),
        (ORDERS, {"sites": 0}, "sites"),
        (ORDERS, {"started": 1}, "started"),
        (ORDERS, {"shard": {"index": 0, "count": 1}}, r"shard\.seed"),
        (ORDERS, {"shard": {"index": 0, "count": 1, "seed": 0, "x": 0}}, r"shard\.x"),
        (JOINED, {"run": ""}, "run"),
        (JOINED, {"run": "r" * 129}, "run"),
        (JOINED, {"session": "s" * 65}, "session"),
        (JOINED, {"layout": [[["a", [-1]]]]}, r"layout\.0\.0\.1\.0"),
        (JOINED, {"layout": [[["a"]]]}, r"layout\.0\.0\.1"),
        (JOINED, {"layout": [[["a", [1], 2]]]}, r"layout\.0\.0"),
        (JOINED, {"layout": [[{"a": 1}]]}, r"layout\.0\.0"),
        (JOINED, {"layout": [7]}, r"layout\.0"),
        (JOINED, {"layout": {}}, r"layout"),
        (JOINED, {"fragments": [{"version": 1}]}, r"fragments\.0\.digest"),
        (JOINED, {"lease_seconds": -1.0}, "lease_seconds"),
        (JOINED, {"lease_seconds": math.inf}, "lease_seconds"),
        (JOINED, {"fingerprint": {str(i): "" for i in range(17)}}, "fingerprint"),
        (JOINED, {"fingerprint": {"x" * 33: ""}}, r"fingerprint\.x{33}\.\[key\]"),
        (JOINED, {"fingerprint": {"": ""}}, r"fingerprint\.\.\[key\]"),
        (JOINED, {"fingerprint": {"x": "y" * 129}}, r"fingerprint\.x"),
        (JOINED, {"fingerprint": {"x": 1}}, r"fingerprint\.x"),
        (EVALUATION, {"loss": math.nan}, "loss"),
        (EVALUATION, {"loss": 1e7}, "loss"),
        (HEARTBEAT, {"state": "asleep"}, "state"),
        (HEARTBEAT, {"step_seconds": math.nan}, "step_seconds"),
        (HEARTBEAT, {"step_seconds": 1e10}, "step_seconds"),
        (HEARTBEAT, {"sync_seconds": -0.1}, "sync_seconds"),
        (HEARTBEAT, {"training_share": 1.01}, "training_share"),
        (HEARTBEAT, {"training_share": math.nan}, "training_share"),
        (HEARTBEAT, {"download_rate": 0.0}, "download_rate"),
        (HEARTBEAT, {"download_rate": -1.0}, "download_rate"),
        (HEARTBEAT, {"download_rate": math.inf}, "download_rate"),
        (HEARTBEAT, {"download_rate": math.nan}, "download_rate"),
        (HEARTBEAT, {"loss": math.inf}, "loss"),
        (HEARTBEAT, {"evaluation": {"tokens": 1, "loss": math.nan}}, r"evaluation\.loss"),
        (HEARTBEAT, {"tokens": 2**64 - 1}, "tokens"),
        (OPENING, {"codec": "x" * 33}, "codec"),
        (OPENING, {"size": -1}, "size"),
        (OPENING, {"size": 10**16}, "size"),
        (OPENING, {"digest": "a" * 63}, "digest"),
        (OPENING, {"body": "text"}, "body"),
        (UPLOAD, {"id": "../../etc/passwd"}, "id"),
        (UPLOAD, {"parts": [0, -1]}, r"parts\.1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(message: Message, fields: dict[str, object], where: str) -> None:
    with pytest.raises(FormatError, match=rf"^{where}: "):
        unpack_changed(message, **fields)


def test_whole_numbers_will_do_for_seconds() -> None:
    changed = unpack_changed(HEARTBEAT, step_seconds=3)
    assert isinstance(changed, Heartbeat)
    assert changed.step_seconds == 3.0


def test_a_message_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(
        FormatError, match=rf"^a message of {MESSAGE_BYTES + 1} bytes; at most {MESSAGE_BYTES} are read$"
    ):
        unpack(Leave, bytes(MESSAGE_BYTES + 1))
    packed = pack(Leave(run="r", session="s"))
    assert unpack(Leave, packed, len(packed)).run == "r"
    with pytest.raises(FormatError, match="a message of"):
        unpack(Leave, packed, len(packed) - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\xdf\xff\xff\xff\xff",  # a map that claims 2³² − 1 entries
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 2000,
        b"\x80\x80",
        b"\x81\xa1\xff\x00",
        b"\x81\x91\x01\x00",
        b"\x81\x01\x00",
        b"<html>502 Bad Gateway</html>",
    ],
)
def test_what_is_not_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"msgpack|Input should be|Extra inputs"):
        unpack(Leave, data)


@pytest.mark.parametrize("fields", [None, 3, "text", [], [1], b"", 1.5])
def test_what_is_no_map_is_refused(fields: object) -> None:
    with pytest.raises(FormatError, match=r"^body: "):
        unpack(Leave, msgpack.packb(fields))


@given(st.sampled_from(MESSAGES), st.binary(max_size=64))
def test_no_bytes_crash_the_reader(message: Message, data: bytes) -> None:
    try:
        unpack(type(message), data)
    except FormatError:
        return


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.binary(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(MESSAGES), st.data())
def test_no_field_crashes_the_reader(message: Message, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    try:
        unpack_changed(message, **{name: data.draw(anything)})
    except FormatError:
        return


def test_refusal_codes_are_stable() -> None:
    """Sites of other versions act on these words: add, never rename."""
    assert {code.value for code in Code} >= {
        "bad-request",
        "too-large",
        "not-found",
        "unauthorized",
        "not-your-site",
        "wrong-protocol",
        "wrong-run",
        "not-a-member",
        "superseded",
        "run-finished",
        "unknown-base",
        "wrong-base",
        "wrong-codec",
        "too-stale",
        "already-contributed",
        "wrong-layout",
        "malformed",
        "wrong-digest",
        "incomplete",
        "unknown-upload",
        "not-published",
        "version-gone",
        "storage",
        "stopping",
        "internal",
    }
