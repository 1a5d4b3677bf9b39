"""kill -9 of the coordinator between any two journal writes, then the same bits.

The real service, journal, blobs and merges run in this process; a kill is a commit that never returns (before
it reached the disk, or right after), and everything in memory is dropped. What a site would do follows: it
asks again, whatever it is not sure of.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.core.run import SiteActive
from coordinator.outer.step import Digests
from coordinator.refused import Refused
from coordinator.service import Coordinator
from coordinator.store.journal import Journal
from shared.config import RunConfig
from shared.fragments import CHUNK_ELEMENTS
from shared.protocol import PROTOCOL, Code, Heartbeat, Join, OpenUpload
from shared.wire import Header, blob_digest, encode_flat, tensor_table
from tests.support.live import TOY, run_config

SITES = ("a", "b")
VERSIONS = 3


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Kills at the `at`-th commit of any journal, before or after it reached the disk, and stays dead."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.commits, self.dead = at, after, 0, False

    def commit(self, journal: Journal, name: str) -> None:
        if self.dead:
            raise Killed
        self.commits += 1
        self.dead = self.commits == self.at
        if self.dead and not self.after:
            raise Killed
        journal._db.execute("COMMIT")
        if self.dead:
            raise Killed


NESTEROV: dict[str, Any] = {}
DELAYED = {"optimizer": "delayed-nesterov", "period": 3, "merge": "rda", "correction": "heloco"}
ADAM = {"optimizer": "adam", "lr": 0.1, "momentum": 0.8}


def config(
    outer: dict[str, Any] = NESTEROV, quorum: str | int = "all", resting: str = "auto", upload: str = "int4"
) -> RunConfig:
    return run_config(
        {
            "outer": outer,
            "run": {"name": "killed", "tokens": VERSIONS * len(SITES) * 10, "min_sites": 2},
            "task": {"use": f"{TOY}:Toy"},
            "rounds": {"fragments": 2, "pacing": "equal-steps", "quorum": quorum},
            "wire": {"upload": upload},
            "store": {"checkpoint_versions": 2, "keep_checkpoints": 1, "resting": resting},
        }
    )


def contribution(coordinator: Coordinator, site: str, fragment: int, base: int) -> bytes:
    """What `site` would send: the same bytes whenever it is asked for the same base."""
    described = coordinator.layout.fragments[fragment]
    rng = np.random.default_rng([SITES.index(site), fragment, base])
    header = Header(
        kind="contribution",
        run=coordinator.run_id,
        site=site,
        fragment=fragment,
        base_version=base,
        version=base,
        digest=str(coordinator.publication.digest(fragment, base)),
        codec="int4",
        zstd=True,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(described),
        tokens=10,
        steps=1,
        sizes=[],
    )
    return encode_flat(header, described, rng.standard_normal(described.size).astype(np.float32), 1)


async def act_as_sites(coordinator: Coordinator, sessions: dict[str, str], order: tuple[str, ...]) -> None:
    """Both sites contribute to both fragments until the run is finished. `sessions` are those that they hold from an
    earlier life of the coordinator; a site that it does not know any more joins again."""
    for site in order:
        if not await known(coordinator, site, sessions):
            sessions[site] = (await coordinator.join(site, Join(protocol=PROTOCOL, site=site, software={}))).session
    for site in order:
        await coordinator.heartbeat(site, ready(coordinator, sessions[site]))
    while not coordinator.core.finished:
        for p in range(2):
            if coordinator.core.complete(p):
                continue
            base = coordinator.publication.newest[p].version
            for site in order:
                if coordinator.core.contributed(site, p) >= base:
                    continue
                body = contribution(coordinator, site, p, base)
                opening = OpenUpload(
                    run=coordinator.run_id,
                    site=site,
                    session=sessions[site],
                    fragment=p,
                    base_version=base,
                    codec="int4",
                    size=len(body),
                    digest=blob_digest(body),
                    part_size=1 << 22,
                    body=body,
                )
                try:
                    upload = await coordinator.intake.open(site, opening)
                except Refused as refused:
                    if refused.code is Code.RUN_FINISHED:
                        continue  # with rounds of one site the other one may come too late
                    raise
                assert upload.outcome is not None
                assert upload.outcome.accepted
            await settled(coordinator, p, base)


async def known(coordinator: Coordinator, site: str, sessions: dict[str, str]) -> bool:
    if site not in sessions:
        return False
    try:
        await coordinator.heartbeat(site, ready(coordinator, sessions[site]))
    except Refused:
        return False
    return True


def ready(coordinator: Coordinator, session: str) -> Heartbeat:
    return Heartbeat(
        run=coordinator.run_id,
        session=session,
        state="training" if coordinator.core.started else "ready",
        steps=0,
        tokens=0,
        step_seconds=0.1,
        overlap_seconds=0.0,
        sync_seconds=0.0,
        training_share=1.0,
        download_rate=None,
        loss=None,
        evaluation=None,
        repairs=0,
        evaluates=True,
        data=None,
    )


async def settled(coordinator: Coordinator, fragment: int, base: int) -> None:
    """Until the version after `base` is published, or the coordinator is dead."""
    published = asyncio.create_task(coordinator.publication.delta(fragment, base + 1, wait=60))
    await asyncio.wait({published, coordinator.failure}, return_when=asyncio.FIRST_COMPLETED)
    if coordinator.failure.done():
        published.cancel()
        coordinator.failure.result()
    published.result()


async def life(
    state: Path,
    sessions: dict[str, str],
    order: tuple[str, ...],
    outer: dict[str, Any],
    quorum: str | int = "all",
    resting: str = "auto",
) -> list[Digests] | None:
    """One life of a coordinator: the digests of each fragment at its end; None where it was killed."""
    coordinator = None
    try:
        coordinator = await Coordinator.open(config(outer, quorum, resting), state, state)
        await coordinator.start()
        await act_as_sites(coordinator, sessions, order)
        # The last checkpoint is written after the last version is published.
        await asyncio.gather(*coordinator._merges)
        return [state.digests() for state in coordinator._states]
    except Killed:
        return None
    finally:
        if coordinator is not None:
            await coordinator.stop()


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> list[Killer]:
    """The killer in charge, if any; `Journal._commit` asks it."""
    current: list[Killer] = []

    def commit(journal: Journal, name: str) -> None:
        if current:
            current[0].commit(journal, name)
        else:
            journal._db.execute("COMMIT")

    monkeypatch.setattr(Journal, "_commit", commit)
    return current


@pytest.mark.parametrize(
    ("outer", "stride"), [(NESTEROV, 1), (DELAYED, 4), (ADAM, 4)], ids=["nesterov", "delayed", "adam"]
)
def test_a_kill_between_any_two_journal_writes_ends_in_the_same_bits(
    tmp_path: Path, killing: list[Killer], outer: dict[str, Any], stride: int
) -> None:
    counter = Killer(at=-1, after=False)
    killing.append(counter)
    undisturbed = asyncio.run(life(tmp_path / "calm", {}, SITES, outer))
    assert undisturbed is not None
    assert counter.commits > 20
    for at in range(1, counter.commits + 1, stride):
        for after in (False, True):
            state = tmp_path / f"{at}-{after}"
            sessions: dict[str, str] = {}
            killing[:] = [Killer(at, after)]
            assert asyncio.run(life(state, sessions, SITES, outer)) is None, f"commit {at} did not happen"
            killing.clear()
            # The sites come back in the other order: that must not matter either.
            assert asyncio.run(life(state, sessions, SITES[::-1], outer)) == undisturbed, (
                f"killed at commit {at}, after={after}"
            )


@pytest.mark.parametrize("outer", [NESTEROV, {"optimizer": "delayed-nesterov"}], ids=["share", "delayed"])
def test_rounds_of_one_site_survive_a_kill_between_any_two_journal_writes(
    tmp_path: Path, killing: list[Killer], outer: dict[str, Any]
) -> None:
    """What a round is worth depends on who trains at that time; executed again, on what the journal says."""
    counter = Killer(at=-1, after=False)
    killing.append(counter)
    assert asyncio.run(life(tmp_path / "calm", {}, SITES, outer, quorum=1)) is not None
    for at in range(14, counter.commits + 1, 3):
        state = tmp_path / str(at)
        killing[:] = [Killer(at, after=bool(at % 2))]
        assert asyncio.run(life(state, {}, SITES, outer, quorum=1)) is None
        killing.clear()
        # One site alone comes back: it would make every round a whole one.
        assert asyncio.run(life(state, {}, SITES[:1], outer, quorum=1)) is not None
        journal = Journal(state / "journal.sqlite", read_only=True)
        rounds = [round_ for p in range(2) for round_ in journal.rounds(p, after=0)]
        journal.close()
        assert all(round_.published_at is not None for round_ in rounds)
        assert any(round_.rule.share == 0.5 or round_.rule.period == 2 for round_ in rounds)


def test_an_acknowledged_contribution_survives_a_kill(tmp_path: Path, killing: list[Killer]) -> None:
    """The coordinator dies right after it acknowledged one: the next one holds it, and no site sends it again."""

    async def first() -> None:
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path)
        await coordinator.start()
        sessions = {s: (await coordinator.join(s, Join(protocol=PROTOCOL, site=s, software={}))).session for s in SITES}
        for site in SITES:
            await coordinator.heartbeat(site, ready(coordinator, sessions[site]))
        body = contribution(coordinator, "a", 0, 0)
        opening = OpenUpload(
            run=coordinator.run_id,
            site="a",
            session=sessions["a"],
            fragment=0,
            base_version=0,
            codec="int4",
            size=len(body),
            digest=blob_digest(body),
            part_size=1 << 22,
            body=body,
        )
        outcome = (await coordinator.intake.open("a", opening)).outcome
        assert outcome is not None
        assert outcome.accepted
        killing.append(Killer(at=1, after=False))
        await coordinator.stop()

    async def second() -> None:
        killing.clear()
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path)
        await coordinator.start()
        assert coordinator.core.fragments[0].open.sites == {"a"}
        # Both took part when it died: the round must not close with the one that is here.
        assert coordinator.core.tick(coordinator.clock()) == []
        assert {m.site for m in coordinator.core.members.in_state("training")} == set(SITES)
        await coordinator.stop()

    asyncio.run(first())
    asyncio.run(second())


def test_a_lease_that_ran_out_is_not_restored(tmp_path: Path) -> None:
    async def first() -> None:
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path)
        await coordinator.start()
        sessions = {s: (await coordinator.join(s, Join(protocol=PROTOCOL, site=s, software={}))).session for s in SITES}
        for site in SITES:
            await coordinator.heartbeat(site, ready(coordinator, sessions[site]))
        await coordinator._carry_out([SiteActive("b", False, expired=True)])
        await coordinator.stop()

    async def second() -> None:
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path)
        await coordinator.start()
        assert {m.site for m in coordinator.core.members.in_state("training")} == {"a"}
        await coordinator.stop()

    asyncio.run(first())
    asyncio.run(second())


def test_what_was_accepted_in_a_codec_of_before_is_still_known(tmp_path: Path) -> None:
    """The answer was lost, and [wire] upload has been changed since: whoever asks again is told, and nothing that it
    held comes a second time. What was not accepted is refused by its codec, once its site is a member again."""

    async def opened(coordinator: Coordinator, site: str, session: str) -> int:
        body = contribution(coordinator, site, 0, 0)
        opening = OpenUpload(
            run=coordinator.run_id,
            site=site,
            session=session,
            fragment=0,
            base_version=0,
            codec="int4",
            size=len(body),
            digest=blob_digest(body),
            part_size=1 << 22,
            body=body,
        )
        outcome = (await coordinator.intake.open(site, opening)).outcome
        assert outcome is not None
        return outcome.version

    async def joined(coordinator: Coordinator) -> dict[str, str]:
        message = {site: Join(protocol=PROTOCOL, site=site, software={}) for site in SITES}
        sessions = {site: (await coordinator.join(site, message[site])).session for site in SITES}
        for site in SITES:
            await coordinator.heartbeat(site, ready(coordinator, sessions[site]))
        return sessions

    async def first() -> dict[str, str]:
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path)
        await coordinator.start()
        sessions = await joined(coordinator)
        assert await opened(coordinator, "a", sessions["a"]) == 1
        await coordinator.stop()
        return sessions

    async def second(before: dict[str, str]) -> None:
        coordinator = await Coordinator.open(config(upload="int8"), tmp_path / "state", tmp_path)
        await coordinator.start()
        for site in SITES:
            with pytest.raises(Refused) as refused:
                await coordinator.heartbeat(site, ready(coordinator, before[site]))
            assert refused.value.code is Code.NOT_A_MEMBER, "so every agent learns of the new config"
        with pytest.raises(Refused) as refused:
            await opened(coordinator, "b", before["b"])
        assert refused.value.code is Code.NOT_A_MEMBER
        sessions = await joined(coordinator)
        assert await opened(coordinator, "a", sessions["a"]) == 1
        with pytest.raises(Refused) as refused:
            await opened(coordinator, "b", sessions["b"])
        assert refused.value.code is Code.WRONG_CODEC
        assert [stored.contribution.site for stored in coordinator.reader.contributions(newest_of_each=True)] == ["a"]
        await coordinator.stop()

    asyncio.run(second(asyncio.run(first())))
