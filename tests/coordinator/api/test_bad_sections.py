"""A contribution of which one section is bad, in whatever way and codec: refused by the section's number, and nothing
of it is merged."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.protocol import Upload, unpack
from shared.wire import open_container, pack_container, pack_section
from tests.shared.bad_sections import TOPK, Bad, bad_sections, sound

TASK = """
import torch
from torch import nn


class Three:
    def __init__(self, options):
        pass

    def build_model(self):
        model = nn.Module()
        model.a_first = nn.Parameter(torch.zeros(67))
        model.b_middle = nn.Parameter(torch.zeros(20, 15))
        model.c_last = nn.Parameter(torch.zeros(12))
        return model

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError
"""


async def fleet_of(serve: Any, tmp_path: Path, codec: str) -> Any:
    """A coordinator whose one fragment has three sections, of 67, 300 and 12 elements."""
    (tmp_path / "three.py").write_text(TASK)
    name, _, k = codec.partition("-")
    return await serve(
        task={"use": "three.py:Three"},
        rounds={"fragments": 1},
        outer={"optimizer": "sgd", "lr": 1.0},
        wire={"upload": name, "publish": "fp32"} | ({"topk": int(k)} if k else {}),
    )


def body(site: Any, codec: str, middle: bytes, level: int = 1) -> bytes:
    """A contribution whose section 1 has these raw bytes."""
    raws = [sound(codec, 67), middle, sound(codec, 12)]
    sections = [bytes(pack_section(np.frombuffer(raw, np.uint8), level)) for raw in raws]
    return pack_container(site.header(codec=codec, zstd=level > 0), sections)


def files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.is_file()}


async def refuses(fleet: Any, site: Any, sent: bytes, says: str) -> None:
    """The contribution is refused so, and it is as if it had never come."""
    blobs = files(fleet.state / "blobs")
    answer = await site.offer(sent)
    assert answer.is_problem(400, "malformed"), answer.body
    assert says in answer.json["detail"]
    await nothing_is_merged(fleet, blobs)
    assert f'isthmus_refused_total{{code="malformed",site="{site.name}"}}' in (
        (await fleet.get("/metrics")).body.decode()
    )


async def nothing_is_merged(fleet: Any, blobs: set[Path]) -> None:
    while merges := list(fleet.coordinator._merges):
        await asyncio.wait(merges)
    assert (await fleet.get("/v1/versions")).json["fragments"][0]["version"] == 0
    assert fleet.coordinator.core.contributed("eu", 0) == -1
    assert fleet.coordinator.reader.contributions() == []
    assert fleet.coordinator.reader.contributions(newest_of_each=True) == []
    assert files(fleet.state / "uploads") == set()
    assert files(fleet.state / "blobs") == blobs
    assert not fleet.coordinator.failure.done()


async def takes(fleet: Any, site: Any, codec: str) -> None:
    """A sound contribution of the same site is accepted, and version 1 is made of it alone."""
    answer = await site.offer(body(site, codec, sound(codec)))
    assert answer.status == 200, answer.body
    upload = unpack(Upload, answer.body)
    assert upload.outcome is not None
    assert (upload.outcome.accepted, upload.outcome.version) == (True, 1)
    delta = await site.published(0, 1)
    (merged,) = fleet.coordinator.reader.round(0, 1).members
    assert merged == (upload.id, 1.0)
    fragment = fleet.coordinator.layout.fragments[0]
    with (
        open_container(delta.body, fragment) as opened,
        open_container(body(site, codec, sound(codec)), fragment) as own,
    ):
        np.testing.assert_allclose(opened.decode(), -own.decode(), rtol=1e-6)


@pytest.mark.parametrize("bad", bad_sections(), ids=str)
async def test_a_bad_section_is_refused_by_its_number_and_nothing_is_merged(
    serve: Any, tmp_path: Path, bad: Bad
) -> None:
    fleet = await fleet_of(serve, tmp_path, bad.codec)
    (site,) = await fleet.trains("eu")
    for level in (1, 0):
        await refuses(fleet, site, body(site, bad.codec, bad.raw, level), f"section 1{bad.says}")
    await takes(fleet, site, bad.codec)


@pytest.mark.parametrize(
    ("codec", "sent"), [("int4", "int8"), ("int4", "e3m0"), ("int8", "fp32"), (TOPK, "topk2-64"), (TOPK, "int4")]
)
async def test_a_codec_that_the_run_does_not_allow_is_refused_and_nothing_is_merged(
    serve: Any, tmp_path: Path, codec: str, sent: str
) -> None:
    fleet = await fleet_of(serve, tmp_path, codec)
    (site,) = await fleet.trains("eu")
    says = f"codec '{sent}' is not allowed here; {codec} would do"
    await refuses(fleet, site, body(site, sent, sound(sent), level=0 if sent == "fp32" else 1), says)
    await takes(fleet, site, codec)


async def test_what_comes_in_parts_is_refused_at_its_commit_and_gone(serve: Any, tmp_path: Path) -> None:
    fleet = await fleet_of(serve, tmp_path, "int4")
    fleet.coordinator.intake.uploads.part_bytes = 64
    (site,) = await fleet.trains("eu")
    (bad,) = (bad for bad in bad_sections() if str(bad) == "int4, a scale that is absurd")
    sent, blobs = body(site, "int4", bad.raw), files(fleet.state / "blobs")
    upload = unpack(Upload, (await site.offer(sent, inline=False)).body)
    for part in range(-(-len(sent) // 64)):
        path = f"/v1/contributions/{upload.id}/parts/{part}"
        assert (await site.ask("PUT", path, sent[64 * part : 64 * part + 64])).status == 204
    answer = await site.ask("POST", f"/v1/contributions/{upload.id}/commit", b"")
    assert answer.is_problem(400, "malformed")
    assert f"section 1{bad.says}" in answer.json["detail"]
    again = await site.ask("POST", f"/v1/contributions/{upload.id}/commit", b"")
    assert again.is_problem(404, "unknown-upload")
    await nothing_is_merged(fleet, blobs)
    await takes(fleet, site, "int4")


async def test_a_bad_section_of_one_site_leaves_the_round_to_the_others(serve: Any, tmp_path: Path) -> None:
    fleet = await fleet_of(serve, tmp_path, "int8")
    eu, us = await fleet.trains("eu", "us")
    (bad,) = (bad for bad in bad_sections() if str(bad) == "int8, a scale that is just absurd")
    assert (await us.offer(body(us, "int8", sound("int8")))).status == 200
    assert (await eu.offer(body(eu, "int8", bad.raw))).is_problem(400, "malformed")
    assert [stored.contribution.site for stored in fleet.coordinator.reader.contributions()] == ["us"]
    assert (await fleet.get("/v1/versions")).json["fragments"][0]["version"] == 0, "eu is still waited for"
    assert (await eu.offer(body(eu, "int8", sound("int8")))).status == 200
    await eu.published(0, 1)
    assert len(fleet.coordinator.reader.round(0, 1).members) == 2
