"""The courier between a learner, who knows of one run, and coordinators, each of which knows only its own fragments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.codecs import codec_named
from shared.config import RunConfig, UploadCodec, WireTable, parse
from shared.errors import ConfigError, RefusedError
from shared.files import DISK
from shared.fragments import Layout
from shared.protocol import (
    AwaitedRound,
    Code,
    DataReport,
    FragmentVersion,
    Heartbeat,
    Joined,
    OpenUpload,
    Orders,
    Outcome,
    ShardMessage,
)
from shared.sharding import Slice
from shared.wire import open_container
from site_agent.branch import CONFIG_CHANGED
from site_agent.contribution import Anchor, Parcel, pack
from site_agent.core.upload_pace import UploadPace
from site_agent.courier import Courier
from site_agent.history import History
from site_agent.link import Refusal
from site_agent.metrics import Metrics
from site_agent.news import Accepted, ArrivedAnchor, Event, Failed, Ordered, Report, Touch
from site_agent.outbox import Outbox, Record

LAYOUT = Layout.from_wire([[("a", [4])], [("b", [4])], [("c", [4])]])
URLS = ["http://zero", "http://one"]
CONFIG = parse(
    RunConfig,
    {"run": {"name": "r", "tokens": 9, "coordinators": URLS}, "task": {"use": "none"}, "rounds": {"fragments": 3}},
    "run.toml",
).model_dump(mode="json", exclude={"store"})


class Coordinator:
    """Stands for a link to one of two coordinators: says what it is told to, and remembers what it was asked."""

    def __init__(self, index: int) -> None:
        self.index, self.url, self.run = index, URLS[index], f"r.{index}.x"
        self.in_touch: Callable[[bool], None] = lambda ok: None
        self.shard, self.config, self.pace = index, CONFIG, UploadPace()
        self.fingerprint = {"tokenizer": "91bc", "chat": "x"}
        self.download_rate = 1e6 * (1 + index)
        self.orders = Orders(
            started=False,
            finished=False,
            peers=1.0,
            pace=1.0 + index,
            shard=ShardMessage(index=index, count=2, seed=0),
            tokens=index,
            evaluate=False,
            awaited=[],
            closing=[],
            data=None,
        )
        self.software: dict[str, str] = {}
        self.heartbeats: list[Heartbeat] = []
        self.sent: list[tuple[OpenUpload, bytes]] = []
        self.takes = ""
        """The one codec that it takes; any where this is empty."""
        self.asked: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.member, self.left, self.closed = True, False, False

    async def __aenter__(self) -> Coordinator:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    async def join(self, software: dict[str, str], patience: float | None = None) -> Joined:
        self.software = software
        layout = Slice(self.index, 2).of_layout(LAYOUT).to_wire()
        at = FragmentVersion(version=7 + self.index, digest="0" * 32, tokens=0, contributed=-1)
        return Joined(
            run=self.run,
            lineage=self.run,
            session=f"session-{self.index}",
            config=self.config,
            layout=layout,
            fragments=[at] * len(layout),
            lease_seconds=30.0,
            orders=self.orders,
            shard=self.shard,
            fingerprint=self.fingerprint,
        )

    async def heartbeat(self, message: Heartbeat, patience: float | None = None) -> Orders:
        self.heartbeats.append(message)
        if not self.member:
            raise Refusal(Code.NOT_A_MEMBER, "no lease", None)
        return self.orders

    async def contribute(self, opening: OpenUpload, body: bytes) -> Outcome:
        self.sent.append((opening, body))
        if self.takes and opening.codec != self.takes:
            raise Refusal(Code.WRONG_CODEC, f"this run takes {self.takes}", 7)
        return Outcome(accepted=True, version=opening.base_version + 1)

    async def delta(self, fragment: int, version: int) -> bytes:
        self.asked.put_nowait((fragment, version))
        await asyncio.Event().wait()
        raise AssertionError

    async def leave(self, session: str, patience: float) -> None:
        assert session == f"session-{self.index}"
        self.left = True


@pytest.fixture
def coordinators() -> list[Coordinator]:
    return [Coordinator(0), Coordinator(1)]


@pytest.fixture
def news() -> asyncio.Queue[Event]:
    return asyncio.Queue()


@pytest.fixture
async def courier(coordinators: list[Coordinator], news: asyncio.Queue[Event]) -> AsyncIterator[Courier]:
    """Not joined yet; its heartbeats go when they are hurried."""
    connect: Any = {each.url: each for each in coordinators}.__getitem__
    courier = Courier(connect, URLS[0], "eu", Metrics(), news.put_nowait)
    courier.soon_seconds = 1e6
    courier.heartbeats_per_lease = 1
    yield courier
    await courier.leave()


def parcel(fragment: int, number: int, codec: UploadCodec = "fp32") -> Parcel:
    """Of −1, −2, −3 by fragment."""
    anchor = Anchor(7, "0" * 32, 0, np.zeros(4, np.float32))
    section = codec_named(codec).encode(np.full(4, -fragment - 1, np.float32))
    return Parcel(fragment, anchor, [section], 10, 5, number, progress=((0, 0, 3),))


async def heard(news: asyncio.Queue[Event], true: Callable[[Event], Any]) -> Event:
    """The next news of that kind."""
    while not true(event := await news.get()):
        continue
    return event


def tell(courier: Courier, index: int) -> None:
    """The next heartbeat to that coordinator goes now."""
    courier.branches[index].hurry.set()


async def test_contributions_go_to_their_fragments_home_in_its_own_numbers(
    tmp_path: Path, courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    outbox = Outbox(tmp_path / "outbox", DISK)
    courier.begin_exchange(WireTable(upload="fp32"), outbox, History(tmp_path / "versions", DISK))
    for p, (home, number) in enumerate([(0, 0), (1, 0), (0, 1)]):
        courier.send(parcel(p, number=10 + p))
        accepted = await heard(news, lambda event: isinstance(event, Accepted))
        assert isinstance(accepted, Accepted)
        assert (accepted.fragment, accepted.version) == (p, 8)
        there = coordinators[home]
        opening, body = there.sent[-1]
        assert (opening.run, opening.fragment, opening.session) == (there.run, number, f"session-{home}")
        fragment = Slice(home, 2).of_layout(LAYOUT).fragments[number]
        with open_container(body, fragment) as container:
            assert container.header.run == there.run
            assert container.decode().tolist() == [-(p + 1.0)] * 4
            assert container.header.progress == ([(0, 0, 3)] if home == 0 else []), "data is the first one's"
        assert await there.asked.get() == (number, 8)
    assert [len(each.sent) for each in coordinators] == [2, 1]
    assert outbox.load(courier.addresses) == [Record(10 + p, p, 7, 10, 5) for p in range(3)]


def sent_before(courier: Courier, outbox: Outbox, number: int, codec: UploadCodec) -> tuple[Parcel, bytes]:
    """A contribution to fragment 0 that an agent recorded before its restart, when the run's codec was another."""
    before = parcel(0, number, codec)
    body = pack(before, courier.addresses[0], WireTable(upload=codec, zstd_level=1), "eu")
    outbox.put(number, 0, body)
    return replace(before, content=body, recorded=True), body


async def test_a_recorded_contribution_in_another_codec_is_asked_for_and_then_given_up_with_its_progress_kept(
    tmp_path: Path, courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    outbox = Outbox(tmp_path / "outbox", DISK)
    courier.begin_exchange(WireTable(upload="fp32"), outbox, History(tmp_path / "versions", DISK))
    recorded, body = sent_before(courier, outbox, 3, "int4")
    coordinators[0].takes = "fp32"
    courier.send(recorded)
    event = await heard(news, lambda event: isinstance(event, Accepted | ArrivedAnchor | Failed))
    assert event == ArrivedAnchor(0, recorded.anchor, "rebase"), "no error feedback comes of it"
    ((opening, sent),) = coordinators[0].sent
    assert (opening.codec, opening.base_version, sent) == ("int4", 7, body), "it may have been accepted"
    assert outbox.load(courier.addresses) == []
    courier.send(parcel(0, 4))
    event = await heard(news, lambda event: isinstance(event, Accepted | Failed))
    assert isinstance(event, Accepted)
    assert coordinators[0].sent[-1][0].codec == "fp32"


async def test_a_recorded_contribution_in_another_codec_that_was_accepted_stays_delivered(
    tmp_path: Path, courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    outbox = Outbox(tmp_path / "outbox", DISK)
    courier.begin_exchange(WireTable(upload="fp32"), outbox, History(tmp_path / "versions", DISK))
    recorded, _ = sent_before(courier, outbox, 3, "int4")
    courier.send(recorded)
    event = await heard(news, lambda event: isinstance(event, Accepted | ArrivedAnchor | Failed))
    assert isinstance(event, Accepted)
    assert event.delivered, "what is left is what that codec lost"
    assert [record.number for record in outbox.load(courier.addresses)] == [3]


async def test_an_agent_whose_own_codec_is_refused_ends(
    tmp_path: Path, courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    """Whatever it made next would be refused as well."""
    await courier.join(1.0)
    outbox = Outbox(tmp_path / "outbox", DISK)
    courier.begin_exchange(WireTable(upload="fp32"), outbox, History(tmp_path / "versions", DISK))
    coordinators[0].takes = "int8"
    courier.send(parcel(0, 3))
    failed = await heard(news, lambda event: isinstance(event, Accepted | ArrivedAnchor | Failed))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RefusedError)
    assert failed.error.code == Code.WRONG_CODEC
    assert [record.number for record in outbox.load(courier.addresses)] == [3]


async def test_an_agent_that_lost_its_lease_to_another_config_ends(
    tmp_path: Path, courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    """It would go on with what the run no longer is."""
    await courier.join(1.0)
    coordinators[1].config = {**CONFIG, "wire": {**CONFIG["wire"], "upload": "int8"}}
    coordinators[1].member = False
    tell(courier, 1)
    failed = await heard(news, lambda event: isinstance(event, Failed))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RefusedError)
    assert failed.error.code == CONFIG_CHANGED
    assert "start this agent again" in failed.error.detail
    coordinators[1].member = True


async def test_a_join_is_one_with_all_coordinators(courier: Courier, news: asyncio.Queue[Event]) -> None:
    joined = await courier.join(1.0)
    assert joined.run == "r.0.x+r.1.x"
    assert Layout.from_wire(joined.layout) == LAYOUT
    assert [each.version for each in joined.fragments] == [7, 8, 7]
    assert isinstance(await news.get(), Ordered)
    assert news.empty(), "nothing before all were joined, and then once"


async def test_a_site_says_which_torch_it_has_as_it_joins(courier: Courier, coordinators: list[Coordinator]) -> None:
    await courier.join(1.0)
    assert [each.software["torch"] for each in coordinators] == [torch.__version__] * 2


async def test_training_starts_when_the_last_coordinator_says_so(
    courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    for index, started in ((1, False), (0, True)):
        there = coordinators[index]
        there.orders = there.orders.model_copy(
            update={"started": True, "awaited": [AwaitedRound(fragment=0, version=9)]}
        )
        tell(courier, index)
        told = await heard(news, lambda event: isinstance(event, Ordered) and event.orders.awaited)
        assert isinstance(told, Ordered)
        assert told.orders.started == started
        assert (told.orders.pace, told.orders.shard.index) == (1.0, 0), "of the first, whoever speaks"
    assert [round_.fragment for round_ in told.orders.awaited] == [0, 1]


async def test_a_lease_to_evaluate_is_news_once(
    courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    """Not again whenever another coordinator has something to say."""
    await courier.join(1.0)
    first, second = coordinators
    first.orders = first.orders.model_copy(update={"evaluate": True})
    tell(courier, 0)
    await heard(news, lambda event: isinstance(event, Ordered) and event.orders.evaluate)
    second.orders = second.orders.model_copy(update={"started": True, "closing": [AwaitedRound(fragment=0, version=9)]})
    tell(courier, 1)
    told = await heard(news, lambda event: isinstance(event, Ordered) and event.orders.closing)
    assert isinstance(told, Ordered)
    assert not told.orders.evaluate


async def test_only_the_first_coordinator_hears_of_data_and_evaluations(
    courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    data = DataReport(want=1, least=1, left=0, newest=-1, holding=[], finished=[])
    courier.report = Report("training", steps=3, data=data)
    anchors = [Anchor(1, "0" * 32, tokens, np.zeros(4, np.float32)) for tokens in (10, 999, 30)]
    courier.evaluated(anchors, 2.5)
    assert courier.evaluation is not None
    assert courier.evaluation.tokens == 20, "of the fragments of the coordinator that asked"
    for branch in courier.branches[::-1]:
        await branch.ask_orders()
    for there, first in zip(coordinators, (True, False), strict=True):
        said = there.heartbeats[-1]
        assert (said.run, said.session, said.state, said.steps) == (there.run, f"session-{there.index}", "training", 3)
        assert said.download_rate == there.download_rate, "each hears of its own link"
        assert (said.evaluates, said.data is not None, said.evaluation is not None) == (first, first, first)


async def test_out_of_touch_are_the_fragments_of_the_coordinator_that_is_silent(
    courier: Courier, coordinators: list[Coordinator], news: asyncio.Queue[Event]
) -> None:
    await courier.join(1.0)
    told = []
    for index, answers in ((1, False), (1, False), (0, True), (0, False), (1, True)):
        coordinators[index].in_touch(answers)
    while not news.empty():
        if isinstance(event := news.get_nowait(), Touch):
            told.append(set(event.silent))
    assert told == [{1}, {0, 1, 2}, {0, 2}]
    assert courier.metrics.registry.get_sample_value("isthmus_site_connected") == 0


async def test_all_coordinators_get_a_goodbye(courier: Courier, coordinators: list[Coordinator]) -> None:
    await courier.join(1.0)
    await courier.leave()
    assert [(each.left, each.closed) for each in coordinators] == [(True, True)] * 2


async def test_who_will_be_back_soon_does_not_leave(courier: Courier, coordinators: list[Coordinator]) -> None:
    """Its lease runs on, and rounds that need it wait for it."""
    await courier.join(1.0)
    await courier.leave(back_soon=True)
    assert [(each.left, each.closed) for each in coordinators] == [(False, True)] * 2


@pytest.mark.parametrize(
    ("index", "what", "says"),
    [
        (0, {"shard": 1}, "http://zero is coordinator 1 of its run, from 0, and a site joins the first"),
        (1, {"shard": 0}, "http://one is entry 1 of .* and what answers there is coordinator 0"),
        (1, {"config": {**CONFIG, "inner": {**CONFIG["inner"], "lr": 2.0}}}, "http://one serves another config"),
        (1, {"fingerprint": {"tokenizer": "3fa0", "chat": "x"}}, "http://one began with another tokenizer than the"),
        (1, {"fingerprint": {"tokenizer": "91bc"}}, "http://one began with another chat than the first coordinator"),
    ],
)
async def test_coordinators_that_do_not_belong_together_are_refused(
    courier: Courier, coordinators: list[Coordinator], index: int, what: dict[str, Any], says: str
) -> None:
    for name, value in what.items():
        setattr(coordinators[index], name, value)
    with pytest.raises(ConfigError, match=says):
        await courier.join(1.0)
    assert coordinators[index].heartbeats == [], "it takes no session away from anybody"
