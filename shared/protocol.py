"""The messages between sites and the coordinator (msgpack over HTTP), and the refusal codes.

A message is a frozen pydantic model; `pack` and `unpack` are the only way onto and off the wire, so
nothing unknown, oversized or non-finite gets past them. On its way a body goes with its `content_digest`: with a byte
that a link or a proxy changed it may be another report, or other orders, and would be believed. Refusals travel as
problem documents (RFC 9457, `application/problem+json`) whose `code` is one of `Code`: stable, counted, documented.
"""

from __future__ import annotations

import base64
import hashlib
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import FormatError
from shared.names import PARTICIPANT_NAME

PROTOCOL = 7
MEDIA_TYPE = "application/msgpack"
PROBLEM_TYPE = "application/problem+json"
SITE_HEADER = "Isthmus-Site"
"""Names the calling site, or learner of a site, on every request; the token in `Authorization: Bearer` must be that
site's."""

DIGEST_HEADER = "Content-Digest"

PART_BYTES = 4 << 20
"""The largest part of a contribution; the coordinator writes parts to disk as they come in."""
SMALLEST_PART_BYTES = 64 << 10
"""A site with a slow link may ask for parts as small as this."""
INLINE_BYTES = 1 << 20
"""A contribution up to this size is one request, which the coordinator holds in memory."""
MOST_SHARDS, MOST_LEASES = 1 << 16, 1 << 12
MOST_FACTS, FACT_NAME, FACT_VALUE = 16, 32, 128
"""Of a task's fingerprint: how many facts, and the most characters of a name and of a value."""
MESSAGE_BYTES = 1 << 20
"""The largest msgpack message that carries no tensor bytes."""

Name = Annotated[str, Field(pattern=PARTICIPANT_NAME)]
RunId = Annotated[str, Field(min_length=1, max_length=128)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Bytes per second."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
BlobDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=FACT_NAME)], Annotated[str, Field(max_length=FACT_VALUE)]],
    Field(max_length=MOST_FACTS),
]
"""What the run's task said of itself as the run began (`shared.task.Task.fingerprint`)."""


class Code(StrEnum):
    """Why something was refused. What a site does about each stands in docs/protocol.md."""

    BAD_REQUEST = "bad-request"
    CUT = "cut"
    TOO_LARGE = "too-large"
    NOT_FOUND = "not-found"
    UNAUTHORIZED = "unauthorized"
    NOT_YOUR_SITE = "not-your-site"
    TOO_MANY_LEARNERS = "too-many-learners"
    WRONG_PROTOCOL = "wrong-protocol"
    WRONG_RUN = "wrong-run"
    NOT_A_MEMBER = "not-a-member"
    SUPERSEDED = "superseded"
    RUN_FINISHED = "run-finished"
    UNKNOWN_BASE = "unknown-base"
    WRONG_BASE = "wrong-base"
    WRONG_CODEC = "wrong-codec"
    TOO_STALE = "too-stale"
    ALREADY_CONTRIBUTED = "already-contributed"
    WRONG_LAYOUT = "wrong-layout"
    WRONG_DATA = "wrong-data"
    MALFORMED = "malformed"
    WRONG_DIGEST = "wrong-digest"
    INCOMPLETE = "incomplete"
    UNKNOWN_UPLOAD = "unknown-upload"
    NOT_PUBLISHED = "not-published"
    VERSION_GONE = "version-gone"
    STORAGE = "storage"
    STOPPING = "stopping"
    INTERNAL = "internal"


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardMessage(Message):
    index: Count
    count: Annotated[int, Field(ge=1, le=10**6)]
    seed: Count


class Join(Message):
    """A site asks to take part. `software` is for the operator's eyes (versions, device)."""

    protocol: int
    site: Name
    software: dict[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=128)]] = Field(max_length=16)


class FragmentVersion(Message):
    """Where a fragment stands: its published version, that version's digest, the tokens merged into it, and
    the base version of this site's last accepted contribution (−1: none)."""

    version: Count
    digest: Digest
    tokens: Count
    contributed: Annotated[int, Field(ge=-1, le=10**15)]


class AwaitedRound(Message):
    """The open round that becomes `version` of `fragment`."""

    fragment: Count
    version: Count


class Manifest(Message):
    """What a site's data is cut into: the sequences of each shard, and a digest of what they are."""

    run: RunId
    digest: Digest
    sizes: Annotated[list[Annotated[int, Field(ge=1, le=10**15)]], Field(min_length=1, max_length=MOST_SHARDS)]


class DataReport(Message):
    """How a site stands with its leases: it has `left` sequences to train, wants `want`, and cannot do with less than
    `least`. `holding` are the numbers of the leases that it is training or will, `finished` of those that it has
    trained and that are not all in the model yet; `newest` is the highest that it has seen (-1: none)."""

    want: Annotated[int, Field(ge=0, le=10**15)]
    least: Annotated[int, Field(ge=0, le=10**15)]
    left: Annotated[int, Field(ge=0, le=10**18)]
    newest: Annotated[int, Field(ge=-1, le=1 << 40)]
    holding: Annotated[list[Count], Field(max_length=MOST_LEASES)]
    finished: Annotated[list[Count], Field(max_length=MOST_LEASES)]


class ShardLease(Message):
    """The site trains this shard in this epoch, from sequence `start` on. No other lease has this `number`, and later
    ones have higher ones."""

    number: Count
    epoch: Count
    shard: Count
    start: Count


class DataOrders(Message):
    """All leases of the site below `next_number`, in the order in which it got them; and the numbers of those that it
    named and that are not its own any more."""

    next_number: Count
    leases: list[ShardLease]
    withdrawn: list[Count]


class Orders(Message):
    """What the coordinator wants of a site from now on; part of every answer on the control connection.

    `peers`: inner steps of the run for each one of this site. `pace` or `peers` None: as it was. `awaited`: rounds that
    wait for this site while it may be waiting itself (of one of several coordinators: all open rounds without it, for
    none of them knows what it waits for); `closing`: rounds that have their quorum without it and close soon.
    """

    started: bool
    finished: bool
    peers: Annotated[float, Field(ge=1, le=1e7, allow_inf_nan=False)] | None
    pace: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] | None
    shard: ShardMessage
    tokens: Count
    evaluate: bool
    awaited: list[AwaitedRound]
    closing: list[AwaitedRound]
    data: DataOrders | None


class Joined(Message):
    """`lineage`: the name that the run began with; it differs from `run` after a restore from a mirror. `shard`: which
    of the run's coordinators this one is (0 where it is alone); layout and fragments are those that it owns."""

    run: RunId
    lineage: RunId
    session: Annotated[str, Field(max_length=64)]
    config: dict[str, Any]
    layout: list[list[tuple[str, list[Count]]]]
    fragments: list[FragmentVersion]
    lease_seconds: Seconds
    orders: Orders
    shard: Count
    fingerprint: Fingerprint


class Preview(Message):
    """What `Joined` would hold, for a site that only looks."""

    run: RunId
    config: dict[str, Any]
    layout: list[list[tuple[str, list[Count]]]]
    versions: list[Count]
    sites: Count
    shard: Count
    fingerprint: Fingerprint


class Evaluation(Message):
    """Mean loss (nats) of the published weights on the held-out set, and the tokens merged into them."""

    tokens: Count
    loss: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Heartbeat(Message):
    """Sent on a connection of its own. `step_seconds` is the median inner step; 0 where not yet measured.
    `evaluates`: the site has held-out data, and may be asked to evaluate the published weights. `download_rate`: what
    its link brought while it took the last large delta or snapshot of this coordinator; None before the first."""

    run: RunId
    session: Annotated[str, Field(max_length=64)]
    state: Literal["preparing", "ready", "training"]
    steps: Count
    tokens: Count
    step_seconds: Seconds
    overlap_seconds: Seconds
    sync_seconds: Seconds
    training_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    download_rate: Rate | None
    loss: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | None
    evaluation: Evaluation | None
    repairs: Count
    evaluates: bool
    data: DataReport | None


class Leave(Message):
    run: RunId
    session: Annotated[str, Field(max_length=64)]


class OpenUpload(Message):
    """Announces a contribution of `size` bytes in `codec`. `body` holds all of it where it is small. `part_size`: the
    largest parts that the site wants to send; an upload that is open already can be cut finer, never coarser."""

    run: RunId
    site: Name
    session: Annotated[str, Field(max_length=64)]
    fragment: Count
    base_version: Count
    codec: Annotated[str, Field(max_length=32)]
    size: Count
    digest: BlobDigest
    part_size: Count
    body: bytes | None


class Outcome(Message):
    """What became of a contribution that was not refused: the version that will contain it."""

    accepted: bool
    version: Count


class Upload(Message):
    """An open upload: where to PUT its parts, which are here already, and its outcome once there is one."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    part_size: Count
    parts: list[Count]
    outcome: Outcome | None


M = TypeVar("M", bound=Message)


def pack(message: Message) -> bytes:
    """The message as msgpack."""
    packed: bytes = msgpack.packb(message.model_dump(mode="python"))
    return packed


def unpack(kind: type[M], data: bytes, limit: int = MESSAGE_BYTES) -> M:
    """`data` as a message of `kind`. Raises FormatError naming the field that is wrong."""
    if len(data) > limit:
        raise FormatError(f"a message of {len(data)} bytes; at most {limit} are read")
    try:
        fields = msgpack.unpackb(data, use_list=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FormatError(f"the body is not msgpack: {str(error) or type(error).__name__}") from None
    try:
        return kind.model_validate(_pairs(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise FormatError(f"{where}: {first['msg']}") from None


def content_digest(data: bytes) -> str:
    """What the header `DIGEST_HEADER` says of a body (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def is_damaged(data: bytes, digests: str | None) -> bool:
    """Whether a body is not what its header `DIGEST_HEADER` says. Digests of other kinds say nothing here."""
    named = [digest.strip() for digest in (digests or "").split(",")]
    ours = [digest for digest in named if digest.startswith("sha-256=")]
    return bool(ours) and content_digest(data) not in ours


def _pairs(fields: object) -> object:
    """msgpack has lists only; the layout's rows are (name, shape) pairs."""
    if isinstance(fields, dict) and isinstance(fields.get("layout"), list):
        fields["layout"] = [
            [tuple(row) if isinstance(row, list) else row for row in tensors] if isinstance(tensors, list) else tensors
            for tensors in fields["layout"]
        ]
    return fields
