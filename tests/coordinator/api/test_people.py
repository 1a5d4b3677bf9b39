"""What people and their tools read: JSON documents, probes, metrics and events."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.protocol import SITE_HEADER, Evaluation


async def metrics(fleet: Any) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The exposition: for each sample's name its value by labels."""
    answer = await fleet.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_the_status_says_how_the_run_stands(serve: Any) -> None:
    fleet = await serve(run={"min_sites": 2})
    assert (await fleet.get("/v1/status")).json["state"] == "waiting for sites"
    eu, us = await fleet.trains("eu", "us")
    await eu.beat("training", steps=7, tokens=70, step_seconds=0.25, training_share=0.5, loss=2.5)
    await us.contribute(1, 0)
    for site in (eu, us):  # one of the two was asked to evaluate, and only its word counts
        await site.beat("training", evaluation=Evaluation(tokens=0, loss=5.5))
    answer = await fleet.get("/v1/status")
    assert answer.headers["Cache-Control"] == "no-store"
    status = answer.json
    assert (status["run"], status["name"], status["state"]) == (fleet.run, "tiny", "training")
    assert (status["tokens"], status["tokens_budget"], status["outer_steps"]) == (0, 10**9, 0)
    assert (status["eval_loss"], status["evaluations"]) == (5.5, [{"tokens": 0, "loss": 5.5}])
    assert status["storage_fault"] is None
    assert [(s["name"], s["live"], s["state"]) for s in status["sites"]] == [
        ("eu", True, "training"),
        ("us", True, "training"),
    ]
    assert [(f["fragment"], f["version"], f["parameters"], f["contributions"]) for f in status["fragments"]] == [
        (0, 0, 300, []),
        (1, 0, 12, ["us"]),
    ]


async def test_the_run_and_its_versions_can_be_read_by_anyone(fleet: Any) -> None:
    run = (await fleet.get("/v1/run")).json
    assert (run["run"], run["name"], run["parameters"]) == (fleet.run, "tiny", 312)
    wire = {"upload": "int8", "publish": "int8", "error_feedback": True, "zstd_level": "auto"}
    assert run["config"]["wire"].items() >= wire.items()
    assert "token" not in json.dumps(run["config"]).replace("tokens", "").replace("warmup_tokens", "")
    versions = (await fleet.get("/v1/versions")).json
    assert [(f["fragment"], f["version"], f["tokens"]) for f in versions["fragments"]] == [(0, 0, 0), (1, 0, 0)]
    (site,) = await fleet.trains("eu")
    await site.contribute(0, 0)
    await site.published(0, 1)
    versions = (await fleet.get("/v1/versions")).json
    assert [(f["fragment"], f["version"], f["tokens"]) for f in versions["fragments"]] == [(0, 1, 10), (1, 0, 0)]
    assert versions["fragments"][0]["digest"] == fleet.coordinator.reader.round(0, 1).published_digest


async def test_the_status_says_what_the_last_rounds_were_made_of(fleet: Any) -> None:
    a, b = await fleet.trains("a", "b")
    await a.contribute(0, 0, value=0.5)
    await b.contribute(0, 0, value=1.0)
    await a.published(0, 1)
    await b.contribute(1, 0)
    await a.contribute(1, 0)
    await a.published(1, 1)
    newest, oldest = (await fleet.get("/v1/status")).json["rounds"]
    assert (newest["fragment"], newest["version"], oldest["fragment"], oldest["version"]) == (1, 1, 0, 1)
    assert (oldest["reason"], oldest["share"], oldest["tokens"]) == ("complete", 1.0, 20)
    assert oldest["cosine"] == pytest.approx(1.0, abs=1e-3)
    size = fleet.coordinator.layout.fragments[0].size
    assert [(c["site"], c["staleness"], c["weight"], c["tokens"], c["steps"]) for c in oldest["contributions"]] == [
        ("a", 0, 0.5, 10, 5),
        ("b", 0, 0.5, 10, 5),
    ]
    norms = [c["norm"] for c in oldest["contributions"]]
    assert norms == pytest.approx([0.5 * size**0.5, size**0.5], rel=0.02)
    assert oldest["merged_norm"] == pytest.approx(0.75 * size**0.5, rel=0.02)


async def test_events_stream_the_status(fleet: Any) -> None:
    async with fleet.client.get("/v1/events") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        event, data = await answer.content.readline(), await answer.content.readline()
    assert event == b"event: status\n"
    assert json.loads(data.removeprefix(b"data: "))["run"] == fleet.run


async def test_the_probes_and_the_dashboard_answer_without_a_token(fleet: Any) -> None:
    for path in ("/healthz", "/readyz"):
        answer = await fleet.get(path)
        assert (answer.status, answer.body) == (200, b"ok\n")
    page = await fleet.get("/")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")


async def test_the_metrics_hold_what_an_operator_asks(fleet: Any) -> None:
    (site,) = await fleet.trains("eu")
    await site.contribute(0, 0)
    await site.published(0, 1)
    await site.beat("training", steps=7, step_seconds=0.25, training_share=0.5, download_rate=2e6, loss=2.5, repairs=1)
    await site.offer(site.body(), base=9)
    found = await metrics(fleet)
    eu = (("site", "eu"),)
    assert found["isthmus_fragment_version"] == {(("fragment", "0"),): 1.0, (("fragment", "1"),): 0.0}
    assert found["isthmus_contributions_accepted_total"] == {eu: 1.0}
    assert found["isthmus_refused_total"] == {(("code", "unknown-base"), ("site", "eu")): 1.0}
    assert found["isthmus_rounds_total"] == {(("reason", "complete"),): 1.0}
    assert found["isthmus_round_sites_count"] == found["isthmus_staleness_versions_count"] == {(): 1.0}
    assert found["isthmus_staleness_versions_bucket"][("le", "0.0"),] == 1.0
    assert found["isthmus_merge_seconds_count"] == found["isthmus_publish_seconds_count"] == {(): 1.0}
    assert found["isthmus_live_sites"] == found["isthmus_training_sites"] == {(): 1.0}
    assert found["isthmus_site_inner_steps"] == {eu: 7.0}
    assert found["isthmus_site_step_seconds"] == {eu: 0.25}
    assert found["isthmus_site_training_share"] == {eu: 0.5}
    assert found["isthmus_site_download_bytes_per_second"] == {eu: 2e6}
    assert found["isthmus_site_train_loss_nats"] == {eu: 2.5}
    assert found["isthmus_site_anchor_repairs"] == {eu: 1.0}
    assert found["isthmus_tokens_merged"] == {(): 5.0}, "the mean over two fragments"
    assert found["isthmus_tokens_budget"] == {(): 1e9}
    assert found["isthmus_bytes_in_total"][eu] > 200
    assert found["isthmus_bytes_out_total"][eu] > 200
    for name in ("isthmus_journal_bytes", "isthmus_state_bytes", "isthmus_disk_free_bytes"):
        assert found[name][()] > 0
    assert found["isthmus_storage_faults_total"] == {(): 0.0}
    assert found["isthmus_event_loop_lag_seconds"][()] >= 0


async def test_strangers_cannot_grow_the_metrics(fleet: Any) -> None:
    await fleet.trains("eu")
    await fleet.get("/v1/join")
    before = {(name, labels) for name, samples in (await metrics(fleet)).items() for labels in samples}
    for n in range(20):
        for headers in ({SITE_HEADER: f"stranger{n}"}, {SITE_HEADER: "x" * (n + 60)}, {"X-Other": str(n)}):
            for path in ("/v1/join", f"/v1/nothing/{n}", f"/v1/fragments/{n}/versions/{n}/delta"):
                await fleet.get(path, headers=headers)
    after = {(name, labels) for name, samples in (await metrics(fleet)).items() for labels in samples}
    grown = {labels for name, labels in after - before}
    assert grown <= {(("code", "not-found"), ("site", ""))}
    assert fleet.coordinator.core.roster == {"eu"}


@pytest.mark.parametrize("path", ["/v1/status", "/v1/run", "/v1/versions", "/metrics", "/healthz", "/readyz", "/"])
async def test_what_people_read_needs_no_sites_at_all(fleet: Any, path: str) -> None:
    assert (await fleet.get(path)).status == 200


async def test_a_fault_of_our_own_is_a_problem_document_and_the_daemon_goes_on(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = await fleet.trains("eu")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.coordinator, "preview", broken)
        answer = await site.ask("GET", "/v1/join")
    assert answer.is_problem(500, "internal")
    assert b"secret" not in answer.body
    assert (await site.ask("GET", "/v1/join")).status == 200


async def test_a_disk_that_will_not_do_is_told_before_it_is_full(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fleet.trains("eu")

    async def looks(free: int) -> tuple[float, float]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        lines = (await fleet.get("/metrics")).body.decode().splitlines()
        values = dict(line.split(" ") for line in lines if line.startswith("isthmus_disk_"))
        return float(values["isthmus_disk_free_bytes"]), float(values["isthmus_disk_needed_bytes"])

    free, needed = await looks(1 << 40)
    assert free > needed > 4 * 3 * fleet.coordinator.layout.parameters
    assert not caplog.records
    assert await looks(1000) == (1000.0, needed)
    assert await looks(999) == (999.0, needed)
    assert [record.message for record in caplog.records if "MB are free" in record.message] == [
        f"0 MB are free under {fleet.state}; up to {int(needed) >> 20} MB may be needed"
    ]
