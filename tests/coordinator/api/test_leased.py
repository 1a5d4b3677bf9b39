"""Shards of data on loan, as sites see it: told once they are in the journal, and as long as a site lives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from coordinator import lending
from coordinator.store.journal import Journal
from shared.protocol import DataReport, Manifest, ShardLease

SIZES = [8, 8, 8]


def manifest(fleet: Any, **changed: Any) -> Manifest:
    return Manifest.model_construct(**{"run": fleet.run, "digest": "0" * 32, "sizes": SIZES} | changed)


async def describe(site: Any, **changed: Any) -> Any:
    return await site.ask("PUT", f"/v1/sites/{site.name}/manifest", manifest(site.fleet, **changed))


def wanting(shards: int, holding: Any = (), finished: Any = (), least: int | None = None) -> DataReport:
    """Of a site that has none that is not trained, and cannot do with less than so many shards."""
    newest = max([-1, *holding, *finished])
    least = shards * SIZES[0] if least is None else least
    want = shards * SIZES[0]
    return DataReport(want=want, least=least, left=0, newest=newest, holding=list(holding), finished=list(finished))


async def leased(site: Any, report: DataReport) -> list[ShardLease]:
    orders = await site.beat("training", data=report)
    assert orders.data is not None
    return list(orders.data.leases)


def stopped_clock(fleet: Any) -> float:
    """The time, in whole seconds, so that sums are exact; from now on nobody but the test says what time it is."""
    fleet.coordinator._timekeeper.cancel()
    return float(math.ceil(fleet.coordinator.clock()))


def written(fleet: Any) -> list[tuple[int, int, str | None, tuple[int, ...]]]:
    journal = Journal(fleet.coordinator.store.journal.path, read_only=True)
    try:
        return [(e.epoch, e.shard, e.site, e.positions) for e in journal.leases()[0]]
    finally:
        journal.close()


async def test_a_site_is_leased_what_it_wants_and_told_the_same_again(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    assert (await site.beat("training", data=wanting(2))).data is None, "nobody has said what there is"
    assert (await describe(site)).status == 204
    assert (await describe(site)).status == 204
    first = await leased(site, wanting(2))
    assert len(first) == 2
    assert await leased(site, wanting(2)) == first
    assert {(e, s) for e, s, name, _ in written(fleet) if name == "eu"} == {(x.epoch, x.shard) for x in first}
    assert (await fleet.get("/v1/status")).json["data"] == {
        "epoch": 0,
        "shards": 3,
        "dealt": 2,
        "leased": 2,
        "came_back": 0,
    }


async def test_a_site_with_other_data_is_refused(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    assert (await describe(eu)).status == 204
    assert (await describe(us, digest="1" * 32)).is_problem(409, "wrong-data")
    assert (await describe(us, sizes=[8, 8])).is_problem(409, "wrong-data")
    assert (await describe(us, run="other")).is_problem(409, "wrong-run")
    assert (await describe(us, sizes=[])).is_problem(400, "bad-request")
    assert (await us.ask("PUT", "/v1/sites/eu/manifest", manifest(fleet))).is_problem(403, "not-your-site")
    assert (await describe(us)).status == 204


async def test_progress_is_journaled_with_the_contribution_that_holds_it(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    await describe(site)
    first, second = await leased(site, wanting(2))
    at = [(first.epoch, first.shard, 5)]
    assert (await site.contribute(0, 0, progress=at)).accepted
    entry = next(e for e in written(fleet) if e[1] == first.shard)
    assert entry[3] == (5, 0)
    refused = await site.offer(site.body(1, 0, progress=[(first.epoch, first.shard, 8)], tokens=0, digest="1" * 32), 1)
    assert refused.is_problem(409, "wrong-base")
    assert next(e for e in written(fleet) if e[1] == first.shard)[3] == (5, 0)
    await site.contribute(1, 0, progress=[(first.epoch, first.shard, 8)])
    await site.published(0, 1)
    await site.contribute(0, 1, progress=[(first.epoch, first.shard, 8), (second.epoch, second.shard, 3)])
    assert [(e[1], e[3]) for e in written(fleet)] == [(second.shard, (3, 0))], "the first is done"
    assert (await leased(site, wanting(0)))[0].shard == second.shard


async def test_a_dead_sites_shards_come_back_with_their_progress(fleet: Any) -> None:
    eu, us = await fleet.trains("eu", "us")
    now = stopped_clock(fleet)
    await describe(eu)
    held = await leased(eu, wanting(2))
    await eu.contribute(0, 0, progress=[(held[0].epoch, held[0].shard, 5)])
    await eu.contribute(1, 0, progress=[(held[0].epoch, held[0].shard, 4)])
    lends = fleet.coordinator.lending
    await lends.take_back({"us"}, now + 100.0)
    await lends.take_back({"us"}, now + 99.0 + lending.AWAY_SECONDS)
    assert all(name == "eu" for _, _, name, _ in written(fleet)), "it may come back"
    await lends.take_back({"us"}, now + 100.0 + lending.AWAY_SECONDS)
    assert all(name is None for _, _, name, _ in written(fleet))
    got = await leased(us, wanting(2, least=12))
    assert {(x.epoch, x.shard): x.start for x in got} == {
        (held[0].epoch, held[0].shard): 4,
        (held[1].epoch, held[1].shard): 0,
    }
    orders = await eu.beat("training", data=wanting(1, holding=[x.number for x in held]))
    assert orders.data.withdrawn == [x.number for x in held]


async def test_a_site_that_comes_back_in_time_keeps_its_shards(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    await describe(site)
    await leased(site, wanting(2))
    lends, now = fleet.coordinator.lending, stopped_clock(fleet)
    await lends.take_back(set(), now)
    await lends.take_back({"eu"}, now + 200.0)
    await lends.take_back(set(), now + 299.0)
    await lends.take_back(set(), now + 500.0)
    assert {name for _, _, name, _ in written(fleet)} == {"eu"}


async def test_leases_survive_a_restart(serve: Any) -> None:
    fleet = await serve()
    (site,) = await fleet.trains("eu")
    await describe(site)
    before = await leased(site, wanting(2))
    await fleet.coordinator.stop()
    again = await serve()
    other = again.coordinator.lending.leases
    assert other is not None
    assert [(e.epoch, e.shard) for e in other.held_by("eu")] == [(x.epoch, x.shard) for x in before]
    assert (other.dealt.epoch, other.dealt.shards, other.dealt.next_number) == (0, 2, 2)


async def test_a_disk_that_refuses_leases_nothing(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (site,) = await fleet.trains("eu")
    await describe(site)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Journal, "lease", refuse)
        assert await leased(site, wanting(2)) == [], "and the heartbeat is answered all the same"
        assert fleet.coordinator.workers.storage_fault is not None
    assert fleet.coordinator.lending.leases.entries == {}
    held = await leased(site, wanting(2))
    assert len(held) == 2
    now = stopped_clock(fleet)
    await fleet.coordinator.lending.take_back(set(), now)
    with monkeypatch.context() as full:
        full.setattr(Journal, "lease", refuse)
        await fleet.coordinator.lending.take_back(set(), now + 1000.0)
        assert await leased(site, wanting(0)) == held
    await fleet.coordinator.lending.take_back(set(), now + 1000.0)
    assert {name for _, _, name, _ in written(fleet)} == {None}


async def test_shards_of_a_site_that_trains_other_data_come_back(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    await describe(site)
    await leased(site, wanting(2))
    await site.beat("ready")
    assert {name for _, _, name, _ in written(fleet)} == {"eu"}, "it has not said yet what it trains"
    await site.beat("training")
    assert {name for _, _, name, _ in written(fleet)} == {None}


async def test_leases_that_a_site_has_seen_of_a_time_that_was_undone(fleet: Any) -> None:
    """A backup was put back: what it knows of is leased again, with numbers that the site has not seen."""
    (site,) = await fleet.trains("eu")
    await describe(site)
    held = await leased(site, wanting(2))
    report = DataReport(want=8, least=8, left=0, newest=70, holding=[69, 70], finished=[])
    again = await leased(site, report)
    assert [(x.shard, x.number) for x in again] == [(x.shard, 71 + n) for n, x in enumerate(held)]


async def test_nobody_hoards(serve: Any, tmp_path: Path) -> None:
    fleet = await serve()
    eu, _ = await fleet.trains("eu", "us")
    await describe(eu, sizes=[4] * 80)
    assert len(await leased(eu, wanting(64, least=0))) == 10, "a quarter of its part"
    held = [x.number for x in await leased(eu, wanting(64, least=0))]
    assert len(held) == 10
    report = DataReport(want=999, least=120, left=40, newest=held[-1], holding=held, finished=[])
    assert len(await leased(eu, report)) == 30, "what it takes to train a batch"
