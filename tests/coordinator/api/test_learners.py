"""Learners of one site: participants of their own, with their site's token and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.refused import Refused
from coordinator.service import Coordinator
from shared.names import MOST_LEARNERS
from shared.protocol import PROTOCOL, SITE_HEADER, DataReport, Join, Leave, Manifest


def learner(site: Any, name: str) -> Any:
    """A learner of the site, with its token."""
    return replace(site, name=f"{site.name}~{name}")


async def training(fleet: Any, *names: str) -> list[Any]:
    """Learners of the site eu that train."""
    eu = fleet.site("eu")
    learners = [learner(eu, name) for name in names]
    for each in learners:
        await each.join()
    for state in ("ready", "training"):
        for each in learners:
            await each.beat(state)
    return learners


async def test_learners_join_and_contribute_each_for_itself(fleet: Any) -> None:
    a, b = await training(fleet, "910b", "h100")
    assert a.session != b.session
    shards = [
        (orders.shard.index, orders.shard.count) for orders in (await a.beat("training"), await b.beat("training"))
    ]
    assert shards == [(0, 2), (1, 2)]
    await a.contribute(0, 0, value=1.0)
    status = (await fleet.get("/v1/status")).json
    assert [site["name"] for site in status["sites"]] == ["eu~910b", "eu~h100"]
    assert status["fragments"][0]["contributions"] == ["eu~910b"], "the round waits for the other one"
    await b.contribute(0, 0, value=3.0)
    await b.published(0, 1)
    (round_,) = (await fleet.get("/v1/status")).json["rounds"]
    assert [each["site"] for each in round_["contributions"]] == ["eu~910b", "eu~h100"]
    metrics = (await fleet.get("/metrics")).body.decode()
    assert 'isthmus_contributions_accepted_total{site="eu~910b"} 1.0' in metrics
    leave = Leave(run=fleet.run, session=a.session)
    assert (await a.ask("POST", f"/v1/sites/{a.name}/leave", leave)).status == 204
    assert set(fleet.coordinator.core.members.live) == {"eu~h100"}


async def test_each_learner_has_its_own_leases_of_data(fleet: Any) -> None:
    a, b = await training(fleet, "910b", "h100")
    data = Manifest(run=fleet.run, digest="0" * 32, sizes=[8, 8, 8])
    assert (await a.ask("PUT", f"/v1/sites/{a.name}/manifest", data)).status == 204
    assert (await a.ask("PUT", f"/v1/sites/{b.name}/manifest", data)).is_problem(403, "not-your-site")
    report = DataReport(want=8, least=8, left=0, newest=-1, holding=[], finished=[])
    leased = [{lease.shard for lease in (await each.beat("training", data=report)).data.leases} for each in (a, b)]
    assert [len(shards) for shards in leased] == [1, 1]
    assert leased[0] != leased[1]


async def test_a_site_acts_as_its_learners_and_as_no_others(fleet: Any) -> None:
    (mine,) = await training(fleet, "910b")
    us = fleet.site("us")
    us.headers[SITE_HEADER] = mine.name
    for method, path in (("POST", "/v1/join"), ("GET", "/v1/join"), ("POST", f"/v1/sites/{mine.name}/heartbeat")):
        answer = await us.ask(method, path, mine.beating() if method == "POST" else None)
        assert answer.is_problem(401, "unauthorized")
        assert "no valid token for site eu;" in answer.json["detail"]
        assert "token add eu --state" in answer.json["detail"]
    us.headers[SITE_HEADER] = "us~910b"
    heartbeat, leave = mine.beating(), Leave(run=fleet.run, session=mine.session)
    assert (await us.ask("POST", "/v1/join", us.joining(site=mine.name))).is_problem(403, "not-your-site")
    assert (await us.ask("POST", f"/v1/sites/{mine.name}/heartbeat", heartbeat)).is_problem(403, "not-your-site")
    assert (await us.ask("POST", f"/v1/sites/{mine.name}/leave", leave)).is_problem(403, "not-your-site")
    assert (await us.offer(mine.body(), session=mine.session, site=mine.name)).is_problem(403, "not-your-site")
    eu = replace(mine, name="eu")
    answer = await eu.ask("POST", f"/v1/sites/{mine.name}/heartbeat", heartbeat)
    assert answer.is_problem(403, "not-your-site"), "one request has one name, whoever has the token"
    assert set(fleet.coordinator.core.members.live) == {"eu~910b"}


async def test_a_contribution_of_one_learner_cannot_name_another(fleet: Any) -> None:
    a, b = await training(fleet, "910b", "h100")
    answer = await a.offer(a.body(site=b.name))
    assert answer.is_problem(400, "malformed")
    await a.contribute(0, 0)


@pytest.mark.parametrize("name", ["eu~", "~a", "eu~a~b", "eu~A", "eu~" + "a" * 33, "eu~../x", "eu ~a", "EU~a"])
async def test_what_is_no_learners_name_is_refused(fleet: Any, name: str) -> None:
    eu = fleet.site("eu")
    eu.headers[SITE_HEADER] = name
    assert (await eu.ask("POST", "/v1/join", eu.joining(site=name))).is_problem(401, "unauthorized")
    eu.headers[SITE_HEADER] = "eu"
    assert (await eu.ask("POST", "/v1/join", eu.joining(site=name))).is_problem(400, "bad-request")


async def test_a_revoked_token_revokes_the_learners(fleet: Any) -> None:
    learners = await training(fleet, "910b", "h100")
    fleet.coordinator.store.journal.revoke_token("eu")
    for each in learners:
        answer = await each.ask("POST", f"/v1/sites/{each.name}/heartbeat", each.beating())
        assert answer.is_problem(401, "unauthorized")
        assert (await each.ask("POST", "/v1/join", each.joining())).is_problem(401, "unauthorized")


async def test_a_site_cannot_make_up_names_without_bound(fleet: Any) -> None:
    coordinator: Coordinator = fleet.coordinator

    async def join(name: str) -> None:
        await coordinator.join(name, Join(protocol=PROTOCOL, site=name, software={}))

    for n in range(MOST_LEARNERS):
        await join(f"eu~{n}")
    with pytest.raises(Refused, match="use one of their names again, such as eu~0"):
        await join("eu~more")
    for name in ("eu~0", "eu", "us~more", "eu2~more"):
        await join(name)
    eu = fleet.site("eu")
    answer = await learner(eu, "more").ask("POST", "/v1/join", learner(eu, "more").joining())
    assert answer.is_problem(403, "too-many-learners")


async def test_strangers_cannot_grow_the_metrics_by_learners(fleet: Any) -> None:
    await training(fleet, "910b")
    for n in range(5):
        await fleet.get("/v1/join", headers={SITE_HEADER: f"eu~{n}"})
    text = (await fleet.get("/metrics")).body.decode()
    assert 'isthmus_refused_total{code="unauthorized",site=""} 5.0' in text
    assert 'site="eu~0"' not in text
